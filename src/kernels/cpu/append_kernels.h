// What the append driver (append.cpp) and its vector code (append_rows.cpp) share.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace octavo::cpu {

inline constexpr int kMaxHeadDim = 1024;

// Consecutive rows of a call that go to consecutive slots of one page.
struct AppendRun {
  int row, count;
  uint32_t page;
  int place;
};

struct AppendJob {
  const AppendArgs* args = nullptr;
  std::vector<AppendRun> runs;
  // Of the norms, [head_dim], offset included; empty: no norm.
  std::vector<float> q_weight, k_weight;
};

// Rows [begin, end) of q: norm and rotation in place.
void AppendQueries(const AppendJob& job, int begin, int end);

// One kv head of one run: K and V into the page, after clearing it if the run begins it.
void AppendKeysAndValues(const AppendJob& job, const AppendRun& run, int head);

// Writes `count` float32 as `format` stores them at scale `scale`, to consecutive elements. For
// tests.
void EncodeElements(KvFormat format, const float* x, int count, float scale, void* to);

}  // namespace octavo::cpu
