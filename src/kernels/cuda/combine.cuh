// Adds up the partial results of a block of rows.
#pragma once

#include <cuda_bf16.h>

#include <cmath>

#include "kernels/cuda/combine.h"
#include "kernels/cuda/ptx.cuh"

namespace octavo::cuda {

__device__ __forceinline__ void StoreBF16x4(void* out, int64_t index, float4 x) {
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(out) + index) = {PackBF16(x.x, x.y),
                                                                         PackBF16(x.z, x.w)};
}

// Lanes of a warp to a row of kDim floats, four each. Where they are fewer than 32, the others work
// on other partial results: a side each.
template <int kDim>
inline constexpr int kRowLanes = kDim < 128 ? kDim / 4 : 32;
template <int kDim>
inline constexpr int kSides = 32 / kRowLanes<kDim>;

// The softmax of a few rows over some of their partial results: lane `lane` has columns
// 4 (lane % kRowLanes + 32 j).
template <int kDim, int kRows>
struct CombineState {
  static constexpr int kParts = (kDim + 127) / 128;
  float max[kRows], sum[kRows];
  float4 out[kRows][kParts];
};

__device__ __forceinline__ float4 operator*(float a, float4 x) {
  return {a * x.x, a * x.y, a * x.z, a * x.w};
}
__device__ __forceinline__ float4 operator+(float4 x, float4 y) {
  return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
}

// Rows `row` ... (repeating the last of `rows`) over the slice-th of `slices` parts of their
// partial results. Few instructions and kAhead partial results asked for at once: latency is what
// this costs, for which no other warp has work.
template <int kDim, int kRows, int kAhead>
__device__ __forceinline__ void CombinePartials(const Partials& partials, const CombineItem& item,
                                                int row, int rows, int slice, int slices, int lane,
                                                CombineState<kDim, kRows>& state) {
  constexpr int kParts = CombineState<kDim, kRows>::kParts;
  const int step = slices * kSides<kDim>;
  const int own = slice * kSides<kDim> + lane / kRowLanes<kDim>;
  const int column = 4 * (lane % kRowLanes<kDim>);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    state.max[r] = -INFINITY;
    state.sum[r] = 0;
#pragma unroll
    for (float4& x : state.out[r]) x = {0, 0, 0, 0};
  }
  for (int begin = 0; begin < item.partials; begin += kAhead * step) {
    float lse2[kAhead][kRows];
    float4 x[kAhead][kRows][kParts];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int part = min(begin + a * step + own, item.partials - 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at =
            item.partial_begin + min(row + r, rows - 1) + int64_t{part} * item.stride;
        lse2[a][r] = __ldcg(partials.lse2 + at);
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
          x[a][r][j] =
              __ldcg(reinterpret_cast<const float4*>(partials.out + at * kDim + column + 128 * j));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float max = state.max[r];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (begin + a * step + own >= item.partials) lse2[a][r] = -INFINITY;
        max = fmaxf(max, lse2[a][r]);
      }
      const float base = max == -INFINITY ? 0.0f : max;
      const float rescale = Exp2(state.max[r] - base);
      state.max[r] = max;
      state.sum[r] *= rescale;
#pragma unroll
      for (float4& out : state.out[r]) out = rescale * out;
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const float weight = Exp2(lse2[a][r] - base);
        state.sum[r] += weight;
        if (weight == 0) continue;  // whatever it holds
#pragma unroll
        for (int j = 0; j < kParts; ++j) state.out[r][j] = state.out[r][j] + weight * x[a][r][j];
      }
    }
  }
}

// What a row's values are to be multiplied by, and its log-sum-exp, when all that is seen has been
// added up, in units of 2^base.
struct RowEnd {
  float factor, lse;
};
__device__ __forceinline__ RowEnd EndRow(float sum, float base, const float* sink,
                                         const float* v_scale) {
  if (sink) sum += Exp2(fmaf(*sink, kLog2E, -base));
  return {sum == 0 ? 0.0f : (v_scale ? *v_scale : 1.0f) / sum,
          sum == 0 ? -INFINITY : kLn2 * (base + Log2(sum))};
}

template <int kDim>
__device__ __forceinline__ void StoreCombinedRow(void* out, int64_t row, int lane,
                                                 const float4 (&x)[(kDim + 127) / 128]) {
  if (lane >= kRowLanes<kDim>) return;
#pragma unroll
  for (int j = 0; j < (kDim + 127) / 128; ++j)
    StoreBF16x4(out, row * kDim + 4 * (lane + 32 * j), x[j]);
}

}  // namespace octavo::cuda
