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

// The weighted means of rows `row` ... of `rows`, over the slice-th of `slices` parts of their
// partial results: lane `lane` holds columns 4 (lane + 32 i). Slice 0 writes the log-sum-exp.
// Latency is all that this costs, so everything is asked for at once.
template <int kDim, int kRows>
__device__ __forceinline__ void CombineRows(const CombineOutput& output, const CombineItem& item,
                                            int row, int rows, int slice, int slices, int lane,
                                            float4 (&sum)[kRows][(kDim + 127) / 128]) {
  constexpr int kParts = (kDim + 127) / 128;
  constexpr int kAhead = kRows > 1 ? 3 : 8 / kParts;
  const bool has_columns = kDim >= 128 || 4 * lane < kDim;
  const auto partial_row = [&](int part, int r) {
    return item.partial_begin + min(row + r, rows - 1) + int64_t{part} * item.stride;
  };
  float max[kRows], base[kRows], all[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    max[r] = -INFINITY;
    base[r] = all[r] = 0;
#pragma unroll
    for (float4& s : sum[r]) s = {0, 0, 0, 0};
  }
  for (int begin = 0; begin < item.partials; begin += 32) {
    const int end = min(item.partials, begin + 32);
    float weight[kRows];  // of the lane's part
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      weight[r] = begin + lane < end ? __ldcg(output.partials.lse2 + partial_row(begin + lane, r))
                                     : -INFINITY;
    }
    bool weighed = false;
    for (int first = begin + slice; first < end || !weighed; first += kAhead * slices) {
      float4 x[kAhead][kRows][kParts];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int part = min(first + a * slices, end - 1);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int j = 0; j < kParts; ++j) {
            x[a][r][j] =
                has_columns
                    ? __ldcg(reinterpret_cast<const float4*>(
                          output.partials.out + partial_row(part, r) * kDim + 4 * (lane + 32 * j)))
                    : float4{0, 0, 0, 0};
          }
        }
      }
      if (!weighed) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float before = max[r], lse2 = weight[r];
          max[r] = fmaxf(max[r], WarpMax(lse2));
          base[r] = max[r] == -INFINITY ? 0.0f : max[r];
          weight[r] = Exp2(lse2 - base[r]);
          const float rescale = Exp2(before - base[r]);
          all[r] = all[r] * rescale + weight[r];
#pragma unroll
          for (float4& s : sum[r]) {
            s = {s.x * rescale, s.y * rescale, s.z * rescale, s.w * rescale};
          }
        }
        weighed = true;
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int part = first + a * slices;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float w = __shfl_sync(~0u, weight[r], (part - begin) % 32);
          if (part >= end || w == 0) continue;  // whatever it holds
#pragma unroll
          for (int j = 0; j < kParts; ++j) {
            sum[r][j].x = fmaf(w, x[a][r][j].x, sum[r][j].x);
            sum[r][j].y = fmaf(w, x[a][r][j].y, sum[r][j].y);
            sum[r][j].z = fmaf(w, x[a][r][j].z, sum[r][j].z);
            sum[r][j].w = fmaf(w, x[a][r][j].w, sum[r][j].w);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    all[r] = WarpSum(all[r]);
    const int of = min(row + r, rows - 1);
    const int head = item.head + of % item.pack;
    if (output.sinks) all[r] += Exp2(fmaf(output.sinks[head], kLog2E, -base[r]));
    const float v_scale = output.v_scale ? output.v_scale[head / output.group] : 1.0f;
    const float factor = all[r] == 0 ? 0.0f : v_scale / all[r];
#pragma unroll
    for (float4& s : sum[r]) s = {s.x * factor, s.y * factor, s.z * factor, s.w * factor};
    if (output.lse && slice == 0 && lane == 0) {
      output.lse[int64_t{item.q_row + of / item.pack} * output.heads + head] =
          all[r] == 0 ? -INFINITY : kLn2 * (base[r] + Log2(all[r]));
    }
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
