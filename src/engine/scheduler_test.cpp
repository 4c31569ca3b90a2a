#include "engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace octavo {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;

// A scheduler over a pool of `pages` pages of one full-attention layer; the "model" appends
// token 7.
class Simulation {
 public:
  Simulation(int64_t pages, const SchedulerLimits& limits)
      : limits_(limits),
        geometry_(
            MakeGroups(std::vector<KvLayerFacts>{{.window = 0, .kv_heads = 1, .head_dim = 64}},
                       std::vector<LayerFormat>(1), pages * kPage)),
        arena_(nullptr, pages * kPage, geometry_),
        pool_(&arena_, {}),
        scheduler_(pool_, limits) {}

  // Its tokens: all `token`, or a token of its own.
  void Add(int prompt, int output, int32_t token = 0) {
    auto sequence = std::make_unique<Sequence>(pool_);
    sequence->id = ++last_id_;
    sequence->tokens.assign(prompt, token > 0 ? token : 1000 + static_cast<int32_t>(last_id_));
    sequence->prompt_tokens = sequence->next_prompt_logprob = prompt;
    sequence->sampling.max_tokens = output;
    scheduler_.Add(std::move(sequence));
  }

  // A step of which every decoding sequence that is still running is a part, and the oldest.
  void RunFairly() {
    const std::set<RequestId> decoding = decoding_;
    const std::vector<RequestId> before = scheduler_.ids();
    const int64_t running = scheduler_.running();
    const Step step = scheduler_.Schedule();
    std::set<RequestId> part;
    for (const Chunk& chunk : step.chunks) part.insert(chunk.id);
    const std::vector<RequestId> after = scheduler_.ids();
    for (int64_t i = 0; i < scheduler_.running(); ++i) {
      ASSERT_TRUE(part.contains(after[i]) || !decoding.contains(after[i])) << after[i];
    }
    if (running > 0) {
      ASSERT_TRUE(part.contains(before[0])) << before[0];
    }
    for (size_t i = scheduler_.running(); i < after.size(); ++i) decoding_.erase(after[i]);
    Finish(step);
  }

  // One step; checks what every step must keep.
  void Run() { Finish(scheduler_.Schedule()); }

  // The same; tokens by sequence.
  std::map<RequestId, int> RunCounts() {
    const Step step = scheduler_.Schedule();
    std::map<RequestId, int> counts;
    for (const Chunk& chunk : step.chunks) counts[chunk.id] += chunk.count;
    Finish(step);
    return counts;
  }

  void Finish(const Step& step) {
    ASSERT_EQ(step.stuck, nullptr);
    ASSERT_LE(step.tokens, limits_.max_num_batched_tokens);
    ASSERT_LE(scheduler_.running(), limits_.max_num_seqs);
    ASSERT_GT(step.tokens, 0) << "no progress";
    int tokens = 0;
    for (const Chunk& chunk : step.chunks) {
      ASSERT_EQ(chunk.begin, chunk.sequence->pages.written());
      ASSERT_GT(chunk.count, 0);
      tokens += chunk.count;
    }
    ASSERT_EQ(tokens, step.tokens);
    scheduler_.Complete(step);
    for (const Chunk& chunk : step.chunks) {
      Sequence& s = *chunk.sequence;
      if (chunk.begin + chunk.count < static_cast<int64_t>(s.tokens.size())) continue;
      s.tokens.push_back(7);
      decoding_.insert(s.id);
      if (s.generated() == s.sampling.max_tokens) {
        decoding_.erase(s.id);
        scheduler_.Remove(s.id);
        ++finished_;
      }
    }
    preempted_ += step.preempted;
  }

  Scheduler& scheduler() { return scheduler_; }
  int64_t held() const { return pool_.held(0); }
  int finished() const { return finished_; }
  int preempted() const { return preempted_; }

 private:
  static constexpr int64_t kPage = 2 * 64 * kPageSize * 2;  // K and V of 64 tokens, bf16

  SchedulerLimits limits_;
  GroupGeometry geometry_;
  Arena arena_;
  BlockPool pool_;
  Scheduler scheduler_;
  RequestId last_id_ = 0;
  std::set<RequestId> decoding_;  // have one token to run
  int finished_ = 0, preempted_ = 0;
};

TEST(SchedulerTest, ChunksAPromptAndFillsTheBudget) {
  Simulation s(64, {.max_num_seqs = 4, .max_num_batched_tokens = 100});
  s.Add(250, 2);
  s.Add(60, 2);
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 100)));
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 100)));
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 50), Pair(2, 50)));
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 1), Pair(2, 10)));
}

