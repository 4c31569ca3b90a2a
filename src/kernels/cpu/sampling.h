// Sampling on the CPU: kernels/sampling.h says what is computed. A row is one thread's work.
#pragma once

#include <vector>

#include "base/thread_pool.h"
#include "kernels/backend.h"

namespace octavo::cpu {

struct Candidate {
  float logit = 0;
  int32_t id = 0;
};

// What a thread keeps between rows.
struct SampleWorker {
  std::vector<Candidate> candidates;  // best first
  std::vector<Candidate> adjusted;    // tokens with their logits before penalty and bias
  std::vector<float> scaled;          // logits over temperature
  std::vector<float> probabilities;   // exp(scaled - max)
  std::vector<uint64_t> seen;         // a bit per token, all clear between rows
};

void Sample(const SampleArgs& args, ThreadPool& pool, std::vector<SampleWorker>& workers);

}  // namespace octavo::cpu
