#include "kv/scales.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "io/json.h"
#include "kv/scale_files.h"
#include "kv/scale_names.h"

namespace octavo {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr LayerFormat kFp8 = {KvFormat::kFp8E4M3, KvFormat::kFp8E4M3};
constexpr LayerFormat kE5M2 = {KvFormat::kFp8E5M2, KvFormat::kFp8E5M2};
constexpr LayerFormat kBf16 = {KvFormat::kBF16, KvFormat::kBF16};

// A tensor of a checkpoint made by hand.
struct Made {
  std::vector<float> values;
  std::vector<int> shape = {};
  const char* dtype = "F32";
};

using Tensors = std::map<std::string, Made>;

std::string Bytes(const Made& tensor) {
  std::string bytes;
  const auto append = [&](const auto& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  for (const float x : tensor.values) {
    if (std::string_view(tensor.dtype) == "BF16") {
      append(FloatToBF16(x));
    } else if (std::string_view(tensor.dtype) == "F16") {
      append(static_cast<uint16_t>(Float16::Encode(x)));
    } else if (std::string_view(tensor.dtype) == "I8") {
      append(static_cast<int8_t>(x));
    } else {
      append(x);
    }
  }
  return bytes;
}

class KvScalesTest : public testing::Test {
 protected:
  KvScalesTest() {
    folder_ = fs::temp_directory_path() / fmt::format("octavo_scales_test_{}", getpid());
    fs::create_directories(folder_);
  }
  ~KvScalesTest() override { fs::remove_all(folder_); }

  Checkpoint Make(const Tensors& tensors) const {
    Json header = Json::object();
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      const std::string bytes = Bytes(tensor);
      header[name] = {{"dtype", tensor.dtype},
                      {"shape", tensor.shape},
                      {"data_offsets", {data.size(), data.size() + bytes.size()}}};
      data += bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const uint64_t length = text.size();
    std::ofstream out(folder_ / "model.safetensors", std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), sizeof(length)) << text << data;
    out.close();
    return Checkpoint::Open(folder_);
  }

  fs::path WriteText(const std::string& text) const {
    std::ofstream(folder_ / "scales.json") << text;
    return folder_ / "scales.json";
  }

  // With two layers of two kv heads, unless told otherwise.
  KvScales Load(const Tensors& tensors, const std::vector<LayerFormat>& formats = {kFp8, kFp8},
                const std::optional<fs::path>& side_car = {}, int kv_heads = 2) const {
    const std::vector<KvLayerFacts> layers(formats.size(),
                                           {.window = 0, .kv_heads = kv_heads, .head_dim = 64});
    return LoadKvScales(Make(tensors), side_car, layers, formats);
  }

  std::string LoadError(const Tensors& tensors,
                        const std::vector<LayerFormat>& formats = {kFp8, kFp8},
                        const std::optional<fs::path>& side_car = {}) const {
    try {
      Load(tensors, formats, side_car);
    } catch (const Error& error) {
      return error.message();
    }
    return "accepted";
  }

  fs::path folder_;
};

TEST_F(KvScalesTest, EveryDialect) {
  for (const auto& [k, v] : std::vector<std::pair<std::string, std::string>>{
           {"self_attn.k_scale", "self_attn.v_scale"},
           {"self_attn.attn.k_scale", "self_attn.attn.v_scale"},
           {"self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"},
           {"self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"},
           {"self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale"},
           {"self_attn.qkqkv_proj.k_scale", "self_attn.qkqkv_proj.v_scale"},
           {"self_attn.k_cache.scale", "self_attn.v_cache.scale"},
           {"mixer.k_proj.k_scale", "mixer.v_proj.v_scale"},
       }) {
    for (const std::string prefix : {"model.", "model.language_model.", "language_model.model.",
                                     "language_model.", "backbone.", ""}) {
      Tensors tensors;
      for (int i = 0; i < 2; ++i) {
        const std::string layer = fmt::format("{}layers.{}.", prefix, i);
        tensors[layer + k] = {{0.25f + i}};
        tensors[layer + v] = {{0.5f + i}};
      }
      const KvScales scales = Load(tensors);
      EXPECT_THAT(scales.layers[1].k.values, ElementsAre(1.25f, 1.25f)) << prefix << k;
      EXPECT_THAT(scales.layers[1].v.values, ElementsAre(1.5f, 1.5f)) << prefix << v;
      EXPECT_EQ(scales.layers[1].k.source, "checkpoint " + prefix + "layers.1." + k);
      EXPECT_THAT(scales.warnings, ElementsAre());
    }
  }
}

TEST_F(KvScalesTest, OneScaleForBoth) {
  const KvScales scales = Load({{"model.layers.0.self_attn.kv_scale", {{0.25f}}}}, {kFp8});
  EXPECT_THAT(scales.layers[0].k.values, ElementsAre(0.25f, 0.25f));
  EXPECT_THAT(scales.layers[0].v.values, ElementsAre(0.25f, 0.25f));
}

TEST_F(KvScalesTest, ShapesAndTypes) {
  struct Case {
    Made tensor;
    bool per_head;
  };
  for (const Case& c : std::vector<Case>{
           {{{0.25f}, {}}, false},
           {{{0.25f}, {1}}, false},
           {{{0.25f}, {1, 1, 1}}, false},
           {{{0.25f}, {1}, "BF16"}, false},
           {{{0.25f}, {1}, "F16"}, false},
           {{{0.25f, 0.5f}, {2}}, true},
           {{{0.25f, 0.5f}, {2, 1, 1}, "BF16"}, true},
       }) {
    const KvScales scales = Load({{"model.layers.0.self_attn.kv_scale", c.tensor}}, {kFp8});
    EXPECT_EQ(scales.layers[0].k.per_head, c.per_head);
    EXPECT_THAT(scales.layers[0].k.values, ElementsAre(0.25f, c.per_head ? 0.5f : 0.25f));
  }
  for (const Made& wrong : std::vector<Made>{
           {{1, 1, 1}, {3}}, {{1, 1}, {1, 2}}, {{1, 1, 1, 1}, {2, 2}}, {{1}, {1}, "I8"}}) {
    EXPECT_THAT(LoadError({{"model.layers.0.self_attn.kv_scale", wrong}}, {kFp8}),
                HasSubstr("tensor model.layers.0.self_attn.kv_scale: expected"));
  }
}

TEST_F(KvScalesTest, BadValuesNameTheTensor) {
  for (const float bad : {0.0f, -0.5f, NAN, INFINITY, -INFINITY, 1e-7f, 1e5f}) {
    EXPECT_THAT(
        LoadError({{"model.layers.0.self_attn.k_scale", {{bad}}},
                   {"model.layers.0.self_attn.v_scale", {{1}}}},
                  {kFp8}),
        HasSubstr("tensor model.layers.0.self_attn.k_scale: expected a scale from 1e-06 to 10000"))
        << bad;
    EXPECT_THAT(LoadError({{"model.layers.0.self_attn.kv_scale", {{1, bad}, {2}}}}, {kFp8}),
                HasSubstr("expected a scale from"));
  }
  for (const float edge : {1e-6f, 1e4f}) {
    EXPECT_EQ(LoadError({{"model.layers.0.self_attn.kv_scale", {{edge}}}}, {kFp8}), "accepted");
  }
}

TEST_F(KvScalesTest, DisagreeingDialectsAreAnError) {
  Tensors tensors = {{"model.layers.0.self_attn.kv_scale", {{0.5f}}},
                     {"model.layers.0.self_attn.k_proj.output_scale", {{0.5f}}}};
  EXPECT_EQ(LoadError(tensors, {kFp8}), "accepted");
  tensors["model.layers.0.self_attn.k_proj.output_scale"].values = {0.25f};
  EXPECT_THAT(LoadError(tensors, {kFp8}),
              HasSubstr("scales of the same thing and differ (0.25 and 0.5)"));
}

TEST_F(KvScalesTest, HalfACalibrationIsAnError) {
  const Tensors tensors = {{"model.layers.0.self_attn.k_scale", {{1}}},
                           {"model.layers.0.self_attn.v_scale", {{1}}},
                           {"model.layers.1.self_attn.k_scale", {{1}}}};
  EXPECT_THAT(LoadError(tensors),
              HasSubstr(": V scales of layer 1 missing, though others are there"));
  EXPECT_EQ(LoadError(tensors, {kFp8, kBf16}), "accepted");
  EXPECT_EQ(LoadError(tensors, {kFp8, {KvFormat::kFp8E4M3, KvFormat::kBF16}}), "accepted");
  EXPECT_THAT(LoadError(tensors, {kFp8, kFp8, kFp8}),
              HasSubstr("K scales of layer 2 and V scales of layers 1-2 missing"));
}

TEST_F(KvScalesTest, NoScalesAtAll) {
  const Tensors none = {{"model.layers.0.self_attn.k_proj.weight_scale", {{0}}},
                        {"model.layers.0.self_attn.k_proj.input_scale", {{0}}},
                        {"model.norm.weight", {{1}}}};
  KvScales scales = Load(none);
  EXPECT_THAT(scales.layers[0].k.values, ElementsAre(1, 1));
  EXPECT_EQ(scales.layers[1].v.source, "default 1.0");
  EXPECT_THAT(scales.warnings, ElementsAre(HasSubstr("no KV scales: layers 0-1 use scale 1.0")));
  EXPECT_THAT(
      scales.lines,
      ElementsAre("layers 0-1: K per tensor from default 1.0, V per tensor from default 1.0",
                  "KV scales: K 1 to 1, V 1 to 1"));
  scales = Load(none, {kE5M2, kE5M2});
  EXPECT_THAT(scales.warnings, ElementsAre());
  scales = Load(none, {kBf16, {KvFormat::kInt8PerTokenHead, KvFormat::kFp8PerTokenHead}});
  EXPECT_THAT(scales.warnings, ElementsAre());
  EXPECT_THAT(scales.lines, ElementsAre());
  EXPECT_TRUE(scales.layers[1].k.values.empty());
}

TEST_F(KvScalesTest, WhatIsNotUsedIsSaid) {
  const Tensors tensors = {{"model.layers.0.self_attn.kv_scale", {{0.25f}}},
                           {"model.layers.1.self_attn.kv_scale", {{0.5f}}},
                           {"model.layers.0.self_attn.q_scale", {{1}}},
                           {"model.layers.1.self_attn.q_proj.output_scale", {{1}}},
                           {"model.layers.1.self_attn.prob_output_scale", {{1}}},
                           {"model.layers.0.self_attn.k_zero_point", {{0}, {1}, "I8"}},
                           {"model.layers.0.self_attn.v_zero_point", {{3}, {1}, "I8"}},
                           {"model.layers.2.self_attn.k_scale", {{1}}},
                           {"mtp.layers.0.self_attn.k_scale", {{0}}},
                           {"model.layers.0.self_attn.key_scale", {{1}}}};
  const KvScales scales = Load(tensors, {kFp8, kBf16});
  EXPECT_THAT(
      scales.lines,
      ElementsAre("layer 0: K per tensor from checkpoint model.layers.N.self_attn.kv_scale, "
                  "V per tensor from checkpoint model.layers.N.self_attn.kv_scale",
                  "KV scales: K 0.25 to 0.25, V 0.25 to 0.25",
                  HasSubstr("model.layers.0.self_attn.q_scale and 2 more not used: queries"),
                  HasSubstr("model.layers.0.self_attn.k_zero_point not used: zero points of zero"),
                  HasSubstr("mtp.layers.0.self_attn.k_scale not used: not of the decoder's layers"),
                  "layer 1: K scales not used, K is stored as bf16",
                  "layer 1: V scales not used, V is stored as bf16"));
  EXPECT_THAT(
      scales.warnings,
      ElementsAre(
          HasSubstr("model.layers.2.self_attn.k_scale not used: the model has layers 0 to 1"),
          HasSubstr("model.layers.0.self_attn.v_zero_point not used: zero points are not"),
          HasSubstr("model.layers.0.self_attn.key_scale not used: it is named like")));
}

TEST_F(KvScalesTest, Names) {
  EXPECT_EQ(ParseScaleName("model.layers.12.self_attn.k_scale").layer, 12);
  EXPECT_TRUE(ParseScaleName("vision_tower.encoder.layers.1.self_attn.k_scale").other_part);
  EXPECT_EQ(ParseScaleName("model.sublayers.1.self_attn.k_scale").role, ScaleRole::kUnknown);
  for (const char* other :
       {"model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.block_scale",
        "model.layers.0.self_attn.k_proj.weight_scale", "lm_head.weight",
        "model.layers.x.self_attn.k_scale", "model.layers.-1.self_attn.k_scale",
        "model.layers.99999999999.self_attn.k_scale", "model.layers.1"}) {
    EXPECT_EQ(ParseScaleName(other).role, ScaleRole::kNone) << other;
  }
}

TEST_F(KvScalesTest, RankFiles) {
  const fs::path file = WriteText(R"({"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn",
      "scaling_factor": {"0": {"0": 0.25, "1": 0.5}, "rank1": {"0": 1.0, "1": 2.0}}}})");
  const KvScales scales =
      Load({{"model.layers.0.self_attn.kv_scale", {{1}}}}, {kFp8, kFp8}, file, 4);
  EXPECT_THAT(scales.layers[0].k.values, ElementsAre(0.25f, 0.25f, 1.0f, 1.0f));
  EXPECT_THAT(scales.layers[1].v.values, ElementsAre(0.5f, 0.5f, 2.0f, 2.0f));
  EXPECT_EQ(scales.layers[1].v.source, "side-car " + file.string());
  EXPECT_THAT(scales.lines, testing::Contains(HasSubstr("overruled by " + file.string())));
}

