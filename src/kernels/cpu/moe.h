// Mixture of experts on the CPU: the router's choice, and the experts as matrix products over the
// rows that chose them.
#pragma once

#include "base/thread_pool.h"
#include "kernels/backend.h"
#include "kernels/cpu/scratch.h"

namespace octavo::cpu {

void Route(const RouteArgs& args, ThreadPool& pool);

struct ExpertsScratch {
  Scratch order, x, gate, up, down, sums, widened;
};
void Experts(const ExpertsArgs& args, ThreadPool& pool, ExpertsScratch& scratch);

}  // namespace octavo::cpu
