#include "engine/ranking.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace octavo {
namespace {

// Sorts everything.
TEST(RankingTest, EqualsASort) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    const int vocab = 1 + static_cast<int>(random() % 300);
    const float cap = round % 2 ? 3.0f : 0.0f;
    std::vector<float> logits(vocab);
    for (float& x : logits) x = static_cast<float>(random() % 64) / 4 - 8;  // many equal
    std::vector<double> capped(logits.begin(), logits.end());
    if (cap > 0) {
      for (double& x : capped) x = cap * std::tanh(x / cap);
    }
    double sum = 0;
    for (const double x : capped) sum += std::exp(x);
    std::vector<int32_t> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });

    const int32_t token = static_cast<int32_t>(random() % vocab);
    const int top = static_cast<int>(random() % 24);
    const Ranking ranking = RankToken(logits, cap, token, top);
    ASSERT_EQ(ranking.top.size(), static_cast<size_t>(std::min(top, vocab)));
    for (size_t i = 0; i < ranking.top.size(); ++i) {
      EXPECT_EQ(ranking.top[i].token, order[i]);
      EXPECT_NEAR(ranking.top[i].logprob, capped[order[i]] - std::log(sum), 1e-5);
    }
    EXPECT_EQ(order[ranking.rank - 1], token);
    EXPECT_NEAR(ranking.logprob, capped[token] - std::log(sum), 1e-5);
  }
}

}  // namespace
}  // namespace octavo
