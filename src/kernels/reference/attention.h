// Attention, append and rope as plain loops in double precision, decoding and rounding by base/float_bits.h: the oracle
// that every backend is compared with. One thread.
#pragma once

#include "kernels/backend.h"

namespace octavo::reference {

void RopeTable(const RopeTableArgs& args);
void Append(const AppendArgs& args);

// Needs no plan: `args.plan` may be null.
void Attention(const AttentionArgs& args);

}  // namespace octavo::reference
