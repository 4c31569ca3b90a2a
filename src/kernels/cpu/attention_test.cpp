#include "kernels/cpu/attention.h"

#include <gtest/gtest.h>

#include <cstdio>

#include "../tests/conformance/attention_cases.h"
#include "kernels/cpu/append.h"
#include "kernels/reference/attention.h"

namespace octavo {
namespace {

using conformance::AttentionCase;
using conformance::AttentionOps;

AttentionOps ReferenceOps() {
  return {reference::Append,
          [](const AttentionShape& shape, const BatchView&) {
            AttentionPlan plan;
            plan.shape = shape;
            return plan;
          },
          reference::Attention};
}

// The CPU's operations on a pool of threads; `plan_threads` may promise more than there are, to force splits.
class CpuOps {
 public:
  explicit CpuOps(int threads, int plan_threads = 0)
      : pool_(threads), plan_threads_(plan_threads > 0 ? plan_threads : threads) {}
  AttentionOps ops() {
    return {[this](const AppendArgs& args) { cpu::Append(args, pool_); },
            [this](const AttentionShape& shape, const BatchView& batch) {
              return cpu::PlanAttention(shape, batch, plan_threads_);
            },
            [this](const AttentionArgs& args) { cpu::Attention(args, pool_, workspace_); }};
  }

 private:
  ThreadPool pool_;
  int plan_threads_;
  Buffer workspace_;
};

TEST(Attention, AgreesWithTheReference) {
  CpuOps cpu(2);
  double worst[2] = {}, worst_row[2] = {};
  for (const AttentionCase& c : conformance::AttentionCases()) {
    const conformance::Outcome outcome = RunAttentionCase(c, ReferenceOps(), cpu.ops());
    EXPECT_EQ(outcome.failure, "") << c.Name();
    const int i = c.dtype == DType::kBF16;
    worst[i] = std::max(worst[i], outcome.difference.nmse);
    worst_row[i] = std::max(worst_row[i], outcome.difference.worst_row);
  }
  std::printf("worst NMSE float32 %.2e (row %.2e), bfloat16 %.2e (row %.2e)\n", worst[0], worst_row[0], worst[1],
              worst_row[1]);
}

}  // namespace
}  // namespace octavo
