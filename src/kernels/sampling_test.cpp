// Sampling: the CPU agrees with the reference token by token; both draw from the right
// distribution; what a row gets depends on its own parameters alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>

#include "kernels/backend.h"
#include "kernels/sampling.h"
#include "kernels/simd_targets.h"
#include "kernels/test_tensors.h"

namespace octavo {
namespace {

std::vector<float> RandomLogits(std::mt19937& random, int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> logits(count);
  for (float& x : logits) x = normal(random);
  return logits;
}

// Every row samples the same logits.
std::vector<SampledToken> SampleRows(Backend& backend, const std::vector<float>& logits,
                                     const std::vector<SampleRow>& rows, float soft_cap = 0) {
  std::vector<float> memory;
  for (size_t r = 0; r < rows.size(); ++r)
    memory.insert(memory.end(), logits.begin(), logits.end());
  const Tensor tensor(memory.data(), DType::kF32,
                      {static_cast<int64_t>(rows.size()), static_cast<int64_t>(logits.size())});
  std::vector<SampledToken> out(rows.size());
  backend.Sample({.logits = tensor, .soft_cap = soft_cap, .rows = rows, .out = out});
  return out;
}

SampledToken SampleRowOf(Backend& backend, const std::vector<float>& logits, const SampleRow& row) {
  return SampleRows(backend, logits, {row})[0];
}

std::vector<std::unique_ptr<Backend>> BothBackends() {
  std::vector<std::unique_ptr<Backend>> backends;
  backends.push_back(MakeCpuBackend(2));
  backends.push_back(MakeReferenceBackend());
  return backends;
}

// The tokens that 2000 draws at a high temperature reach: everything that was kept.
std::set<int32_t> Reached(Backend& backend, const std::vector<float>& logits, SampleRow row) {
  std::vector<SampleRow> rows;
  for (uint32_t i = 0; i < 2000; ++i) {
    row.token_index = i;
    rows.push_back(row);
  }
  std::set<int32_t> ids;
  for (const SampledToken& token : SampleRows(backend, logits, rows)) ids.insert(token.id);
  return ids;
}

TEST(SamplingTest, AgreesWithReference) {
  std::mt19937 random(1);
  const auto oracle = MakeReferenceBackend();
  for (const SimdTarget& target : SimdTargets()) {
    const UseSimdTarget use(target);
    const auto cpu = MakeCpuBackend(2);
    for (int64_t vocab : {1, 2, 5, 31, 32, 1000, 5003}) {
      const std::vector<float> logits = RandomLogits(random, vocab, 4);
      const std::vector<int32_t> history = {
          0, 3, 3, 700, -1, 9999999, static_cast<int32_t>(vocab) - 1};
      std::vector<LogitBias> biases = {{0, -3}};
      if (vocab > 4) biases.push_back({3, 2.5f});
      if (vocab > 31) biases.push_back({30, -std::numeric_limits<float>::infinity()});
      std::vector<SampleRow> rows;
      for (float temperature : {0.0f, 0.3f, 1.0f, 8.0f}) {
        for (int32_t top_k : {0, 1, 7, 300}) {
          for (float top_p : {1.0f, 0.95f, 0.3f, 0.0f}) {
            for (float min_p : {0.0f, 0.05f, 1.0f}) {
              for (float penalty : {1.0f, 1.3f}) {
                rows.push_back(
                    {.temperature = temperature,
                     .top_k = top_k,
                     .top_p = top_p,
                     .min_p = min_p,
                     .repetition_penalty = penalty,
                     .history = history,
                     .biases = std::span(biases).first(rows.size() % (biases.size() + 1)),
                     .seed = rows.size() * 0x123456789ABCull,
                     .choice = static_cast<uint32_t>(rows.size() % 3),
                     .token_index = static_cast<uint32_t>(rows.size()),
                     .target =
                         rows.size() % 4 == 0 ? static_cast<int32_t>(rows.size() % vocab) : -1});
              }
            }
          }
        }
      }
      for (float soft_cap : {0.0f, 30.0f}) {
        const auto got = SampleRows(*cpu, logits, rows, soft_cap);
        const auto want = SampleRows(*oracle, logits, rows, soft_cap);
        for (size_t r = 0; r < rows.size(); ++r) {
          EXPECT_EQ(got[r].id, want[r].id) << target.name << ", vocab " << vocab << ", row " << r;
          EXPECT_EQ(got[r].top1, want[r].top1);
          EXPECT_TRUE(got[r].finite);
          EXPECT_NEAR(got[r].logprob, want[r].logprob, soft_cap > 0 ? 1e-5 : 1e-6);
        }
      }
    }
  }
}

// Chi-square of 40000 draws against softmax(logits / temperature) over the kept tokens.
void ExpectDistribution(Backend& backend, const std::vector<float>& logits, SampleRow row,
                        const std::vector<int32_t>& kept) {
  constexpr int kDraws = 40000;
  std::vector<SampleRow> rows;
  for (int i = 0; i < kDraws; ++i) {
    row.seed = static_cast<uint64_t>(i / 200) << 32;  // all three words of the state move
    row.choice = i % 4;
    row.token_index = i % 200 / 4;
    rows.push_back(row);
  }
  std::vector<int> counts(logits.size());
  for (const SampledToken& token : SampleRows(backend, logits, rows)) ++counts[token.id];
  double total = 0;
  for (int32_t id : kept) total += std::exp(double{logits[id]} / row.temperature);
  double chi_square = 0;
  int seen = 0;
  for (int32_t id : kept) {
    const double expected = kDraws * std::exp(double{logits[id]} / row.temperature) / total;
    chi_square += (counts[id] - expected) * (counts[id] - expected) / expected;
    seen += counts[id];
  }
  EXPECT_EQ(seen, kDraws) << "a token outside the kept set was drawn";
  // Mean and variance of a chi-square are its degrees of freedom and twice that; the normal tail
  // beyond 4 is 3e-5.
  const double freedom = static_cast<double>(kept.size()) - 1;
  EXPECT_LT(chi_square, freedom + 4 * std::sqrt(2 * freedom));
}

TEST(SamplingTest, DrawsFromTheDistribution) {
  std::vector<float> logits;
  for (int i = 0; i < 40; ++i) logits.push_back(static_cast<float>(i % 7) * 0.4f);
  std::vector<int32_t> all, best;
  for (int32_t i = 0; i < 40; ++i) all.push_back(i);
  for (int32_t i = 0; i < 40; ++i) {
    if (i % 7 >= 5) best.push_back(i);
  }
  for (const auto& backend : BothBackends()) {
    SCOPED_TRACE(backend->name());
    ExpectDistribution(*backend, logits, {.temperature = 1}, all);
    ExpectDistribution(*backend, logits, {.temperature = 0.5f}, all);
    ExpectDistribution(*backend, logits,
                       {.temperature = 1, .top_k = static_cast<int32_t>(best.size())}, best);
    ExpectDistribution(*backend, logits, {.temperature = 2, .min_p = 0.8f},
                       best);  // exp(-0.4 / 2) = 0.82
  }
}

TEST(SamplingTest, SameSeedSameTokenWhateverTheOtherRows) {
  std::mt19937 random(5);
  const std::vector<float> logits = RandomLogits(random, 3000, 2);
  for (const auto& backend : BothBackends()) {
    std::vector<SampleRow> rows;
    for (int i = 0; i < 30; ++i) {
      rows.push_back({.temperature = 1 + 0.1f * static_cast<float>(i % 5),
                      .top_k = i % 3 * 50,
                      .top_p = i % 2 ? 0.9f : 1.0f,
                      .seed = static_cast<uint64_t>(i),
                      .token_index = static_cast<uint32_t>(i * i)});
    }
    const auto together = SampleRows(*backend, logits, rows);
    std::set<int32_t> distinct;
    for (size_t i = 0; i < rows.size(); ++i) {
      const SampledToken alone = SampleRowOf(*backend, logits, rows[i]);
      EXPECT_EQ(alone.id, together[i].id);
      EXPECT_EQ(alone.logprob, together[i].logprob);
      distinct.insert(alone.id);
    }
    EXPECT_GT(distinct.size(), 20u);  // and the seeds do matter
  }
}

TEST(SamplingTest, EveryWordOfTheStateMatters) {
  const std::vector<float> logits(5000, 0.0f);
  const SampleRow rows[] = {
      {.temperature = 1, .seed = 1, .choice = 1, .token_index = 1},
      {.temperature = 1, .seed = 2, .choice = 1, .token_index = 1},
      {.temperature = 1, .seed = 1 + (uint64_t{1} << 40), .choice = 1, .token_index = 1},
      {.temperature = 1, .seed = 1, .choice = 2, .token_index = 1},
      {.temperature = 1, .seed = 1, .choice = 1, .token_index = 2},
  };
  for (const auto& backend : BothBackends()) {
    std::set<int32_t> ids;
    for (const SampleRow& row : rows) ids.insert(SampleRowOf(*backend, logits, row).id);
    EXPECT_EQ(ids.size(), 5u);
  }
}

TEST(SamplingTest, GreedyTakesTheLowestOfEquals) {
  for (const auto& backend : BothBackends()) {
    std::vector<float> logits(100, 1.0f);
    logits[37] = logits[38] = logits[99] = 2.0f;
    EXPECT_EQ(SampleRowOf(*backend, logits, {}).id, 37);
    EXPECT_EQ(SampleRowOf(*backend, logits, {}).top1, 37);
    const int32_t history[] = {37, 37, 99};
    const SampledToken token =
        SampleRowOf(*backend, logits, {.repetition_penalty = 1.5f, .history = history});
    EXPECT_EQ(token.id, 38);
    EXPECT_EQ(token.top1, 37);  // of the raw logits
    // Negative logits are multiplied.
    std::fill(logits.begin(), logits.end(), -1.0f);
    logits[5] = -0.9f;
    const int32_t five[] = {5};
    EXPECT_EQ(SampleRowOf(*backend, logits, {.repetition_penalty = 1.2f, .history = five}).id, 0);
    EXPECT_EQ(SampleRowOf(*backend, logits, {.repetition_penalty = 1.1f, .history = five}).id, 5);
    EXPECT_EQ(SampleRowOf(*backend, logits, {.temperature = 1e-6f}).id, 5);
  }
}

TEST(SamplingTest, BiasesMoveTheChoiceAndNotTheLogProbability) {
  const std::vector<float> logits = {1, 3, 2.5f, 0};
  const std::vector<int32_t> history = {2};
  for (const auto& backend : BothBackends()) {
    const SampledToken plain = SampleRowOf(*backend, logits, {});
    EXPECT_EQ(plain.id, 1);
    const std::vector<LogitBias> less = {{1, -1}}, never = {{1, -INFINITY}, {2, -INFINITY}};
    const SampledToken second = SampleRowOf(*backend, logits, {.biases = less});
    EXPECT_EQ(second.id, 2);
    EXPECT_EQ(second.top1, 1);
    EXPECT_NEAR(second.logprob, plain.logprob - 0.5, 1e-6);
    // After the repetition penalty: 2.5 / 2 falls below 3 - 1.
    EXPECT_EQ(
        SampleRowOf(*backend, logits, {.repetition_penalty = 2, .history = history, .biases = less})
            .id,
        1);
    EXPECT_EQ(Reached(*backend, logits, {.temperature = 50, .biases = never}),
              (std::set<int32_t>{0, 3}));
    EXPECT_EQ(SampleRowOf(*backend, logits, {.biases = less, .target = 1}).logprob, plain.logprob);
  }
}

TEST(SamplingTest, KeptSetsAtTheirEdges) {
  // Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 of ids 2, 0, 4, 1, 3, in units that float32 holds to
  // 1e-8.
  const auto log2 = [](int exponent) { return static_cast<float>(exponent * M_LN2); };
  const std::vector<float> logits = {log2(-2), log2(-4), log2(-1), log2(-4), log2(-3)};
  using Ids = std::set<int32_t>;
  for (const auto& backend : BothBackends()) {
    SCOPED_TRACE(backend->name());
    const auto reached = [&](SampleRow row) {
      row.temperature = 1;
      return Reached(*backend, logits, row);
    };
    EXPECT_EQ(reached({}), (Ids{0, 1, 2, 3, 4}));
    EXPECT_EQ(reached({.top_k = 5}), (Ids{0, 1, 2, 3, 4}));
    EXPECT_EQ(reached({.top_k = 1000}), (Ids{0, 1, 2, 3, 4}));
    EXPECT_EQ(reached({.top_k = 1}), (Ids{2}));
    EXPECT_EQ(reached({.top_k = 4}), (Ids{0, 1, 2, 4}));  // of equals the lower id
    EXPECT_EQ(reached({.top_p = 0}), (Ids{2}));
    EXPECT_EQ(reached({.top_p = 0.49f}), (Ids{2}));
    EXPECT_EQ(reached({.top_p = 0.51f}), (Ids{0, 2}));
    EXPECT_EQ(reached({.top_p = 0.76f}), (Ids{0, 2, 4}));
    EXPECT_EQ(reached({.top_p = 0.93f}), (Ids{0, 1, 2, 4}));
    EXPECT_EQ(reached({.top_p = 0.95f}), (Ids{0, 1, 2, 3, 4}));
    // top_p is a share of what top_k left: 4/7, 2/7, 1/7.
    EXPECT_EQ(reached({.top_k = 3, .top_p = 0.56f}), (Ids{2}));
    EXPECT_EQ(reached({.top_k = 3, .top_p = 0.86f}), (Ids{0, 2, 4}));
    EXPECT_EQ(reached({.min_p = 1}), (Ids{2}));
    EXPECT_EQ(reached({.min_p = 0.51f}), (Ids{2}));
    EXPECT_EQ(reached({.min_p = 0.49f}), (Ids{0, 2}));
    EXPECT_EQ(reached({.min_p = 0.12f}), (Ids{0, 1, 2, 3, 4}));
    // and of what min_p left: 2/3, 1/3.
    EXPECT_EQ(reached({.top_p = 0.66f, .min_p = 0.4f}), (Ids{2}));
    EXPECT_EQ(reached({.top_p = 0.67f, .min_p = 0.4f}), (Ids{0, 2}));
  }
}

TEST(SamplingTest, WideTopP) {
  // Needs far more than the first 256 tokens, so the selection has to widen; and a flat
  // distribution is all ties.
  std::mt19937 random(8);
  const auto cpu = MakeCpuBackend(1), oracle = MakeReferenceBackend();
  for (float scale : {0.0f, 0.2f, 1.0f}) {
    const std::vector<float> logits = RandomLogits(random, 20000, scale);
    for (float top_p : {0.5f, 0.9f, 0.9999f}) {
      for (uint32_t i = 0; i < 5; ++i) {
        const SampleRow row{.temperature = 1, .top_p = top_p, .token_index = i};
        EXPECT_EQ(SampleRowOf(*cpu, logits, row).id, SampleRowOf(*oracle, logits, row).id);
      }
    }
  }
}

TEST(SamplingTest, LogProbIsAccurate) {
  std::mt19937 random(2);
  std::vector<float> logits = RandomLogits(random, 150000, 0.5f);
  for (float& x : logits) x += 1000;  // cancellation in anything but x - max
  const auto cpu = MakeCpuBackend(1);
  double sum = 0;
  for (float x : logits) sum += std::exp(double{x} - 1000);
  for (int32_t target : {0, 77, 149999}) {
    const double want = logits[target] - 1000.0 - std::log(sum);
    EXPECT_NEAR(SampleRowOf(*cpu, logits, {.target = target}).logprob, want, 2e-6);
  }
}

TEST(SamplingTest, NonFiniteLogits) {
  for (const auto& backend : BothBackends()) {
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      for (int at : {0, 50, 99}) {
        std::vector<float> logits(100, 1.0f);
        logits[60] = 3.0f;
        logits[at] = bad;
        const int32_t history[] = {at, 60};
        for (const SampleRow& row :
             {SampleRow{}, SampleRow{.temperature = 1},
              SampleRow{.temperature = 1, .top_k = 3, .top_p = 0.5f, .min_p = 0.1f},
              SampleRow{.repetition_penalty = 2, .history = history}}) {
          const SampledToken token = SampleRowOf(*backend, logits, row);
          EXPECT_FALSE(token.finite);
          EXPECT_EQ(token.id, bad == INFINITY ? at : 60);
          EXPECT_EQ(token.top1, token.id);
        }
      }
    }
    const SampledToken token =
        SampleRowOf(*backend, std::vector<float>(20, NAN), {.temperature = 1});
    EXPECT_FALSE(token.finite);
    EXPECT_EQ(token.id, 0);
  }
}

// Finite logits that overflow on the way.
TEST(SamplingTest, Overflow) {
  for (const auto& backend : BothBackends()) {
    std::vector<float> logits(10, 1e36f);
    logits[4] = 2e36f;
    EXPECT_EQ(SampleRowOf(*backend, logits, {.temperature = 1e-4f}).id,
              0);  // all infinite: all equal
    EXPECT_EQ(SampleRowOf(*backend, logits, {.temperature = 1}).id, 4);
    logits.assign(10, -3e38f);
    const int32_t history[] = {0};
    EXPECT_NE(SampleRowOf(*backend, logits,
                          {.temperature = 1, .repetition_penalty = 10, .history = history})
                  .id,
              0);
  }
}

}  // namespace
}  // namespace octavo
