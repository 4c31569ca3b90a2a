// Attention over a paged cache on the CPU (Highway). An output row's bits depend on the row's
// query, its visible keys and values and nothing else: not on the other rows of the call, the
// chunk, the plan or the number of threads.
#pragma once

#include "base/tensor.h"
#include "base/thread_pool.h"
#include "kernels/attention_work.h"

namespace octavo::cpu {

class WorkPlan final : public AttentionPlan {
 public:
  WorkPlan(const AttentionShape& shape, int threads) : AttentionPlan(shape), threads_(threads) {}
  void Make(const BatchView& batch) override;
  const AttentionWork& work() const { return work_; }

 private:
  int threads_;
  AttentionWork work_;
};

// `args.plan` is a WorkPlan. `workspace` is grown as needed and may be reused by any later call;
// its contents mean nothing between calls.
void Attention(const AttentionArgs& args, ThreadPool& pool, Buffer& workspace);

}  // namespace octavo::cpu
