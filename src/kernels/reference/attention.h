// Attention, append and rope as plain loops in double precision, decoding and rounding by
// base/float_bits.h: the oracle that every backend is compared with. One thread.
#pragma once

#include "kernels/backend.h"

namespace octavo::reference {

void RopeTable(const RopeTableArgs& args);
void Append(const AppendArgs& args);

// Reads the plan's shape and none of its items.
void Attention(const AttentionArgs& args);

}  // namespace octavo::reference
