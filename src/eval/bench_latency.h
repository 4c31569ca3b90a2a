// octavo bench latency: one request at a time, from short to long prompts, in several variants that
// take turns; fits ITL = slope * context + intercept and TTFT = a L^2 + b L + c, and says from
// which length on a variant is faster than the first.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "eval/fit.h"
#include "octavo/engine.h"

namespace octavo {

struct LatencyBenchOptions {
  EngineOptions engine;
  std::vector<std::string> variants = {"bf16", "fp8"};  // eval/variant.h
  std::vector<int64_t> input_lens = {256, 1024, 4096, 16384, 32768, 65536, 125000};  // tokens
  int output_len = 128;                                                              // tokens
  int repeats = 3;
  uint64_t seed = 1;
};

// A figure and its 95 % interval.
struct Estimate {
  double value = 0;
  Interval interval;
};

struct LatencyVariant {
  std::string name;
  double cache_bytes_per_token = 0;  // of full-attention layers
  // By input length, a measurement per repeat: seconds, the median ITL of the request.
  std::vector<std::vector<Measurement>> ttft, itl;  // x: input tokens; mean context of the output
  Estimate slope, intercept;                        // seconds per token, seconds
  Estimate ttft_a, ttft_b, ttft_c;
  // Against the first variant.
  Estimate slope_ratio, intercept_difference, ttft_a_ratio;
  Estimate break_even;  // tokens; infinite: never faster; 0: always
};

struct LatencyReport {
  std::string model, device;
  int output_len = 0, repeats = 0;
  double read_bandwidth = 0;          // bytes per second
  double weight_bytes_per_token = 0;  // what one decode step reads of the weights
  std::vector<LatencyVariant> variants;
};

using LatencyProgress = std::function<void(int done, int all)>;
LatencyReport BenchLatency(const LatencyBenchOptions& options,
                           const LatencyProgress& progress = nullptr);

std::string LatencyTable(const LatencyReport& report);
std::string LatencyJson(const LatencyReport& report);
std::string LatencyHtml(const LatencyReport& report);

}  // namespace octavo
