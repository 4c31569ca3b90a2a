#include "eval/attention_error.h"

#include <cmath>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/float_bits.h"
#include "engine/executor.h"
#include "eval/needle.h"
#include "eval/variant.h"

namespace octavo {
namespace {

const std::string kModel = std::string(OCTAVO_SOURCE_DIR) + "/checkpoints/needle";
constexpr int kLayers = 4, kHeads = 2, kHeadDim = 128, kTokens = 300;

EngineOptions Options(int chunk) {
  return {.model = kModel,
          .device = "cpu",
          .max_model_len = 4096,
          .max_num_seqs = 1,
          .max_num_batched_tokens = chunk,
          .threads = 2};
}

std::vector<int32_t> Prompt() {
  std::vector<int32_t> prompt;
  for (int i = 0; i < kTokens; ++i) prompt.push_back(32 + (i * i + 7 * i) % 90);
  return prompt;
}

std::vector<HeadErrors> Errors(const std::vector<std::string>& formats, int chunk) {
  std::vector<EngineOptions> variants;
  for (const std::string& format : formats) variants.push_back(WithVariant(Options(chunk), format));
  const auto model = Executor(variants[0]).model();
  const std::vector<std::vector<int32_t>> one = {Prompt()};
  int prompts = 0;
  const auto errors = MeasureAttentionErrors(variants, model, one, [&] { ++prompts; });
  EXPECT_EQ(prompts, 1);
  return errors[0];
}

// Layer 0's outputs of an undisturbed run of the whole prompt.
std::vector<float> FirstLayer(const std::string& format) {
  Executor executor(WithVariant(Options(kTokens), format));
  SequencePages pages = executor.pool().Acquire({});
  EXPECT_TRUE(pages.Extend(kTokens));
  Batch batch = executor.MakeBatch();
  batch.Add(Prompt(), 0, kTokens, pages);
  std::vector<float> out;
  executor.Run(batch, [](size_t, const Tensor&) {}, {.attended = [&](int l, const Tensor& t) {
                 EXPECT_EQ(ShapeString(t), "[300, 256] bfloat16");
                 EXPECT_TRUE(t.contiguous());
                 for (int64_t i = 0; l == 0 && i < t.size(); ++i)
                   out.push_back(BF16ToFloat(t.Row<uint16_t>(0)[i]));
               }});
  return out;
}

TEST(AttentionError, IsWhatTwoRunsDifferByInTheFirstLayer) {
  const std::vector<float> fp8 = FirstLayer("fp8"), bf16 = FirstLayer("bf16");
  const std::vector<HeadErrors> whole = Errors({"bf16", "fp8"}, kTokens);
  for (int head = 0; head < kHeads; ++head) {
    double difference = 0, norm = 0;
    for (int row = kTokens - kAttentionErrorPositions; row < kTokens; ++row) {
      for (int i = 0; i < kHeadDim; ++i) {
        const size_t at = row * kHeads * kHeadDim + head * kHeadDim + i;
        difference += std::pow(double{fp8[at]} - bf16[at], 2);
        norm += std::pow(double{bf16[at]}, 2);
      }
    }
    EXPECT_DOUBLE_EQ(whole[0][0][head], std::sqrt(difference / norm));
    EXPECT_GT(whole[0][0][head], 1e-3);
  }
  // Positions are counted from the prompt's end, whatever the chunks.
  EXPECT_EQ(Errors({"bf16", "fp8"}, 100), whole);
  EXPECT_EQ(Errors({"bf16", "fp8"}, 7), whole);
}

TEST(AttentionError, OfALayerIsItsOwn) {
  const std::vector<HeadErrors> errors = Errors({"bf16", "fp8", "fp8/last:2", "bf16"}, 64);
  ASSERT_EQ(errors.size(), 3u);
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int head = 0; head < kHeads; ++head) {
      EXPECT_GT(errors[0][layer][head], 1e-3);
      // fp8 in the layers before does not show where a layer keeps bf16, nor bf16 where it does
      // not.
      EXPECT_EQ(errors[1][layer][head], layer >= 2 ? 0 : errors[0][layer][head]);
      EXPECT_EQ(errors[2][layer][head], 0);
    }
  }
}

TEST(AttentionError, IsInTheNeedleReport) {
  NeedleEvalOptions options{.engine = Options(512),
                            .formats = {"bf16", "fp8", "int8_per_token_head"},
                            .lengths = {1024, 2048},
                            .needles = 1,
                            .haystack_file = {},
                            .attention_error = true};
  int last = 0, expected = 0;
  const NeedleReport report = EvalNeedle(options, [&](int done, int all) {
    EXPECT_EQ(done, ++last);
    expected = all;
  });
  EXPECT_EQ(last, expected);
  EXPECT_EQ(last, 3 * 2 + 2);
  ASSERT_EQ(report.rows.size(), 6u);
  for (const NeedleRow& row : report.rows) {
    ASSERT_EQ(row.attention_error.size(), size_t{kLayers});
    for (const auto& layer : row.attention_error) {
      ASSERT_EQ(layer.size(), size_t{kHeads});
      for (const double error : layer) {
        EXPECT_GE(error, row.format == "bf16" ? 0 : 1e-3) << row.format;
        EXPECT_LE(error, row.format == "bf16" ? 0 : 0.2) << row.format;
      }
    }
  }
  const auto json = nlohmann::json::parse(NeedleJson(report));
  EXPECT_EQ(json["results"][4]["attention_error"]["layers"],
            nlohmann::json(report.rows[4].attention_error));
  EXPECT_NE(NeedleTable(report).find("  layer "), std::string::npos);
  EXPECT_NE(NeedleHtml(report).find("fp8, 2k"), std::string::npos);

  options.attention_error = false;
  options.lengths = {256};
  const NeedleReport without = EvalNeedle(options);
  EXPECT_EQ(NeedleTable(without).find("layer"), std::string::npos);
  EXPECT_EQ(NeedleJson(without).find("attention_error"), std::string::npos);
}

}  // namespace
}  // namespace octavo
