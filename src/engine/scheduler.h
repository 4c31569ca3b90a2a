// The scheduler decides which tokens of which sequences run next. Pure: no threads, no clock, no
// model; all it touches is its queues and the block pool.
//
// First come, first served. Each step has a budget of tokens: running sequences come first, in
// order of arrival (a decode takes one token, a prompt a chunk of what is left), then waiting ones
// join while budget, sequence slots and pages last. When pages run out, the youngest running
// sequence is preempted: it gives its pages back and waits, in front, to be recomputed. The oldest
// sequence is therefore never preempted while others run, so every sequence finishes.
//
// Short prompts overtake: a prompt that needs more than one step leaves a quarter of the budget to
// decodes and to waiting prompts that need no more than is left of that. It takes a third longer at
// most; they need not wait for its end.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/sequence.h"
#include "kv/block_pool.h"

namespace octavo {

struct Chunk {
  Sequence* sequence = nullptr;
  RequestId id = 0;   // the sequence's
  int64_t begin = 0;  // first token of the sequence to run
  int count = 0;
};

struct Step {
  std::vector<Chunk> chunks;
  int tokens = 0;
  int preempted = 0;
  Sequence* stuck = nullptr;  // alone, and yet the cache cannot hold it: the engine fails it
};

struct SchedulerLimits {
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  bool prefix_caching = true;
};

class Scheduler {
 public:
  Scheduler(BlockPool& pool, const SchedulerLimits& limits) : pool_(pool), limits_(limits) {}

  void Add(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

  Step Schedule();

  // The step ran: counts its tokens as computed, shares full pages, frees those behind windows.
  void Complete(const Step& step);

  // Takes a sequence out, its pages given back; null if not here. Not between Schedule and
  // Complete.
  std::unique_ptr<Sequence> Remove(RequestId id);

  int64_t running() const { return static_cast<int64_t>(running_.size()); }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  bool idle() const { return running_.empty() && waiting_.empty(); }
  std::vector<RequestId> ids() const;

 private:
  // Pages for `count` more tokens of running_[i], preempting younger ones if need be. False:
  // running_[i] itself had to go.
  bool MakeRoom(size_t i, int count, Step& step);
  void Preempt(Step& step);
  // Of waiting_[i], tokens that no cached prefix holds.
  int64_t Uncached(size_t i) const;
  // The first of waiting_[from ...] with at most `most` such tokens; null: none may join.
  std::optional<size_t> FindShort(size_t from, int64_t most) const;
  bool Admit(size_t i, Step& step);

  BlockPool& pool_;
  SchedulerLimits limits_;
  std::vector<std::unique_ptr<Sequence>> running_;  // by arrival
  std::deque<std::unique_ptr<Sequence>> waiting_;
};

}  // namespace octavo
