// A request in flight: its tokens, how far its keys and values are in the cache, and its pages. Belongs to the scheduler;
// the engine's loop thread is the only one to touch it.
#pragma once

#include <cstdint>
#include <vector>

#include "kv/block_pool.h"
#include "octavo/engine.h"

namespace octavo {

struct Sequence {
  explicit Sequence(BlockPool& pool) : pages(pool) {}

  RequestId id = 0;
  SamplingParams sampling;
  uint64_t seed = 0;
  Engine::Callback callback;

  std::vector<int32_t> tokens;  // prompt, then output
  int64_t prompt_tokens = 0;
  int64_t computed = 0;         // tokens whose keys and values are in the cache
  int64_t cached = 0;           // of the prompt, at admission, from the prefix cache
  int64_t next_prompt_logprob = 0;  // position of the next prompt token whose log-probability is to be computed,
  int64_t next_reported = 0;        // and to be reported
  SequencePages pages;

  int64_t generated() const { return static_cast<int64_t>(tokens.size()) - prompt_tokens; }
};

}  // namespace octavo
