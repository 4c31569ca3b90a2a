// Splitting rows over the threads of a pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "base/thread_pool.h"

namespace octavo::cpu {

// Waking a pool costs some microseconds: less work than this (in elements streamed) is done by the
// caller alone.
inline constexpr int64_t kMinParallelElements = 32 * 1024;

// f(begin, end, thread) for ranges of rows that cover [0, rows). Which ranges depends on the number
// of threads: f must not care.
template <class F>
void ForRows(ThreadPool& pool, int64_t rows, int64_t columns, const F& f) {
  if (rows <= 1 || pool.threads() == 1 || rows * columns < kMinParallelElements) {
    if (rows > 0) f(int64_t{0}, rows, 0);
    return;
  }
  const int64_t blocks = std::min<int64_t>(rows, 4 * pool.threads());
  const auto run = [&](int64_t block, int thread) {
    f(rows * block / blocks, rows * (block + 1) / blocks, thread);
  };
  pool.ForEach(blocks, std::ref(run));  // std::ref: the std::function made of it does not allocate
}

}  // namespace octavo::cpu
