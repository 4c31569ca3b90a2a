// The work that attention_bench measures. The rows of one vector are measured in turn.
#pragma once

#include <vector>

#include "measure.h"
#include "octavo/attention.h"

namespace octavo::bench {

inline constexpr int kHeads = 32, kKvHeads = 8;            // unless a row says otherwise
inline constexpr int64_t kColdBytes = int64_t{240} << 20;  // four times L2

std::string AppendName(int tokens, int head_dim);
std::vector<Row> AppendRows(int tokens, int head_dim);

// What a layer of Llama-3.1-8B multiplies `rows` rows with.
std::vector<Row> MatMulRows(int rows);

// Norm, gated activation and routing of `rows` rows.
std::vector<Row> ElementwiseRows(int rows);

// The experts of one layer of gpt-oss-20b and Qwen3-30B-A3B, for `rows` rows.
std::vector<Row> ExpertRows(int rows);

// Sampling `rows` rows, the host's part and the wait for the results included: measured already.
std::vector<Row> SampleRows(int rows);

// One step of attention over a cache of random numbers.
struct AttentionSpec {
  std::string group, name;
  int heads = kHeads, kv_heads = kKvHeads, head_dim = 128;
  int window = 0;
  bool deterministic = false;
  std::vector<int> tokens, lengths;  // of each sequence
};
struct Numbers {
  KvFormat format;
  cuda::AttentionMath math;
};
// A row for each of `numbers`; those that the library has no kernel for are left out, with a line.
std::vector<Row> AttentionRows(const AttentionSpec& spec, const std::vector<Numbers>& numbers);

}  // namespace octavo::bench
