// Adds up the partial results of a block of rows, a warp for each row (or for each slice of its
// partial results).
#pragma once

#include <cuda_bf16.h>

#include <cmath>

#include "kernels/cuda/combine.h"
#include "kernels/cuda/ptx.cuh"

namespace octavo::cuda {

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

__device__ __forceinline__ void StoreBF16x4(void* out, int64_t index, float4 x) {
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(out) + index) = {PackBF16(x.x, x.y),
                                                                         PackBF16(x.z, x.w)};
}

// The weighted mean of row `row`, over the slice-th of `slices` parts of its partial results: lane
// `lane` holds columns 4 (lane + 32 i). Slice 0 writes the log-sum-exp.
template <int kDim>
__device__ __forceinline__ void CombineRow(const CombineOutput& output, const CombineItem& item,
                                           int row, int slice, int slices, int lane,
                                           float4 (&sum)[(kDim + 127) / 128]) {
  const int first = item.partial_begin + row;
  float max = -INFINITY;
  for (int i = lane; i < item.partials; i += 32) {
    max = fmaxf(max, __ldcg(output.partials.lse2 + first + int64_t{i} * item.stride));
  }
  max = WarpMax(max);
  const float base = max == -INFINITY ? 0.0f : max;

  float all = 0;
#pragma unroll
  for (float4& s : sum) s = {0, 0, 0, 0};
  for (int begin = 0; begin < item.partials; begin += 32) {
    float weight = 0;
    if (begin + lane < item.partials) {
      const int64_t at = first + int64_t{begin + lane} * item.stride;
      weight = Exp2(__ldcg(output.partials.lse2 + at) - base);
    }
    all += weight;
    const int end = min(32, item.partials - begin);
#pragma unroll 8
    for (int i = slice; i < end; i += slices) {
      const float w = __shfl_sync(~0u, weight, i);
      if (w == 0) continue;  // whatever it holds
      const float* from = output.partials.out + (first + int64_t{begin + i} * item.stride) * kDim;
#pragma unroll
      for (int j = 0; j < (kDim + 127) / 128; ++j) {
        if (kDim < 128 && 4 * lane >= kDim) break;
        const float4 x = __ldcg(reinterpret_cast<const float4*>(from + 4 * (lane + 32 * j)));
        sum[j].x = fmaf(w, x.x, sum[j].x);
        sum[j].y = fmaf(w, x.y, sum[j].y);
        sum[j].z = fmaf(w, x.z, sum[j].z);
        sum[j].w = fmaf(w, x.w, sum[j].w);
      }
    }
  }
  all = WarpSum(all);

  const int head = item.head + row % item.pack;
  if (output.sinks) all += Exp2(fmaf(output.sinks[head], kLog2E, -base));
  const float v_scale = output.v_scale ? output.v_scale[head / output.group] : 1.0f;
  const float factor = all == 0 ? 0.0f : v_scale / all;
#pragma unroll
  for (float4& s : sum) s = {s.x * factor, s.y * factor, s.z * factor, s.w * factor};
  if (output.lse && slice == 0 && lane == 0) {
    output.lse[int64_t{item.q_row + row / item.pack} * output.heads + head] =
        all == 0 ? -INFINITY : kLn2 * (base + Log2(all));
  }
}

template <int kDim>
__device__ __forceinline__ void StoreCombinedRow(const CombineOutput& output,
                                                 const CombineItem& item, int row, int lane,
                                                 const float4 (&sum)[(kDim + 127) / 128]) {
  const int64_t at =
      int64_t{item.q_row + row / item.pack} * output.heads + item.head + row % item.pack;
#pragma unroll
  for (int j = 0; j < (kDim + 127) / 128; ++j) {
    if (kDim < 128 && 4 * lane >= kDim) break;
    StoreBF16x4(output.out, at * kDim + 4 * (lane + 32 * j), sum[j]);
  }
}

}  // namespace octavo::cuda
