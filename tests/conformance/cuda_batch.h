// A paged cache on the device with random contents, and attention steps over it: what attention
// conformance and accuracy are checked with.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda_memory.h"
#include "octavo/attention.h"

namespace octavo::conformance {

using cuda::AttentionMath;

struct CacheSpec {
  KvFormat k_format = KvFormat::kBF16, v_format = KvFormat::kBF16;
  int kv_heads = 2, head_dim = 64;
  std::vector<int> lengths;  // tokens of each sequence
  float v_mean = 0;
  int nan_sequence = -1;  // its tokens 3 and 70 hold NaN
  uint64_t seed = 1;
};

// Pages in random order in an arena between guard bytes, which starts as 0xFF; every page first
// belongs to a sequence of NaN.
class DeviceCache {
 public:
  explicit DeviceCache(const CacheSpec& spec);

  KvLayer layer() const;
  cuda::BlockTable block_table() const { return {table_.as<uint32_t>(), stride_}; }
  const CacheSpec& spec() const { return spec_; }
  bool intact() const { return arena_.intact() && saturated_.intact(); }
  const std::vector<uint32_t>& table() const { return host_table_; }
  int64_t stride() const { return stride_; }
  const DeviceBuffer& arena() const { return arena_; }

  // Appends, once more, tokens [begin, end) of each sequence, with queries: fills q_out and so on.
  struct Tokens {
    int sequence, begin, end;
  };
  void Append(const std::vector<Tokens>& ranges, cuda::AppendCall call) const;

 private:
  CacheSpec spec_;
  KvLayout layout_;
  int64_t page_bytes_ = 0, stride_ = 0;
  std::vector<uint32_t> host_table_;
  std::vector<int64_t> first_row_;  // of each sequence in k_ and v_
  DeviceBuffer arena_, table_, k_, v_, k_scale_, v_scale_, saturated_;
};

struct StepSpec {
  int group = 2;
  int window = 0;
  bool sinks = false;
  float soft_cap = 0;
  AttentionMath math = AttentionMath::k16Bit;
  bool deterministic = false;
  int64_t widened_bytes = int64_t{256} << 20;
  float q_deviation = 1;
  std::vector<int> tokens;  // the last ones of each sequence, 0: none
  uint64_t seed = 1;
};

// Rows are [tokens of the step, heads].
struct Result {
  std::vector<double> out, lse;
  std::string failure;  // memory that was written and should not have been
};

struct Comparison {
  double relative_l2 = 0, worst_row = 0;  // of rows that are finite on both sides
  double lse = 0;                         // largest difference
  bool finite_alike = true;
};
Comparison Compare(const Result& actual, const Result& expected, int head_dim);

class DeviceStep {
 public:
  DeviceStep(const DeviceCache& cache, const StepSpec& spec);

  Result Run();  // cuda::Attention
  // On the queries that the kernels see, or on those before any rounding to FP8.
  Result Oracle(bool exact_queries = false);
  const std::vector<uint16_t>& queries();

  // Sequences of at most the cache's lengths, for the next Plan.
  void Shorten(const std::vector<int>& lengths) { kv_len_.assign(lengths.begin(), lengths.end()); }
  // The parts of Run, for graphs.
  void Plan();
  void Launch(cuda::Stream stream);
  Result Download();

  int rows() const { return rows_; }
  const StepSpec& spec() const { return spec_; }

 private:
  const DeviceCache& cache_;
  StepSpec spec_;
  int rows_ = 0, heads_;
  std::vector<int32_t> q_begin_, kv_len_;
  cuda::AttentionShape shape_;
  std::unique_ptr<cuda::AttentionPlan> plan_;
  DeviceBuffer q_, q_out_, q_fp8_, q_scale_, sinks_, out_, lse_;
  std::vector<uint16_t> host_queries_;
};

}  // namespace octavo::conformance
