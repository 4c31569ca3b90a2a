// What prefill kernels share, whatever their arithmetic: which keys a thread's two rows see, the
// online softmax over a tile of scores, and the way out.
//
// A consumer warpgroup owns 64 rows. A thread holds parts of two of them (wgmma.cuh): lane / 4 and
// eight below.
#pragma once

#include <cuda_bf16.h>

#include <cmath>

#include "kernels/cuda/prefill.h"
#include "kernels/cuda/wgmma.cuh"

namespace octavo::cuda {

// The softmax of a row so far is exponentials 2^(score * scale + shift), their sum, and sums of
// values. `shift` moves only when an exponential would leave the range that its format has above
// 2^kOffset: moving it costs a multiplication of everything so far, and rarely happens after the
// first tile.
struct PrefillRow {
  float scale;          // of a score, times log2(e); 1 where the soft cap has done that
  float shift = 1e30f;  // nothing seen: any score is out of range, and -inf stays -inf
  float sum = 0;        // of this thread's exponentials
  float rescale = 1;    // what the last tile made of earlier sums
};

// The first of this thread's two rows within the item; the other is 8 further. Read anew each time,
// for the tile loops need every register.
__device__ __forceinline__ int ThreadRow() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
  thread -= 128;  // the producer
  return static_cast<int>(thread / 32 * 16 + thread % 32 / 4);
}

// Where a row of an item comes from and goes to.
struct RowPlace {
  bool valid;
  int token, head;
  int64_t index;  // of (token, head)
};
__device__ __forceinline__ RowPlace PlaceOf(const PrefillParams& p, const WorkItem& item, int row) {
  const int t = row >> p.pack_shift;
  const int token = item.q_row + t, head = item.head + (row & ((1 << p.pack_shift) - 1));
  return {t < item.q_tokens, token, head, int64_t{token} * p.heads + head};
}
// Of a score, times log2(e).
__device__ __forceinline__ float ScoreScale(const PrefillParams& p, const WorkItem& item, int row) {
  const RowPlace place = PlaceOf(p, item, row);
  float scale = p.scale_log2;
  if (p.k_scale) scale *= p.k_scale[item.head / p.group];
  if (p.q_scale && place.valid) scale *= p.q_scale[place.index];
  return scale;
}

// Tiles of kKeys keys, counted from page 0, from the highest that an item reads to the lowest.
struct TileRange {
  int begin, end;
  int causal;  // from this tile on some row of the warpgroup sees less than all keys
};
template <int kKeys>
__device__ __forceinline__ TileRange TilesOf(const PrefillParams& p, const WorkItem& item,
                                             int warpgroup) {
  constexpr int kPages = kKeys / kPageSize;
  const int first_row = item.position + (64 * warpgroup >> p.pack_shift);
  return {item.page_begin / kPages, (item.page_end + kPages - 1) / kPages, (first_row + 1) / kKeys};
}
// Whether a window hides keys of this tile from some row.
template <int kKeys>
__device__ __forceinline__ bool IsWindowed(const PrefillParams& p, const WorkItem& item, int tile) {
  return p.window > 0 && tile * kKeys < item.position + item.q_tokens - p.window;
}

// Sets the scores that rows `row` and `row` + 8 do not see to -inf. s: scores of kKeys keys from
// `begin` on.
template <int kKeys>
__device__ __forceinline__ void MaskScores(float (&s)[kKeys / 2], int begin, const PrefillParams& p,
                                           const WorkItem& item, int row) {
  const int last_a = item.position + (row >> p.pack_shift),
            last_b = item.position + ((row + 8) >> p.pack_shift);
  const int behind_a = p.window > 0 ? last_a - p.window : -1,
            behind_b = p.window > 0 ? last_b - p.window : -1;
  const int lane_column = begin + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = lane_column + 8 * j + i;
      if (key > last_a || key <= behind_a) s[4 * j + i] = -INFINITY;
      if (key > last_b || key <= behind_b) s[4 * j + 2 + i] = -INFINITY;
    }
  }
}

__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Brings a row's exponentials back into range if the largest of some scores, over the quad, asks
// for it. Returns the factor for what there is already.
template <class Range>
__device__ __forceinline__ float MoveShift(PrefillRow& row, float max_score) {
  const float score = QuadMax(max_score);
  // The same sum as in the vote, or a row's bits would depend on who else votes.
  if (!(fmaf(score, row.scale, row.shift) > Range::kLimit)) return 1.0f;
  const float shift = Range::kOffset - score * row.scale;
  const float factor = Exp2(shift - row.shift);
  row.shift = shift;
  row.sum *= factor;
  row.rescale *= factor;
  return factor;
}