TEST(SchedulerTest, ShortPromptsOvertakeInAQuarterOfTheBudget) {
  Simulation s(64, {.max_num_seqs = 4, .max_num_batched_tokens = 100});
  s.Add(1000, 2);
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 100)));
  s.Add(26, 2);  // more than a quarter
  s.Add(20, 2);
  s.Add(6, 3);
  EXPECT_THAT(s.RunCounts(),
              ElementsAre(Pair(1, 80), Pair(3, 20)));  // what is not needed goes back
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 93), Pair(3, 1), Pair(4, 6)));
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 99), Pair(4, 1)));
  s.Add(24, 1);
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 75), Pair(4, 1), Pair(5, 24)));
  EXPECT_THAT(s.RunCounts(), ElementsAre(Pair(1, 100)));
}

TEST(SchedulerTest, OvertakersTakeNoMoreThanAQuarterHoweverMany) {
  Simulation s(200, {.max_num_seqs = 100, .max_num_batched_tokens = 100});
  s.Add(2000, 1);
  s.Run();
  for (int i = 0; i < 60; ++i) s.Add(5, 1000);
  for (int step = 0; step < 20; ++step) EXPECT_GE(s.RunCounts()[1], 75) << step;
}

// What a prefix holds need not be run, so a long conversation is short.
TEST(SchedulerTest, APromptIsAsShortAsWhatIsNotCached) {
  for (const bool caching : {false, true}) {
    Simulation s(64, {.max_num_seqs = 4, .max_num_batched_tokens = 100, .prefix_caching = caching});
    s.Add(130, 1, 9);
    while (s.finished() == 0) s.Run();
    s.Add(1000, 2, 8);
    s.Run();
    s.Add(145, 2, 9);
    const auto counts = s.RunCounts();
    if (caching)
      EXPECT_THAT(counts, ElementsAre(Pair(2, 83), Pair(3, 17)));
    else
      EXPECT_THAT(counts, ElementsAre(Pair(2, 100)));
  }
}

// Whatever arrives: where the budget has a token for each running sequence, every decode gets its
// token in every step, unless it is preempted, and every step brings the oldest one further.
TEST(SchedulerTest, NoDecodeWaitsAndTheOldestAlwaysMoves) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    std::mt19937_64 random(seed);
    const int seqs = 1 + static_cast<int>(random() % 8);
    Simulation s(
        7 + static_cast<int64_t>(random() % 20),
        {.max_num_seqs = seqs, .max_num_batched_tokens = seqs + static_cast<int>(random() % 100)});
    for (int added = 0; added < 20 || !s.scheduler().idle();) {
      if (added < 20 && (random() % 4 == 0 || s.scheduler().idle())) {
        s.Add(1 + static_cast<int>(random() % 300), 1 + static_cast<int>(random() % 100));
        ++added;
      }
      s.RunFairly();
      if (HasFatalFailure()) return;
    }
  }
}

TEST(SchedulerTest, EverySequenceFinishesWhateverTheMemory) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    std::mt19937_64 random(seed);
    // The longest sequence is 300 + 100 tokens, 7 pages: sometimes barely more than that.
    Simulation s(7 + static_cast<int64_t>(random() % 20),
                 {.max_num_seqs = 1 + static_cast<int>(random() % 8),
                  .max_num_batched_tokens = 1 + static_cast<int>(random() % 200)});
    const int count = 20;
    int added = 0;
    for (int step = 0; s.finished() < count; ++step) {
      ASSERT_LT(step, 200'000);
      if (added < count && (random() % 4 == 0 || s.scheduler().idle())) {
        s.Add(1 + static_cast<int>(random() % 300), 1 + static_cast<int>(random() % 100));
        ++added;
      }
      s.Run();
      if (HasFatalFailure()) return;
    }
    EXPECT_EQ(s.held(), 0);
  }
}

TEST(SchedulerTest, PreemptsTheYoungestFirst) {
  Simulation s(8, {.max_num_seqs = 4, .max_num_batched_tokens = 512});
  s.Add(190, 100);
  s.Add(190, 100);
  while (s.finished() == 0) s.Run();
  EXPECT_GT(s.preempted(), 0);
  EXPECT_EQ(s.scheduler().ids(), std::vector<RequestId>{2});
}

TEST(SchedulerTest, ASequenceThatNeverFitsIsNamed) {
  Simulation s(4, {.max_num_seqs = 4, .max_num_batched_tokens = 512});
  s.Add(400, 1);
  const Step step = s.scheduler().Schedule();
  ASSERT_NE(step.stuck, nullptr);
  EXPECT_EQ(step.stuck->id, 1u);
  EXPECT_TRUE(step.chunks.empty());
}

}  // namespace
}  // namespace octavo
