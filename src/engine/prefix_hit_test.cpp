// On the CPU a prompt whose beginning is in the prefix cache gives what it gives without: to the
// bit, for every cache format, size of chunks and length of the hit.
#include <gtest/gtest.h>

#include <tuple>

#include "engine/testing.h"

namespace octavo {
namespace {

constexpr int kPrompt = 5 * 64 + 1;

// From the first token after the hit on: log-probabilities of prompt and output, and the output.
Request Ask(const std::vector<int32_t>& prompt, int hit) {
  return {prompt,
          {.max_tokens = 40,
           .top_k = 50,
           .seed = 11,
           .ignore_eos = true,
           .prompt_logprobs_from = hit + 1}};
}

// A format's name, or one for K, one for V, and what is skipped.
void SetFormat(const std::string& format, EngineOptions& options) {
  if (format == "mixed") {
    options.kv_cache_dtype_k = "int8_per_token_head";
    options.kv_cache_dtype_v = "fp8";
    options.kv_cache_dtype_skip_layers = {"1"};
  } else {
    options.kv_cache_dtype = format;
  }
}

class PrefixHitTest : public ::testing::TestWithParam<std::tuple<const char*, const char*>> {};

TEST_P(PrefixHitTest, EqualsAMiss) {
  const auto& [model, format] = GetParam();
  EngineOptions options = Options(model);
  SetFormat(format, options);
  options.max_num_batched_tokens = kPrompt;
  EngineOptions without = options;
  without.enable_prefix_caching = false;
  auto reference = Engine::Create(without);
  Client misses(*reference);
  for (const int chunk : {7, kPrompt}) {
    options.max_num_batched_tokens = chunk;
    auto engine = Engine::Create(options);
    Client client(*engine);
    for (const int hit : {64, 192, kPrompt - 1}) {
      const std::vector<int32_t> prompt = RandomPrompt(kPrompt, hit);
      const std::vector<int32_t> beginning(prompt.begin(), prompt.begin() + hit + 1);
      EXPECT_EQ(client.Get(client.Submit({beginning, {.max_tokens = 1}})).cached, 0);
      const Result found = client.Get(client.Submit(Ask(prompt, hit)));
      const Result expected = misses.Get(misses.Submit(Ask(prompt, hit)));
      EXPECT_EQ(found.cached, hit) << chunk;
      EXPECT_EQ(expected.cached, 0);
      EXPECT_EQ(expected.prompt_logprobs.size(), static_cast<size_t>(kPrompt - 1 - hit));
      EXPECT_EQ(found.prompt_logprobs, expected.prompt_logprobs) << chunk << " " << hit;
      EXPECT_EQ(found.tokens, expected.tokens) << chunk << " " << hit;
      EXPECT_EQ(found.logprobs, expected.logprobs) << chunk << " " << hit;
    }
  }
}

// What sanitizers look for does not hang on the format, and the whole matrix takes them minutes.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
const auto kFormats = ::testing::Values("fp8", "mixed");
#else
const auto kFormats = ::testing::Values("fp32", "bf16", "fp16", "fp8", "fp8_e5m2",
                                        "fp8_per_token_head", "int8_per_token_head", "mixed");
#endif

INSTANTIATE_TEST_SUITE_P(ModelsAndFormats, PrefixHitTest,
                         ::testing::Combine(::testing::Values("needle", "gpt_oss", "gemma3_text"),
                                            kFormats),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_" +
                                  std::get<1>(info.param);
                         });

}  // namespace
}  // namespace octavo
