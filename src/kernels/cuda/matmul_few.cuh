// Products of few rows with a stream of weights: 16 rows of the weights (outputs) are the rows of
// A of mma.m16n8k16, 8 rows of x the columns of B.
//
// A lane reads eight neighbouring elements of k of the weight rows lane/4 and lane/4 + 8, and of
// the row of x lane/4: 16 bytes each, and whatever order mma gives the eight, weights and x share
// it. So nothing is transposed or exchanged, and a warp takes 32 of k per step. The warps of a
// block share k out in turn and add up at the end, always in the same order.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/vector8.cuh"

namespace octavo::cuda {

inline constexpr int kFewWarps = 8;
inline constexpr int kFewOuts = 16;       // outputs of a block
inline constexpr int kFewStepK = 32;      // of k, of one warp
inline constexpr int kFewAhead = 4;       // steps whose weights are on their way: 4 KiB per warp
inline constexpr int kFewAheadOfTwo = 2;  // the same, of two matrices

// Weights pass through once.
__device__ __forceinline__ uint4 LoadWeights(const BFloat16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// sums[n] += weights[16 outs, k] . x[8 n + 8 rows, k]
__device__ __forceinline__ void FewProduct(float (&sums)[4], const uint4& low, const uint4& high,
                                           const uint4& x) {
  MmaBF16(sums, low.x, high.x, low.y, high.y, x.x, x.y);
  MmaBF16(sums, low.z, high.z, low.w, high.w, x.z, x.w);
}

// This lane's eight elements of x; float32 ones as the sum of two bfloat16.
template <class X>
struct FewX;
template <>
struct FewX<BFloat16> {
  uint4 x{};
  __device__ void Load(const BFloat16* p) { x = *reinterpret_cast<const uint4*>(p); }
  __device__ void Multiply(float (&sums)[4], const uint4& low, const uint4& high) const {
    FewProduct(sums, low, high, x);
  }
};
template <>
struct FewX<float> {
  uint4 x{}, rest{};
  __device__ void Load(const float* p) {
    const Vector8 v = Load8(p);
    Vector8 difference;
    alignas(16) BFloat16 rounded[8], remainder[8];
    Store8(rounded, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) difference.v[i] = v.v[i] - ToFloat(rounded[i]);
    Store8(remainder, difference);
    x = *reinterpret_cast<const uint4*>(rounded);
    rest = *reinterpret_cast<const uint4*>(remainder);
  }
  __device__ void Multiply(float (&sums)[4], const uint4& low, const uint4& high) const {
    FewProduct(sums, low, high, x);
    FewProduct(sums, low, high, rest);
  }
};

// One block's share of k, of 16 outputs of each matrix and 8 * kTiles rows of x. `weights`: row
// `lane / 4` of the 16 at this lane's first element; `high_offset`: from there to the row 8 below
// (0 if there is none). `x_row(n)`: the row of x that this lane reads for tile n, at this lane's
// first element, or null. Inputs() is called once the weights' first loads are on their way.
template <int kAhead, int kMatrices, class X, int kTiles, class XRow, class Inputs>
__device__ __forceinline__ void StreamFew(const BFloat16* const (&weights)[kMatrices],
                                          int64_t high_offset, int k, const XRow& x_row,
                                          const Inputs& inputs,
                                          float (&sums)[kMatrices][kTiles][4]) {
  const int lane_k = static_cast<int>(threadIdx.x % 4) * 8;
  const int warp = static_cast<int>(threadIdx.x / 32);
  constexpr int kStride = kFewWarps * kFewStepK;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  uint4 low[kAhead][kMatrices], high[kAhead][kMatrices];
  const auto load = [&](int slot, int at) {
    const bool inside = at + lane_k < k;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      low[slot][m] = inside ? LoadWeights(weights[m] + at) : zero;
      high[slot][m] = inside ? LoadWeights(weights[m] + at + high_offset) : zero;
    }
  };
  int begin = warp * kFewStepK;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, begin + i * kStride);
  inputs();
  const X* rows[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) rows[n] = x_row(n);
  while (begin < k) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = begin + i * kStride;
      const bool inside = at + lane_k < k;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        FewX<X> x;
        if (inside && rows[n]) x.Load(rows[n] + at);
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) x.Multiply(sums[m][n], low[i][m], high[i][m]);
      }
      load(i, at + kAhead * kStride);
    }
    begin += kAhead * kStride;
  }
}

// The warps' sums, added in order: partial[warp][out][row], rows of 8 * kTiles + 1 floats.
template <int kTiles>
struct FewPartials {
  static constexpr int kRows = 8 * kTiles;
  float sums[kFewWarps][kFewOuts][kRows + 1];

  __device__ void Put(const float (&own)[kTiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int out = lane / 4, row = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      sums[warp][out][8 * n + row] = own[n][0];
      sums[warp][out][8 * n + row + 1] = own[n][1];
      sums[warp][out + 8][8 * n + row] = own[n][2];
      sums[warp][out + 8][8 * n + row + 1] = own[n][3];
    }
  }
  __device__ float Sum(int out, int row) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kFewWarps; ++warp) sum += sums[warp][out][row];
    return sum;
  }
};

}  // namespace octavo::cuda
