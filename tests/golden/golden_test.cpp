// Every family against transformers: the figures of docs/numerics.md.
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "engine/device.h"
#include "eval/verify.h"
#include "io/checkpoint.h"

namespace octavo {
namespace {

const char* const kFamilies[] = {"llama",       "llama_hd128_tied", "qwen2",   "qwen3",
                                 "qwen3_moe",   "mistral",          "mixtral", "gemma2",
                                 "gemma3_text", "gpt_oss"};

VerifyOptions Options(const std::string& family) {
  VerifyOptions options;
  options.engine.model = std::string(OCTAVO_SOURCE_DIR) + "/tests/golden/" + family;
  options.engine.device = "cpu";
  options.engine.threads = 2;
  return options;
}

class GoldenTest : public ::testing::TestWithParam<const char*> {
 protected:
  void ExpectPasses(const VerifyOptions& options) {
    const VerifyReport report = Verify(options);
    const bool together = options.engine.dtype == "bfloat16";
    ASSERT_EQ(report.prompts.size(), together ? 4u : 3u);
    EXPECT_GT(report.prompts.back().tolerance, 0);
    for (const PromptResult& prompt : report.prompts) {
      if (prompt.tolerance > 0) {
        EXPECT_LE(prompt.relative_l2, prompt.tolerance);
      }
      EXPECT_TRUE(prompt.chunks_identical);
      if (options.engine.kv_cache_dtype == "auto" && options.engine.dtype == "float32") {
        EXPECT_EQ(prompt.greedy, "identical");
      }
    }
    EXPECT_TRUE(report.passed) << FormatReport(report);
  }
};

TEST_P(GoldenTest, Float32) {
  VerifyOptions options = Options(GetParam());
  options.engine.dtype = "float32";
  ExpectPasses(options);
}

TEST_P(GoldenTest, Float32Fp8Cache) {
  VerifyOptions options = Options(GetParam());
  options.engine.dtype = "float32";
  options.engine.kv_cache_dtype = "fp8";
  ExpectPasses(options);
}

TEST_P(GoldenTest, BFloat16) { ExpectPasses(Options(GetParam())); }

TEST_P(GoldenTest, BFloat16Fp8Cache) {
  VerifyOptions options = Options(GetParam());
  options.engine.kv_cache_dtype = "fp8";
  ExpectPasses(options);
}

// The whole path on a GPU, recorded decode steps too: what the kernels' own tests cannot see is how
// they follow one another. A quarter more than octavo verify allows, for routing decisions that
// flip (docs/numerics.md).
TEST_P(GoldenTest, OnCuda) {
  try {
    MakeBackend("cuda", 1);
  } catch (const Error& error) {
    GTEST_SKIP() << error.message();
  }
  for (const char* format : {"bf16", "fp8"}) {
    VerifyOptions options = Options(GetParam());
    options.engine.device = "cuda";
    options.engine.kv_cache_dtype = format;
    options.engine.attention_math = "16bit";
    const VerifyReport report = Verify(options);
    const PromptResult& all = report.prompts.back();
    ASSERT_GT(all.tolerance, 0);
    EXPECT_LE(all.relative_l2, 1.25 * all.tolerance) << format;
    EXPECT_LE(all.chunked_l2, 1.25 * all.tolerance) << format;
  }
}

// How far transformers' own fp8 cache moves the logits of a prompt: what quantising does to this
// model.
double Fp8Distance(const VerifyOptions& options, int prompt) {
  const Checkpoint golden = Checkpoint::OpenFile(options.engine.model + "/golden.safetensors");
  const Tensor* exact = golden.Find("prompt" + std::to_string(prompt) + ".logits");
  const Tensor* fp8 = golden.Find("prompt" + std::to_string(prompt) + ".logits_fp8kv");
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < exact->size(); ++i) {
    const double x = exact->Row<float>(0)[i];
    difference += std::pow(fp8->Row<float>(0)[i] - x, 2);
    norm += x * x;
  }
  return std::sqrt(difference / norm);
}

// Every other format has no reference of its own, but what fp8 does to the model says what it may
// do: int8 less, e5m2 with one mantissa bit fewer about twice as much. And it must do something.
TEST_P(GoldenTest, OtherFormatsAreClose) {
  struct Case {
    const char *k, *v;
    double most;  // of fp8's distance
  };
  for (const Case& c :
       {Case{"int8_per_token_head", "int8_per_token_head", 1.0}, Case{"fp8", "bf16", 1.6},
        Case{"bf16", "fp8", 1.6}, Case{"fp8_per_token_head", "int8_per_token_head", 1.6},
        Case{"fp16", "fp8_e5m2", 2.5}}) {
    VerifyOptions options = Options(GetParam());
    options.engine.dtype = "float32";
    options.engine.kv_cache_dtype_k = c.k;
    options.engine.kv_cache_dtype_v = c.v;
    const VerifyReport report = Verify(options);
    for (size_t i = 0; i < report.prompts.size(); ++i) {
      const PromptResult& prompt = report.prompts[i];
      EXPECT_LT(prompt.relative_l2, c.most * Fp8Distance(options, static_cast<int>(i)))
          << c.k << " " << c.v;
      EXPECT_GT(prompt.relative_l2, 1e-5) << c.k << " " << c.v;
      EXPECT_TRUE(prompt.chunks_identical) << c.k << " " << c.v;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, GoldenTest, ::testing::ValuesIn(kFamilies),
                         [](const auto& family) { return std::string(family.param); });

TEST(VerifyTest, NamesWhatIsMissing) {
  VerifyOptions options = Options("llama");
  options.golden = options.engine.model + "/model.safetensors";
  try {
    Verify(options);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(error.message().find("prompt0.ids"), std::string::npos) << error.message();
  }
}

}  // namespace
}  // namespace octavo
