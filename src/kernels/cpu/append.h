// Rope angles, and the append: norm and rotation of Q and K, quantisation of K and V into their
// pages (Highway). The stored bytes are those of base/float_bits.h.
#pragma once

#include "base/thread_pool.h"
#include "kernels/backend.h"

namespace octavo::cpu {

void RopeTable(const RopeTableArgs& args, ThreadPool& pool);
void Append(const AppendArgs& args, ThreadPool& pool);

}  // namespace octavo::cpu
