// octavo bench decode: how close decode comes to the memory bus, on the machine it runs on, in one
// run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace octavo {

struct DecodeBenchOptions {
  std::string model;  // measured beside the synthetic layers
  std::vector<int64_t> contexts = {1024, 4096, 16384, 32768, 65536};
  std::vector<std::string> formats = {"bf16", "fp8", "int8_per_token_head"};
  int threads = 0;       // 0: all
  double seconds = 0.3;  // least time per measurement
};

struct DecodePoint {
  int64_t context = 0;
  double microseconds =
      0;  // per token (and per layer, for the synthetic layers); the median of many calls
  double gigabytes_per_second = 0;  // cache bytes of the context over that time
};

// microseconds = slope * context + intercept, by least squares.
struct DecodeSeries {
  std::string what;  // "attention" (one synthetic layer) or "model"
  std::string format;
  std::vector<DecodePoint> points;
  double slope = 0, intercept = 0;
  double cache_bytes_per_token = 0;
};

struct DecodeBenchReport {
  int threads = 0;
  double read_gigabytes_per_second = 0;    // this machine, same thread count, same run
  double matvec_gigabytes_per_second = 0;  // [4096, 4096] bfloat16 weights times one row
  std::vector<DecodeSeries> series;
};

DecodeBenchReport BenchDecode(const DecodeBenchOptions& options);
std::string DecodeBenchTable(const DecodeBenchReport& report);
std::string DecodeBenchJson(const DecodeBenchReport& report);

}  // namespace octavo
