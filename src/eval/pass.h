// One sequence through an executor, chunk by chunk and outside any scheduler: for evaluations that
// want every row's logits, or what a step leaves in the cache.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/executor.h"

namespace octavo {

class Pass {
 public:
  explicit Pass(Executor& executor);  // which must outlive it

  // The next `count` tokens of the sequence, which begins with `ids`. The last `rows` logits of
  // them, soft-capped, [rows, vocab], are appended to `logits`. Error: the cache is full.
  void Run(std::span<const int32_t> ids, int count, int rows = 0,
           std::vector<float>* logits = nullptr, const StepObserver& observer = {});

  int64_t written() const { return pages_.written(); }
  const SequencePages& pages() const { return pages_; }

 private:
  Executor& executor_;
  Batch batch_;
  SequencePages pages_;
};

}  // namespace octavo
