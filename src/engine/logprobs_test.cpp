// Log-probabilities that requests ask for, against the log-softmax of the logits themselves.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/executor.h"
#include "engine/testing.h"

namespace octavo {
namespace {

using Rows = std::vector<std::vector<double>>;

// Of every position of the prompt, from one pass over all of it.
Rows LogSoftmax(const EngineOptions& options, std::span<const int32_t> ids) {
  EngineOptions whole = options;
  whole.max_num_batched_tokens = static_cast<int>(ids.size());
  Executor executor(whole);
  Batch batch = executor.MakeBatch();
  SequencePages pages = executor.pool().Acquire({});
  EXPECT_TRUE(pages.Extend(std::ssize(ids)));
  batch.Add(ids, 0, static_cast<int>(ids.size()), pages);
  for (size_t row = 0; row < ids.size(); ++row) batch.AddSample(static_cast<int>(row), {});
  Rows rows;
  const double cap = executor.spec().final_soft_cap;
  executor.Run(batch, [&](size_t, const Tensor& logits) {
    for (int64_t r = 0; r < logits.rows(); ++r) {
      const float* row = logits.Row<float>(r);
      std::vector<double>& out = rows.emplace_back(row, row + logits.columns());
      double sum = 0;
      for (double& x : out) {
        if (cap > 0) x = cap * std::tanh(x / cap);
        sum += std::exp(x);
      }
      for (double& x : out) x -= std::log(sum);
    }
  });
  return rows;
}

void ExpectRanked(const Event& event, const std::vector<double>& logprobs, int top) {
  constexpr double kFloat = 2e-5;  // a float32 of the size of a log-probability, and a sum's order
  std::vector<int32_t> order(logprobs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logprobs[a] > logprobs[b]; });
  EXPECT_NEAR(event.logprob, logprobs[event.token], kFloat) << event.position;
  EXPECT_EQ(order.at(event.rank - 1), event.token) << event.position;
  ASSERT_EQ(std::ssize(event.top), top);
  for (int i = 0; i < top; ++i) {
    EXPECT_EQ(event.top[i].token, order[i]) << event.position;
    EXPECT_NEAR(event.top[i].logprob, logprobs[order[i]], kFloat) << event.position;
  }
}

class LogprobsTest : public ::testing::TestWithParam<const char*> {};

TEST_P(LogprobsTest, ArePromptAndOutputLogSoftmaxWhateverIsCached) {
  for (const char* format : {"bf16", "fp8", "int8_per_token_head"}) {
    EngineOptions options = Options(GetParam());
    options.kv_cache_dtype = format;
    auto engine = Engine::Create(options);
    Client client(*engine);
    const std::vector<int32_t> prompt = RandomPrompt(150, 3);
    client.Get(client.Submit({prompt, {.max_tokens = 1}}));  // its pages are in the prefix cache
    const Result result = client.Get(client.Submit({prompt,
                                                    {.max_tokens = 12,
                                                     .seed = 5,
                                                     .ignore_eos = true,
                                                     .prompt_logprobs_from = 1,
                                                     .top_logprobs = 5,
                                                     .top_prompt_logprobs = 3}}));
    EXPECT_EQ(result.cached, 0);
    std::vector<int32_t> text = prompt;
    text.insert(text.end(), result.tokens.begin(), result.tokens.end());
    const Rows rows = LogSoftmax(options, text);
    ASSERT_EQ(result.events.size(), text.size() - 1);
    for (size_t i = 0; i < result.events.size(); ++i) {
      const Event& event = result.events[i];
      EXPECT_EQ(event.position, static_cast<int64_t>(i + 1));
      EXPECT_EQ(event.token, text[i + 1]);
      ExpectRanked(event, rows[i], i + 1 < prompt.size() ? 3 : 5);
    }
  }
}

TEST_P(LogprobsTest, AskingForMoreChangesNoText) {
  auto engine = Engine::Create(Options(GetParam()));
  Client client(*engine);
  const auto ask = [&](std::optional<int> top) {
    return client.Get(
        client.Submit({RandomPrompt(40, 8),
                       {.max_tokens = 20, .seed = 3, .ignore_eos = true, .top_logprobs = top}}));
  };
  const Result plain = ask(std::nullopt), ranked = ask(0);
  EXPECT_EQ(plain.tokens, ranked.tokens);
  for (size_t i = 0; i < plain.events.size(); ++i) {
    EXPECT_EQ(plain.events[i].rank, 0);
    EXPECT_GT(ranked.events[i].rank, 0);
    EXPECT_TRUE(ranked.events[i].top.empty());
    EXPECT_EQ(ranked.events[i].rank == 1, plain.events[i].is_top1);
    EXPECT_NEAR(ranked.events[i].logprob, plain.events[i].logprob, 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, LogprobsTest,
                         ::testing::Values("needle", "llama", "gemma2", "gemma3_text", "gpt_oss",
                                           "qwen3_moe"),
                         [](const auto& model) { return std::string(model.param); });

}  // namespace
}  // namespace octavo
