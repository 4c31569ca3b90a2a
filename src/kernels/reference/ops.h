// Every op but attention (attention.h) as plain loops in double precision, rounded once where T is
// stored: the oracle that every backend is compared with. One thread.
#pragma once

#include "kernels/backend.h"

namespace octavo::reference {

void Gather(const GatherArgs& args);
void Norm(const NormArgs& args);
void MatMul(const MatMulArgs& args);
void GatedActivation(const GatedActivationArgs& args);
void Route(const RouteArgs& args);
void Experts(const ExpertsArgs& args);
void Sample(const SampleArgs& args);

}  // namespace octavo::reference