TEST_F(KvScalesTest, OwnFilesReadBackBitForBit) {
  std::vector<LayerScales> made(3);
  made[0].k = {.values = {1.0f / 3, 0.1f}, .per_head = true, .source = {}};
  made[0].v = {.values = {1e-6f, 1e-6f}, .per_head = false, .source = {}};
  made[2].k = {.values = {std::nextafter(1.0f, 2.0f), 1e4f}, .per_head = true, .source = {}};
  made[2].v = {.values = {0.7f, 0.7f}, .per_head = false, .source = {}};
  const fs::path file = folder_ / "own.json";
  WriteScaleFile(file, "a \"model\"\xff", made);
  const std::vector<KvLayerFacts> facts(3, {.window = 0, .kv_heads = 2, .head_dim = 64});
  const std::vector<LayerScales> read = ReadScaleFile(file, facts);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(read[i].k.values, made[i].k.values) << i;
    EXPECT_EQ(read[i].v.values, made[i].v.values) << i;
    EXPECT_EQ(read[i].k.per_head, made[i].k.per_head) << i;
  }
  EXPECT_THAT(LoadError({}, {kFp8, kFp8, kFp8}, file),
              HasSubstr("K scales of layer 1 and V scales of"));
  EXPECT_EQ(LoadError({}, {kFp8, kBf16, kFp8}, file), "accepted");
  EXPECT_THAT(
      [&] { WriteScaleFile(folder_ / "no" / "such.json", "", made); },
      testing::Throws<Error>(testing::Property(&Error::message, HasSubstr("cannot be written"))));
}

