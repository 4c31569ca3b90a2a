// Gather, norm and gated activation on the CPU (Highway). A row is computed by one thread, in the
// same way wherever it stands.
#pragma once

#include "base/thread_pool.h"
#include "kernels/backend.h"

namespace octavo::cpu {

void Gather(const GatherArgs& args, ThreadPool& pool);
void Norm(const NormArgs& args, ThreadPool& pool);
void GatedActivation(const GatedActivationArgs& args, ThreadPool& pool);

// Columns [begin, end) of all rows, on the calling thread.
void GatedActivationBlock(const GatedActivationArgs& args, int64_t begin, int64_t end);

}  // namespace octavo::cpu
