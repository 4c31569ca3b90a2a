// Attention over a paged cache on the CPU (Highway). An output row's bits depend on the row's
// query, its visible keys and values and nothing else: not on the other rows of the call, the
// chunk, the plan or the number of threads.
#pragma once

#include "base/tensor.h"
#include "base/thread_pool.h"
#include "kernels/backend.h"

namespace octavo::cpu {

AttentionPlan PlanAttention(const AttentionShape& shape, const BatchView& batch, int threads);

// `workspace` is grown as needed and may be reused by any later call; its contents mean nothing
// between calls.
void Attention(const AttentionArgs& args, ThreadPool& pool, Buffer& workspace);

}  // namespace octavo::cpu
