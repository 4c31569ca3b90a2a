#include "eval/calibrate.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include <gtest/gtest.h>

#include "engine/executor.h"
#include "eval/pass.h"
#include "io/json.h"
#include "io/testing.h"
#include "kv/scale_files.h"
#include "models/config.h"

namespace octavo {
namespace {

namespace fs = std::filesystem;

const fs::path kModel = fs::path(OCTAVO_SOURCE_DIR) / "checkpoints/needle";

TEST(Calibrate, ScalesArePowersOfTwoThatHoldTheMargin) {
  EXPECT_EQ(ScaleFor(448, 1), 1);
  EXPECT_EQ(ScaleFor(448.5f, 1), 2);
  EXPECT_EQ(ScaleFor(448, 1.5), 2);
  EXPECT_EQ(ScaleFor(224, 1), 0.5f);
  EXPECT_EQ(ScaleFor(0, 1.5), std::ldexp(1.0f, -19));
  EXPECT_EQ(ScaleFor(1e-30f, 1.5), std::ldexp(1.0f, -19));
}

TEST(Calibrate, TheFirstThatIsGoodEnoughIsAdvised) {
  std::vector<FormatScore> scores = {{.name = "bf16"},
                                     {.name = "a", .kl = 0.001, .saturated = 1},
                                     {.name = "b", .kl = 0.009, .kl_error = 0.002},
                                     {.name = "c", .kl = 0.009, .kl_error = 0.001}};
  EXPECT_EQ(Cheapest(scores, 0.01)->name, "c");
  scores[1].saturated = 0;
  EXPECT_EQ(Cheapest(scores, 0.01)->name, "a");
  EXPECT_EQ(Cheapest(scores, 1e-4), nullptr);
}

// The shipped model with keys 2^12 times as large and queries as much smaller: the same function,
// of which a cache of scale 1.0 holds the sign only.
void MakeLoudModel(const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(kModel))
    fs::copy_file(entry.path(), folder / entry.path().filename());
  std::ifstream in(kModel / "model.safetensors", std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const size_t data = sizeof(header_bytes) + header_bytes;
  const Json header = ParseJson(bytes.substr(sizeof(header_bytes), header_bytes), "the header");
  for (const auto& [name, tensor] : header.items()) {
    const bool is_key = name.find("k_proj") != name.npos;
    if (!is_key && name.find("q_proj") == name.npos) continue;
    ASSERT_EQ(tensor["dtype"], "BF16");
    const size_t end = tensor["data_offsets"][1];
    for (size_t at = tensor["data_offsets"][0]; at < end; at += sizeof(uint16_t)) {
      uint16_t bits;
      std::memcpy(&bits, &bytes[data + at], sizeof(bits));
      const int exponent = (bits >> 7 & 0xFF) + (is_key ? 12 : -12);
      ASSERT_LT(exponent, 255);
      bits = exponent > 0 ? static_cast<uint16_t>((bits & 0x807F) | exponent << 7) : 0;
      std::memcpy(&bytes[data + at], &bits, sizeof(bits));
    }
  }
  fs::remove(folder / "model.safetensors");
  std::ofstream(folder / "model.safetensors", std::ios::binary) << bytes;
}

CalibrateOptions Options(const fs::path& model, const fs::path& output) {
  return {.engine = {.model = model.string(), .device = "cpu", .threads = 2},
          .tokens = 512,
          .margin = 4,  // few tokens show little
          .output = output.string()};
}

TEST(Calibrate, AModelWithLargeKeysNeedsScalesAndGetsThem) {
  const TempFolder folder;
  const fs::path model = folder.path() / "loud";
  fs::create_directory(model);
  MakeLoudModel(model);
  const fs::path file = folder.path() / "scales.json";
  int done = 0, all = 0;
  const CalibrationReport loud = Calibrate(Options(model, file), [&](int d, int a) {
    EXPECT_EQ(d, ++done);
    all = a;
  });
  EXPECT_EQ(done, all);
  const CalibrationReport plain = Calibrate(Options(kModel, folder.path() / "plain.json"), nullptr);
  ASSERT_EQ(loud.scores.size(), plain.scores.size());
  ASSERT_EQ(loud.tokens, 512);

  EXPECT_EQ(loud.scores[0].kl, 0);
  EXPECT_EQ(loud.scores[0].top1, 1);
  EXPECT_GT(loud.scores[1].saturated, 0u);
  EXPECT_GT(loud.scores[1].kl, 5 * loud.scores[2].kl);
  EXPECT_EQ(loud.scores[2].saturated, 0u);
  EXPECT_NEAR(loud.scores[2].log_prob, plain.scores[2].log_prob, 1e-9);  // to the bit, but for sums
  // Powers of two: where nothing saturates nothing but subnormals changes.
  EXPECT_NEAR(plain.scores[1].kl, plain.scores[2].kl, 0.1 * plain.scores[1].kl);

  const ModelSpec spec = ReadModelSpec(model.string());
  std::vector<KvLayerFacts> facts;
  for (const LayerSpec& layer : spec.layers)
    facts.push_back({.kv_heads = layer.kv_heads, .head_dim = layer.head_dim});
  const std::vector<LayerScales> read = ReadScaleFile(file, facts);
  for (size_t l = 0; l < read.size(); ++l) {
    EXPECT_EQ(loud.amax[l].k[0], 4096 * plain.amax[l].k[0]) << l;
    EXPECT_EQ(loud.amax[l].v[0], plain.amax[l].v[0]) << l;
    EXPECT_EQ(read[l].k.values, loud.scales[l].k.values) << l;
    EXPECT_EQ(read[l].v.values, loud.scales[l].v.values) << l;
  }
}

// Against the backend's own count per layer, of float32; also with windows, whose pages are given
// back while the text is read.
class CalibrateWindow : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(
    , CalibrateWindow,
    testing::Values("", R"({"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                            "sliding_window": 64})"));

TEST_P(CalibrateWindow, AmaxIsThatOfTheCache) {
  const TempFolder folder;
  CalibrateOptions options = Options(kModel, folder.path() / "scales.json");
  const std::string text(1024, 'x');
  std::ofstream(folder.path() / "text") << text;
  options.text_file = (folder.path() / "text").string();
  options.engine.hf_overrides = GetParam();
  options.engine.max_num_batched_tokens = 128;
  const CalibrationReport report = Calibrate(options, nullptr);
  ASSERT_EQ(report.tokens, 512);
  EngineOptions engine = options.engine;
  engine.kv_cache_dtype = "bf16";
  engine.max_num_batched_tokens = 512;  // the same sums
  Executor executor(engine);
  const std::vector<int32_t> ids = [] {
    std::vector<int32_t> tokens(512, 'x');
    tokens[0] = 256;  // begin of text
    return tokens;
  }();
  Pass(executor).Run(ids, 512);
  const std::vector<LayerHealth> health = executor.ReadHealth();
  for (size_t l = 0; l < health.size(); ++l) {
    EXPECT_NEAR(report.amax[l].k[0], health[l].amax[0], health[l].amax[0] / 256) << l;
    EXPECT_NEAR(report.amax[l].v[0], health[l].amax[1], health[l].amax[1] / 256) << l;
  }
}

TEST(Calibrate, WhatCannotBeCalibrated) {
  const TempFolder folder;
  CalibrateOptions options = Options(kModel, folder.path() / "scales.json");
  options.engine.kv_cache_scales = "x.json";
  EXPECT_NE(ErrorMessage([&] { Calibrate(options, nullptr); }).find("--kv-cache-scales"),
            std::string::npos);
  options.engine.kv_cache_scales.clear();
  options.engine.tokenizer = std::string(OCTAVO_SOURCE_DIR) + "/checkpoints/needle";
  options.engine.model = std::string(OCTAVO_SOURCE_DIR) + "/tests/golden/llama";
  EXPECT_NE(ErrorMessage([&] { Calibrate(options, nullptr); }).find("vocabulary of 256"),
            std::string::npos);
  options.engine.model = kModel.string();
  options.text_file = (folder.path() / "short").string();
  std::ofstream(options.text_file) << "a few words";
  EXPECT_NE(ErrorMessage([&] { Calibrate(options, nullptr); }).find("short: expected at least 128"),
            std::string::npos);
}

}  // namespace
}  // namespace octavo