TEST_F(KvScalesTest, BadFiles) {
  struct Case {
    const char* text;
    const char* message;
  };
  for (const Case& c : std::vector<Case>{
           {"{}", "not a file of KV scales"},
           {"[]", "expected an object, found an array"},
           {R"({"octavo_kv_scales": 2})", "expected version 1, found 2"},
           {R"({"octavo_kv_scales": 1})", "layers is missing"},
           {R"({"octavo_kv_scales": 1, "layers": []})",
            "layers: expected an object, found an array"},
           {R"({"octavo_kv_scales": 1, "layers": {}, "scale": 1})", "found 'scale'"},
           {R"({"octavo_kv_scales": 1, "layers": {}})", "layers: expected a layer at least"},
           {R"({"octavo_kv_scales": 1, "layers": {}, "model": 1})", "model: expected a string"},
           {R"({"octavo_kv_scales": 1, "layers": {"2": {"k": 1}}})",
            "expected a key from 0 to 1, found '2'"},
           {R"({"octavo_kv_scales": 1, "layers": {"01": {"k": 1}}})", "found '01'"},
           {R"({"octavo_kv_scales": 1, "layers": {"0": 1}})", "layers.0: expected an object"},
           {R"({"octavo_kv_scales": 1, "layers": {"0": {"q": 1}}})",
            "layers.0: expected k and v, found 'q'"},
           {R"({"octavo_kv_scales": 1, "layers": {"0": {"k": "1"}}})",
            "layers.0.k: expected a number"},
           {R"({"octavo_kv_scales": 1, "layers": {"0": {"k": 0}}})",
            "layers.0.k: expected a scale from"},
           {R"({"octavo_kv_scales": 1, "layers": {"0": {"k": [1]}}})",
            "expected 2 numbers, one per kv head"},
           {R"({"octavo_kv_scales": 1, "layers": {"0": {"k": [1, -1]}}})",
            "layers.0.k[1]: expected a scale"},
           {R"({"kv_cache": {}})", "kv_cache: dtype is missing"},
           {R"({"kv_cache": {"dtype": "float8_e5m2"}})",
            "expected \"float8_e4m3fn\", found 'float8_e5m2'"},
           {R"({"kv_cache": {"dtype": "float8_e4m3fn"}})", "scaling_factor is missing"},
           {R"({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0}}}})",
            "kv_cache.scaling_factor.0.0: expected a scale"},
           {R"({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"1": {"0": 1}}}})",
            "scaling_factor: expected a key from 0 to 0, found '1'"},
           {R"({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor":
               {"0": {"0": 1}, "rank0": {"0": 1}}}})",
            "rank 0 is there twice"},
           {R"({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor":
               {"0": {"0": 1}, "rank1": {}}}})",
            "1 of 2 ranks have layer 0"},
           {R"({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor":
               {"0": {"0": 1}, "1": {}, "2": {}}}})",
            "3 ranks do not share 2 kv heads evenly"},
       }) {
    const fs::path file = WriteText(c.text);
    const std::string message = LoadError({}, {kFp8, kFp8}, file);
    EXPECT_THAT(message, HasSubstr(c.message)) << c.text;
    EXPECT_THAT(message, testing::StartsWith(file.string()));
  }
}

