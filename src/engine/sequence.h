// A request in flight: its tokens and its pages, which know how many tokens have keys and values
// (pages.written()). Belongs to the scheduler; the engine's loop thread is the only one to touch
// it.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "kernels/backend.h"
#include "kv/block_pool.h"
#include "octavo/engine.h"

namespace octavo {

struct Sequence {
  explicit Sequence(BlockPool& pool) : pages(pool.Acquire({})) {}

  RequestId id = 0;
  SamplingParams sampling;  // with a seed
  Engine::Callback callback;

  std::vector<int32_t> tokens;  // prompt, then output
  int64_t prompt_tokens = 0;
  std::map<int32_t, int> output_counts;  // kept if a penalty asks for it
  std::vector<LogitBias> biases;         // of the next token
  int64_t prompt_done = 0;               // of the prompt, computed at least once
  // Of the prompt, from the prefix cache at first admission: later ones find the sequence's own
  // pages.
  std::optional<int64_t> cached;
  // Position of the next prompt token whose log-probability is to be computed, and to be reported.
  int64_t next_prompt_logprob = 0, next_reported = 0;
  // When it was submitted, in its first step, and gave tokens; what has not been is none.
  using Time = std::optional<std::chrono::steady_clock::time_point>;
  Time submitted, scheduled, first_token, last_token;
  SequencePages pages;

  int64_t generated() const { return static_cast<int64_t>(tokens.size()) - prompt_tokens; }
};

}  // namespace octavo