// Scores of a tile to exponentials of at most 2^kLimit; a row's largest is near 2^kOffset.
//
// The exponentials (MUFU) of the first keys run beside the maxima (ALU) of the others, which else
// would wait for each other: see docs/kernels/prefill.md.
template <int kKeys, class Range>
__device__ __forceinline__ void OnlineSoftmax(float (&s)[kKeys / 2], PrefillRow& a, PrefillRow& b) {
  constexpr int kFirst = kKeys / 4;
  const auto maxima = [&](int begin, int end, float& max_a, float& max_b) {
    max_a = max_b = -INFINITY;
#pragma unroll
    for (int i = begin / 2; i < end / 2; i += 4) {
      max_a = fmaxf(max_a, fmaxf(s[i], s[i + 1]));
      max_b = fmaxf(max_b, fmaxf(s[i + 2], s[i + 3]));
    }
  };
  const auto exponentials = [&](int begin, int end) {
#pragma unroll
    for (int i = begin / 2; i < end / 2; i += 4) {
      s[i] = Exp2(fmaf(s[i], a.scale, a.shift));
      s[i + 1] = Exp2(fmaf(s[i + 1], a.scale, a.shift));
      s[i + 2] = Exp2(fmaf(s[i + 2], b.scale, b.shift));
      s[i + 3] = Exp2(fmaf(s[i + 3], b.scale, b.shift));
      a.sum += s[i] + s[i + 1];
      b.sum += s[i + 2] + s[i + 3];
    }
  };
  const auto out_of_range = [&](float max_a, float max_b) {
    return __any_sync(~0u, fmaf(max_a, a.scale, a.shift) > Range::kLimit ||
                               fmaf(max_b, b.scale, b.shift) > Range::kLimit);
  };
  a.rescale = b.rescale = 1;
  float max_a, max_b;
  maxima(0, kFirst, max_a, max_b);
  if (out_of_range(max_a, max_b)) {
    MoveShift<Range>(a, max_a);
    MoveShift<Range>(b, max_b);
  }
  maxima(kFirst, kKeys, max_a, max_b);
  exponentials(0, kFirst);
  if (out_of_range(max_a, max_b)) {
    const float factor_a = MoveShift<Range>(a, max_a);
    const float factor_b = MoveShift<Range>(b, max_b);
#pragma unroll
    for (int i = 0; i < kFirst / 2; i += 4) {
      s[i] *= factor_a;
      s[i + 1] *= factor_a;
      s[i + 2] *= factor_b;
      s[i + 3] *= factor_b;
    }
  }
  exponentials(kFirst, kKeys);
}

// One row's share of the result: o[4 j] and o[4 j + 1] are its columns 8 j + 2 (lane % 4).
template <int kHeadDim>
__device__ __forceinline__ void StoreRow(const PrefillParams& p, const WorkItem& item,
                                         const PrefillRow& row, int row_index, const float* o) {
  float sum = QuadSum(row.sum);
  const RowPlace place = PlaceOf(p, item, row_index);
  if (!place.valid) return;
  const int column = 2 * (threadIdx.x % 4);
  if (item.partial >= 0) {
    const int64_t at = item.partial + row_index;
    const float inverse = 1.0f / sum;
    float* out = p.partials.out + at * kHeadDim + column;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<float2*>(out + 8 * j) =
          sum == 0 ? float2{0, 0} : float2{o[4 * j] * inverse, o[4 * j + 1] * inverse};
    }
    if (column == 0) p.partials.lse2[at] = sum == 0 ? -INFINITY : Log2(sum) - row.shift;
    return;
  }
  if (p.sinks && sum != 0) sum += Exp2(fmaf(p.sinks[place.head], kLog2E, row.shift));
  const float v_scale = p.v_scale ? p.v_scale[item.head / p.group] : 1.0f;
  const float inverse = sum == 0 ? 0.0f : v_scale / sum;
  auto* out = static_cast<__nv_bfloat16*>(p.out) + place.index * kHeadDim + column;
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    *reinterpret_cast<uint32_t*>(out + 8 * j) =
        PackBF16(o[4 * j] * inverse, o[4 * j + 1] * inverse);
  }
  if (p.lse && column == 0)
    p.lse[place.index] = sum == 0 ? -INFINITY : kLn2 * (Log2(sum) - row.shift);
}

}  // namespace octavo::cuda