// Every spelling that vLLM is known to read, as collected in shared/kvscales/tensor_names.json.
TEST_F(KvScalesTest, PublishedNames) {
  const char* shared = std::getenv("OCTAVO_SHARED");
  const fs::path root = fs::path(shared ? shared : OCTAVO_SOURCE_DIR "/../shared") / "kvscales";
  if (!fs::exists(root)) GTEST_SKIP() << root << " is not there: no published name was read";
  const Json names = ReadJsonFile(root / "tensor_names.json");
  for (const Json& entry : names["accepted_spellings"]) {
    const std::string name = entry["name"];
    const ScaleName parsed = ParseScaleName(name);
    EXPECT_NE(parsed.role, ScaleRole::kNone) << name;
    EXPECT_NE(parsed.role, ScaleRole::kUnknown) << name;
    EXPECT_EQ(parsed.other_part, name.starts_with("mtp.")) << name;
  }
  const Json header =
      ReadJsonFile(root / "compressed-tensors/qwen3.8-27b-nvfp4.header_evidence.json");
  for (const auto& [name, value] : header["tensors"].items()) {
    const bool scale = name.ends_with(".k_scale");
    EXPECT_EQ(ParseScaleName(name).role, scale ? ScaleRole::kK : ScaleRole::kNone) << name;
    EXPECT_FALSE(scale && ParseScaleName(name).other_part) << name;
  }
}

