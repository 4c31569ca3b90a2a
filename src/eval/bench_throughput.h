// octavo bench throughput: many requests at once, offline. Every variant of the cache runs the same
// requests over the same weights, one variant after another, each with as many bytes of cache as
// the first: a smaller format holds more sequences.
//
// All requests are submitted at once and generate exactly as many tokens as they were asked for,
// greedily. Prefix caching is off, so that every prompt is computed whole. Before the clock starts
// one short request loads kernels and weights.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "models/spec.h"
#include "octavo/engine.h"

namespace octavo {

struct ThroughputBenchOptions {
  EngineOptions engine{.max_num_seqs = 256};
  std::vector<std::string> variants = {"bf16", "fp8"};  // eval/variant.h
  // A prompt per line, in a file named .jsonl per object's "prompt"; empty: random token ids.
  std::string dataset;
  int64_t input_len = 512;        // tokens of a random prompt
  int output_len = 128;           // tokens
  int num_prompts = 0;            // 0: 64 random ones, or all of the dataset's; else the first
  double random_range_ratio = 0;  // r in [0, 1): lengths are drawn from (1 - r) to (1 + r) times
  uint64_t seed = 1;
};

struct ThroughputVariant {
  std::string name;
  double seconds = 0;
  int64_t requests = 0, prompt_tokens = 0, output_tokens = 0;
  int64_t preemptions = 0, peak_running = 0;
  int64_t cache_bytes = 0, cache_tokens = 0;  // cache_tokens: in sequences of the longest request

  double PerSecond(int64_t count) const { return static_cast<double>(count) / seconds; }
  int64_t tokens() const { return prompt_tokens + output_tokens; }
};

struct ThroughputReport {
  std::string model, device;
  std::vector<ThroughputVariant> variants;
};

// Errors name the flag, or the dataset's line.
std::vector<Request> ThroughputRequests(const ThroughputBenchOptions& options,
                                        const ModelSpec& spec);

using ThroughputProgress = std::function<void(int done, int all)>;
// Error: a request that fails, because the cache cannot hold it or the logits are not finite.
ThroughputReport BenchThroughput(const ThroughputBenchOptions& options,
                                 const ThroughputProgress& progress = nullptr);

std::string ThroughputTable(const ThroughputReport& report);
std::string ThroughputJson(const ThroughputReport& report);

}  // namespace octavo
