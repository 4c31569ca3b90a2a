#include "eval/variant.h"

#include <gtest/gtest.h>

namespace octavo {
namespace {

TEST(Variant, NamesFormatMathAndSkippedLayers) {
  EngineOptions options = WithVariant({}, "bf16");
  EXPECT_EQ(options.kv_cache_dtype, "bf16");
  EXPECT_EQ(options.attention_math, "auto");
  EXPECT_TRUE(options.kv_cache_dtype_skip_layers.empty());

  options = WithVariant({}, "fp8:16bit/first:2");
  EXPECT_EQ(options.kv_cache_dtype, "fp8");
  EXPECT_EQ(options.attention_math, "16bit");
  EXPECT_EQ(options.kv_cache_dtype_skip_layers, std::vector<std::string>{"first:2"});

  options = WithVariant({.kv_cache_dtype_skip_layers = {"0"}}, "fp8/sliding_window");
  EXPECT_EQ(options.attention_math, "auto");
  EXPECT_EQ(options.kv_cache_dtype_skip_layers, (std::vector<std::string>{"0", "sliding_window"}));
}

}  // namespace
}  // namespace octavo