// The per-layer scale files that vLLM and SGLang published, where they are at hand.
TEST_F(KvScalesTest, PublishedScaleFiles) {
  const char* shared = std::getenv("OCTAVO_SHARED");
  const fs::path root = fs::path(shared ? shared : OCTAVO_SOURCE_DIR "/../shared") / "kvscales";
  int read = 0;
  for (const char* engine : {"vllm", "sglang"}) {
    if (!fs::is_directory(root / engine)) continue;
    for (const auto& entry : fs::directory_iterator(root / engine)) {
      if (entry.path().extension() != ".json") continue;
      const Json json = ReadJsonFile(entry.path());
      const Json& rank = *json["kv_cache"]["scaling_factor"].begin();
      const std::vector<KvLayerFacts> facts(rank.size(),
                                            {.window = 0, .kv_heads = 8, .head_dim = 128});
      const std::vector<LayerScales> layers = ReadScaleFile(entry.path(), facts);
      for (size_t i = 0; i < layers.size(); ++i) {
        EXPECT_EQ(layers[i].k.values[0], rank[std::to_string(i)].get<float>()) << entry.path() << i;
      }
      ++read;
    }
  }
  if (read == 0)
    GTEST_SKIP() << root << " has no vllm/*.json or sglang/*.json: no published file was read";
}

}  // namespace
}  // namespace octavo
