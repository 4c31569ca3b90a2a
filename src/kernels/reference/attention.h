// Attention, append and rope as plain loops in double precision, decoding and rounding by
// base/float_bits.h: the oracle that every backend is compared with. One thread.
#pragma once

#include "kernels/backend.h"

namespace octavo::reference {

void RopeTable(const RopeTableArgs& args);
void Append(const AppendArgs& args);

class NoPlan final : public AttentionPlan {  // one thread has nothing to share out
 public:
  using AttentionPlan::AttentionPlan;
  void Make(const BatchView&) override {}
};
void Attention(const AttentionArgs& args);

}  // namespace octavo::reference
