#include "models/inspect.h"

#include <algorithm>

#include <gtest/gtest.h>

#include "kv/policy.h"
#include "models/config.h"
#include "models/testing.h"

namespace octavo {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

// heads over kv_heads of 128; `windows` of the layers, from the first, with a window.
ModelSpec Spec(int layers, int kv_heads, int windows, int window) {
  LayerSpec layer;
  layer.heads = 32;
  layer.kv_heads = kv_heads;
  layer.head_dim = 128;
  ModelSpec spec;
  spec.layers.assign(layers, layer);
  for (int i = 0; i < windows; ++i) spec.layers[i].window = window;
  return spec;
}

// The one row of these formats.
const CacheCost& Row(const CacheReport& report, KvFormat format, KvFormat window_format) {
  const auto is = [&](const CacheCost& cost) {
    return cost.format == format && cost.window_format == window_format;
  };
  EXPECT_EQ(std::count_if(report.costs.begin(), report.costs.end(), is), 1) << Name(format);
  return *std::find_if(report.costs.begin(), report.costs.end(), is);
}
const CacheCost& Row(const CacheReport& report, KvFormat format) {
  return Row(report, format, format);
}

TEST(Inspect, WeightsOfExpertsAsTheyAreKept) {
  ModelSpec spec = Spec(24, 8, 0, 0);
  spec.hidden = 2880;
  spec.vocab = 201088;
  for (LayerSpec& layer : spec.layers) {
    layer.heads = 64;
    layer.head_dim = 64;
    layer.ffn = {.intermediate = 2880, .experts = 32, .top_k = 4};
  }
  const int64_t rest = 2880 * (201088 + 24 * (144 * 64 + 32)), expert = 3 * 2880 * 2880;
  const WeightReport bf16 = InspectWeights(spec);
  EXPECT_EQ(bf16.bytes_per_token, 2 * (rest + 24 * 4 * expert));
  EXPECT_EQ(bf16.bytes, 2 * (rest + 2880 * 201088 + 24 * 32 * expert));
  spec.weight_quant = WeightQuant::kMxfp4;
  spec.tie_word_embeddings = true;
  const WeightReport mxfp4 = InspectWeights(spec);
  EXPECT_EQ(mxfp4.bytes_per_token, 2 * rest + 24 * 4 * expert * 17 / 32);
  EXPECT_EQ(mxfp4.bytes, 2 * rest + 24 * 32 * expert * 17 / 32);
}

TEST(Inspect, FullAttentionOnly) {
  // Llama-3.1-8B: 2 * 32 layers * 8 heads * 128 * 2 bytes = 128 KiB per token.
  const CacheReport report = InspectCache(Spec(32, 8, 0, 0), 16 * kGiB, 8192);
  ASSERT_EQ(report.groups.size(), 1u);
  EXPECT_EQ(report.groups[0].layers, 32);
  ASSERT_EQ(report.costs.size(), 7u);
  const CacheCost &bf16 = Row(report, KvFormat::kBF16), &fp8 = Row(report, KvFormat::kFp8E4M3),
                  &int8 = Row(report, KvFormat::kInt8PerTokenHead);
  EXPECT_EQ(bf16.format, KvFormat::kBF16);
  EXPECT_EQ(bf16.bytes_per_token, 131072);
  EXPECT_EQ(bf16.window_bytes, 0);
  EXPECT_EQ(bf16.sequence_bytes, kGiB);
  EXPECT_EQ(bf16.sequences, 16);
  EXPECT_EQ(bf16.tokens, 131072);
  EXPECT_EQ(fp8.bytes_per_token, 65536);
  EXPECT_EQ(fp8.sequences, 32);
  EXPECT_EQ(fp8.tokens, 262144);
  EXPECT_EQ(int8.bytes_per_token, 65536 + 32 * 8 * 2 * 4);  // and a float per token, head, K and V
  EXPECT_EQ(Row(report, KvFormat::kF32).bytes_per_token, 262144);
  EXPECT_EQ(Row(report, KvFormat::kF16).bytes_per_token, bf16.bytes_per_token);
  EXPECT_EQ(Row(report, KvFormat::kFp8E5M2).bytes_per_token, fp8.bytes_per_token);
  EXPECT_EQ(Row(report, KvFormat::kFp8PerTokenHead).bytes_per_token, int8.bytes_per_token);
}

TEST(Inspect, WindowsAreBounded) {
  const CacheReport report = InspectCache(Spec(24, 8, 12, 128), kGiB, 100000);
  ASSERT_EQ(report.groups.size(), 2u);
  EXPECT_EQ(report.groups[0].window, 128);
  ASSERT_EQ(report.costs.size(), 7u + 4);  // 8-bit formats also with 16-bit windows
  const CacheCost &bf16 = Row(report, KvFormat::kBF16), &fp8 = Row(report, KvFormat::kFp8E4M3),
                  &skipped = Row(report, KvFormat::kFp8E4M3, KvFormat::kBF16);
  EXPECT_EQ(bf16.bytes_per_token, 12 * 8 * 128 * 2 * 2);
  EXPECT_EQ(bf16.window_bytes, 3 * 64 * 12 * 8 * 128 * 2 * 2);  // 128 tokens touch at most 3 pages
  EXPECT_EQ(fp8.window_bytes, bf16.window_bytes / 2);
  EXPECT_EQ(skipped.window_bytes, bf16.window_bytes);
  EXPECT_EQ(skipped.bytes_per_token, fp8.bytes_per_token);
  EXPECT_EQ(skipped.sequence_bytes, skipped.window_bytes + int64_t{1563} * 64 * 12 * 8 * 128 * 2);
}

TEST(Inspect, ShortSequencesDoNotFillTheirWindow) {
  const CacheReport report = InspectCache(Spec(2, 1, 1, 4096), kGiB, 64);
  EXPECT_EQ(report.costs[0].sequence_bytes, 2 * 64 * 128 * 2 * 2);
}

TEST(Inspect, WindowsOnlyHaveNoBound) {
  const ModelSpec spec = Spec(4, 1, 4, 128);
  EXPECT_EQ(InspectCache(spec, kGiB, 1000).costs.size(), 7u);
  EXPECT_EQ(InspectCache(spec, kGiB, 1000).costs[0].tokens, std::nullopt);
  EXPECT_EQ(InspectCache(spec, 1 << 18, 1000).costs[0].tokens,
            128);  // less than the windows
  EXPECT_EQ(InspectCache(spec, 0, 1000).costs[0].tokens, 0);
}

TEST(Inspect, Text) {
  ModelSpec spec = Spec(24, 8, 12, 128);
  const std::string text = ToText(InspectCache(spec, kGiB, 4096));
  EXPECT_NE(text.find("12 layers: sliding window 128, head_dim 128, 32 heads, 8 kv heads\n"),
            text.npos)
      << text;
  EXPECT_NE(text.find("12 layers: full attention"), text.npos) << text;
  EXPECT_NE(text.find("fp8_e4m3, windows bf16"), text.npos) << text;
  for (const KvFormat format : kOfferedFormats)
    EXPECT_NE(text.find("\n" + std::string(Name(format)) + " "), text.npos) << text;
  spec.dtype = DType::kF16;
  EXPECT_NE(ToText(InspectCache(spec, kGiB, 4096)).find("fp8_e4m3, windows fp16"), text.npos);
}

}  // namespace
}  // namespace octavo
