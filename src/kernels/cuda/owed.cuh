// What an op leaves to whoever reads its output first: terms to be added to it.
#pragma once

#include "kernels/cuda/ops.h"
#include "kernels/cuda/vector8.cuh"

namespace octavo::cuda {

// Eight columns of `count` terms, `stride` apart, added in order; several are on their way at once.
__device__ __forceinline__ Vector8 SumOfTerms(const float* terms, int count, int64_t stride) {
  constexpr int kAtOnce = 4;
  Vector8 sum{};
  for (int first = 0; first < count; first += kAtOnce) {
    Vector8 more[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k < count) more[k] = Load8(terms + (first + k) * stride);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k >= count) break;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum.v[j] += more[k].v[j];
    }
  }
  return sum;
}

}  // namespace octavo::cuda
