// The decode kernel. One block per multiprocessor: a producer warp fills a ring of pages in shared
// memory by bulk copies, running ahead of item boundaries, and kWarps consumer warps work on a page
// each. The ring holds about 190 KB, so the bus is busy while results are merged and written.
#pragma once

#include <cmath>

#include "kernels/cuda/combine.cuh"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_page.cuh"
#include "kernels/cuda/decode_ring.cuh"

namespace octavo::cuda {
// The query token that a row is of, by its place in the item.
__device__ __forceinline__ int RowToken(const DecodeParams& p, int row) {
  return DivideByGroup(row, p.group_inverse);
}
__device__ __forceinline__ int64_t OutputRow(const DecodeParams& p, int q_row, int head, int row) {
  const int token = RowToken(p, row);
  return int64_t{q_row + token} * p.heads + head + row - token * p.group;
}

// The item's queries to fragments, each row a power of two away from float16's largest numbers (16-
// bit K: bfloat16 stays as it is), and what its scores are to be multiplied by. Half a warp to a
// row.
template <int kDim, int kK>
__device__ __forceinline__ void LoadQueries(const DecodeParams& p, DecodeShared<kDim>& shared,
                                            const std::byte* from, int warp, int lane) {
  constexpr int kWarps = DecodeShared<kDim>::kWarps, kRowLanes = 16, kVectors = kDim / 64;
  const KvFormat k = Resolve<kK>(p.k_format);
  const auto& current = CurrentItem(shared);
  const int rows = current.work.q_tokens * p.group;
  const int padded = rows > 8 ? 16 : 8;
  for (int row = 2 * warp + lane / kRowLanes; row < padded; row += 2 * kWarps) {
    uint2 raw[kVectors];
    float amax = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int dim = 4 * (lane % kRowLanes + kRowLanes * j);
      raw[j] = {0, 0};
      if (row < rows) raw[j] = *reinterpret_cast<const uint2*>(from + (row * kDim + dim) * 2);
#pragma unroll
      for (const uint32_t two : {raw[j].x, raw[j].y}) {
        amax = fmaxf(amax, fmaxf(fabsf(__uint_as_float(two << 16)),
                                 fabsf(__uint_as_float(two & 0xFFFF0000u))));
      }
    }
    float factor = 1, inverse = 1;
    if (k != KvFormat::kBF16) {
#pragma unroll
      for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, lanes));
      // 2^14 divided by the power of two in amax; both factors are normal numbers.
      const int exponent = static_cast<int>(__float_as_uint(amax) >> 23) - 127;
      const int shift = amax == 0 ? 0 : max(-112, min(126, 14 - exponent));
      factor = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
      inverse = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int dim = 4 * (lane % kRowLanes + kRowLanes * j);
      uint2 two = raw[j];
      if (k != KvFormat::kBF16) {
        two.x = PackF16(__uint_as_float(raw[j].x << 16) * factor,
                        __uint_as_float(raw[j].x & 0xFFFF0000u) * factor);
        two.y = PackF16(__uint_as_float(raw[j].y << 16) * factor,
                        __uint_as_float(raw[j].y & 0xFFFF0000u) * factor);
      }
      const int step = QueryStep(IsWide(k), dim), t = QueryLane(IsWide(k), dim);
      shared.q_fragments[(step * 2 + row / 8) * 32 + 4 * (row % 8) + t] = two;
    }
    if (lane % kRowLanes == 0) {
      shared.row_last[row] = current.work.position + RowToken(p, row);
      shared.row_scale[row] = current.score_scale * inverse;
    }
  }
}

template <int kDim, int kTiles>
struct DecodeState {
  float o[kDim / 16][kTiles][4];
  float max[kTiles][2], sum[kTiles][2];  // of the two rows of a tile that a lane holds
};

// Scores to base-2 logarithms of probabilities; keys that a row does not see to -inf.
template <int kDim, int kTiles, int kK>
__device__ __forceinline__ void FinishScores(const DecodeParams& p,
                                             const DecodeShared<kDim>& shared, const WorkItem& item,
                                             const LaneKeys& keys, const float* k_scales,
                                             int first_key, int lane, float (&s)[4][kTiles][4]) {
  float scale[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[tile][i] = shared.row_scale[8 * tile + 2 * (lane % 4) + i];
    }
  }
  const float cap = p.soft_cap * kLog2E;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float token_scale = 1;
      if (HasScaleInPage(Resolve<kK>(p.k_format))) token_scale = k_scales[keys.Key(m, i / 2)];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        s[m][tile][i] *= scale[tile][i % 2] * token_scale;
      }
    }
  }
  if (p.soft_cap > 0) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[m][tile][i] = cap - __fdividef(2 * cap, Exp2(s[m][tile][i]) + 1);
        }
      }
    }
  }
  const bool all_seen = first_key + kPageSize - 1 <= item.position &&
                        (p.window == 0 || first_key > item.position + item.q_tokens - 1 - p.window);
  if (all_seen) return;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int last = shared.row_last[8 * tile + 2 * (lane % 4) + i % 2];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int key = first_key + keys.Key(m, i / 2);
        if (key > last || (p.window > 0 && key <= last - p.window)) s[m][tile][i] = -INFINITY;
      }
    }
  }
}

// Online softmax: logarithms to probabilities, times the values' scales where those are dynamic;
// then the maximum is that of probability times scale, so that the product fits in float16.
template <int kDim, int kTiles, int kV>
__device__ __forceinline__ void Softmax(const DecodeParams& p, const LaneKeys& keys,
                                        const float* v_scales, float (&s)[4][kTiles][4],
                                        DecodeState<kDim, kTiles>& state) {
  const bool scaled = HasScaleInPage(Resolve<kV>(p.v_format));
  float max[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) max[tile][i] = state.max[tile][i];
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float v_log = scaled ? Log2(v_scales[keys.Key(m, h)]) : 0.0f;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          max[tile][i] = fmaxf(max[tile][i], s[m][tile][2 * h + i] + v_log);
        }
      }
    }
  }
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max[tile][i] = fmaxf(max[tile][i], __shfl_xor_sync(~0u, max[tile][i], lanes));
      }
    }
  }
  float base[kTiles][2], rescale[kTiles][2];
  bool moved = false;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      base[tile][i] = max[tile][i] == -INFINITY ? 0.0f : max[tile][i];
      rescale[tile][i] = Exp2(state.max[tile][i] - base[tile][i]);
      moved |= max[tile][i] != state.max[tile][i];
      state.max[tile][i] = max[tile][i];
    }
  }
  if (__any_sync(~0u, moved)) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        state.sum[tile][i] *= rescale[tile][i];
#pragma unroll
        for (int c = 0; c < kDim / 16; ++c) {
          state.o[c][tile][i] *= rescale[tile][i];
          state.o[c][tile][2 + i] *= rescale[tile][i];
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float v_scale = scaled ? v_scales[keys.Key(m, h)] : 1.0f;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[m][tile][2 * h + i];
          const float e = Exp2(x - (base[tile][i] - kProbabilityShift));
          state.sum[tile][i] += e;
          x = e * v_scale;
        }
      }
    }
  }
}

// A consumer's place in the ring.
struct DecodeStage {
  uint32_t serial;
  int index;
  uint32_t phase;

  __device__ __forceinline__ void Advance(int by, int stages) {
    serial += static_cast<uint32_t>(by);
    index += by;
    while (index >= stages) {
      index -= stages;
      phase ^= 1;
    }
  }
  // A stage's parity tells this filling from the one before only once that has happened: some other
  // warp may not have seen it yet.
  template <class Shared>
  __device__ __forceinline__ void Wait(Shared& shared) const {
    while (*const_cast<volatile uint32_t*>(&shared.serial[index]) != serial) {
    }
    BarrierWait(&shared.full[index], phase);
  }
};

// A warp's pages of an item: those with index warp, warp + kWarps, ... .
template <int kDim, int kK, int kV, int kTiles>
__device__ __forceinline__ void WorkOnPages(const DecodeParams& p, DecodeShared<kDim>& shared,
                                            const DecodeRing<kDim, kK, kV>& ring, int warp,
                                            int lane, DecodeState<kDim, kTiles>& state) {
  using Shared = DecodeShared<kDim>;
  const KvFormat k_format = Resolve<kK>(p.k_format), v_format = Resolve<kV>(p.v_format);
  const LaneKeys keys(IsWide(v_format), lane);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state.max[tile][i] = -INFINITY;
      state.sum[tile][i] = 0;
    }
  }
#pragma unroll
  for (int c = 0; c < kDim / 16; ++c) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.o[c][tile][i] = 0;
    }
  }
  const auto& first = CurrentItem(shared);
  DecodeStage stage{first.ring_begin, first.ring_stage, first.ring_phase};
  stage.Advance(warp * Shared::kParts, shared.stages);
  // Stages of this item from this one on.
  const auto left = [&] { return static_cast<int>(CurrentItem(shared).ring_end - stage.serial); };
  while (left() > 0) {
    stage.Wait(shared);
    const bool present = shared.pages[stage.index] != kNoPage;
    float s[4][kTiles][4] = {};
    if (present) {
      WithElements<kK>(k_format, [&](auto format) {
        Scores<kDim, kTiles>(format, ring.K(stage.index), keys, shared.q_fragments, lane, s);
      });
      const WorkItem& item = CurrentItem(shared).work;
      FinishScores<kDim, kTiles, kK>(p, shared, item, keys, ring.KScales(stage.index),
                                     (item.page_end - left() / Shared::kParts) * kPageSize, lane,
                                     s);
    }
    if constexpr (Shared::kParts == 2) {
      __syncwarp();
      if (lane == 0) BarrierArrive(&shared.empty[stage.index]);
      stage.Advance(1, shared.stages);
      stage.Wait(shared);
    }
    if (present) {
      Softmax<kDim, kTiles, kV>(p, keys, ring.VScales(stage.index), s, state);
      WithElements<kV>(v_format, [&](auto format) {
        uint2 probabilities[kTiles][4];
        Probabilities<kTiles>(format, s, probabilities);
        Values<kDim, kTiles>(format, ring.V(stage.index), lane, probabilities, state.o);
      });
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(&shared.empty[stage.index]);
    stage.Advance((Shared::kWarps - 1) * Shared::kParts + 1, shared.stages);
  }
}

// The sum of a row's probabilities over all warps: writes its logarithm and leaves what the row's
// values are to be multiplied by.
template <int kDim>
__device__ __forceinline__ void FinishRow(const DecodeParams& p, DecodeShared<kDim>& shared,
                                          const WorkItem& item, int row, float base) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < DecodeShared<kDim>::kWarps; ++w) {
    sum = fmaf(shared.sum[w][row], Exp2(shared.max[w][row] - base), sum);
  }
  base -= kProbabilityShift;
  if (item.partial >= 0) {
    __stcg(p.partials.lse2 + item.partial + row, sum == 0 ? -INFINITY : base + Log2(sum));
    shared.row_factor[row] = sum == 0 ? 0.0f : 1 / sum;
  } else {
    const auto& current = CurrentItem(shared);
    const RowEnd end = EndRow(sum, base, p.sinks ? &current.row_sink[row] : nullptr,
                              p.v_scale ? &current.v_scale : nullptr);
    shared.row_factor[row] = end.factor;
    if (p.lse) p.lse[OutputRow(p, item.q_row, item.head, row)] = end.lse;
  }
}

// Adds up what the warps have, and writes the result of the item or its part of one. A warp without
// pages has zeros.
template <int kDim, int kTiles>
__device__ __forceinline__ void Merge(const DecodeParams& p, DecodeShared<kDim>& shared,
                                      const WorkItem& item, int warp, int lane,
                                      DecodeState<kDim, kTiles>& state) {
  using Shared = DecodeShared<kDim>;
  constexpr int kWarps = Shared::kWarps;
  constexpr int kConsumers = 32 * kWarps;
  const int row_count = item.q_tokens * p.group;
  const int columns = row_count <= 2 ? 256 : row_count <= 4 ? 128 : row_count <= 8 ? 64 : 32;
  const int stride = columns + 4;
  const int thread = threadIdx.x;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        state.sum[tile][i] += __shfl_xor_sync(~0u, state.sum[tile][i], lanes);
      }
      if (lane < 4) {
        shared.max[warp][8 * tile + 2 * lane + i] = state.max[tile][i];
        shared.sum[warp][8 * tile + 2 * lane + i] = state.sum[tile][i];
      }
    }
  }
  NamedBarrierSync(1, kConsumers);
  const auto base_of = [&](int row) {
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, shared.max[w][row]);
    return max == -INFINITY ? 0.0f : max;
  };
  float weight[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[tile][i] = Exp2(state.max[tile][i] - base_of(8 * tile + 2 * (lane % 4) + i));
    }
  }
  if (thread < row_count) FinishRow(p, shared, item, thread, base_of(thread));
  for (int begin = 0; begin < kDim; begin += columns) {
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      if (16 * c < begin || 16 * c >= begin + columns) continue;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 8 * tile + 2 * (lane % 4) + i % 2;
          const int column = 16 * c - begin + lane / 4 + 8 * (i / 2);
          if (row < row_count)
            shared.merge[warp][row * stride + column] = state.o[c][tile][i] * weight[tile][i % 2];
        }
      }
    }
    NamedBarrierSync(1, kConsumers);
    const int row_shift = __ffs(min(columns, kDim) / 4) - 1;
    for (int e = thread; e < row_count << row_shift; e += kConsumers) {
      const int row = e >> row_shift, column = 4 * (e & ((1 << row_shift) - 1));
      float4 x = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const auto y = *reinterpret_cast<const float4*>(&shared.merge[w][row * stride + column]);
        x = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
      }
      const float factor = shared.row_factor[row];
      x = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
      if (item.partial >= 0) {
        __stcg(reinterpret_cast<float4*>(p.partials.out + (int64_t{item.partial} + row) * kDim +
                                         begin + column),
               x);
      } else {
        StoreBF16x4(p.out, OutputRow(p, item.q_row, item.head, row) * kDim + begin + column, x);
      }
    }
    // Whoever adds up parts comes after all of them. Else the next item's first barrier will do.
    if (begin + columns < kDim || item.partial >= 0) NamedBarrierSync(1, kConsumers);
  }
}

// Whoever writes the last part of a cut sequence adds up all of them.
template <int kDim>
__device__ __forceinline__ void CombineIfLast(const DecodeParams& p, DecodeShared<kDim>& shared,
                                              int combine) {
  const int warp = ThreadAgain() / 32, lane = ThreadAgain() % 32;
  constexpr int kWarps = DecodeShared<kDim>::kWarps;
  constexpr int kConsumers = 32 * kWarps;
  const auto& current = CurrentItem(shared);
  const WorkItem& item = current.work;
  const int rows = item.q_tokens * p.group;
  // Merge ended with a barrier.
  if (threadIdx.x == 0) {
    const bool last = AddAcquireRelease(p.arrivals + combine, 1) == current.link.partials - 1;
    shared.last_arrival = last;
    if (last) p.arrivals[combine] = 0;
  }
  NamedBarrierSync(1, kConsumers);
  if (!shared.last_arrival) return;
  // Every warp takes some of the parts, of a few rows at a time.
  constexpr int kRows = kDim == 256 ? 2 : 4, kAhead = kDim == 256 ? 4 : 3;
  constexpr int kParts = CombineState<kDim, kRows>::kParts;
  static_assert(DecodeShared<kDim>::kMergeFloats >= kSides<kDim> * kRows * kDim);
  static_assert(kDecodeRows >= kSides<kDim> * kRows);
  const CombineItem parts{.partial_begin = current.link.partial_begin,
                          .partials = current.link.partials,
                          .stride = rows};
  const int side_row = lane / kRowLanes<kDim> * kRows, column = 4 * (lane % kRowLanes<kDim>);
  for (int first = 0; first < rows; first += kRows) {
    CombineState<kDim, kRows> state;
    CombinePartials<kDim, kRows, kAhead>(p.partials, parts, first, rows, warp, kWarps, lane, state);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (column == 0) {
        shared.max[warp][side_row + r] = state.max[r];
        shared.sum[warp][side_row + r] = state.sum[r];
      }
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        *reinterpret_cast<float4*>(&shared.merge[warp][(side_row + r) * kDim + column + 128 * j]) =
            state.out[r][j];
      }
    }
    NamedBarrierSync(1, kConsumers);
    const int row = first + warp;
    if (warp < kRows && row < rows) {
      float base = -INFINITY, sum = 0;
      float4 x[kParts] = {};
#pragma unroll
      for (int i = 0; i < kWarps * kSides<kDim>; ++i)
        base = fmaxf(base, shared.max[i % kWarps][i / kWarps * kRows + warp]);
      if (base == -INFINITY) base = 0;
#pragma unroll
      for (int i = 0; i < kWarps * kSides<kDim>; ++i) {
        const int at = i / kWarps * kRows + warp;
        const float weight = Exp2(shared.max[i % kWarps][at] - base);
        sum = fmaf(weight, shared.sum[i % kWarps][at], sum);
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
          x[j] = x[j] + weight * *reinterpret_cast<const float4*>(
                                     &shared.merge[i % kWarps][at * kDim + column + 128 * j]);
        }
      }
      const RowEnd end = EndRow(sum, base, p.sinks ? &current.row_sink[row] : nullptr,
                                p.v_scale ? &current.v_scale : nullptr);
      const int64_t at = OutputRow(p, item.q_row, item.head, row);
#pragma unroll
      for (float4& y : x) y = end.factor * y;
      StoreCombinedRow<kDim>(p.out, at, lane, x);
      if (p.lse && lane == 0) p.lse[at] = end.lse;
    }
    NamedBarrierSync(1, kConsumers);
  }
}

template <int kDim, int kK, int kV, int kTiles>
__device__ __forceinline__ void WorkOnItem(const DecodeParams& p, DecodeShared<kDim>& shared,
                                           const DecodeRing<kDim, kK, kV>& ring, int warp,
                                           int lane) {
  DecodeState<kDim, kTiles> state;
  WorkOnPages<kDim, kK, kV, kTiles>(p, shared, ring, warp, lane, state);
  Merge<kDim, kTiles>(p, shared, CurrentItem(shared).work, warp, lane, state);
}

template <int kDim, int kK, int kV>
__global__ void __launch_bounds__(DecodeShared<kDim>::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  using Shared = DecodeShared<kDim>;
  extern __shared__ __align__(128) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const DecodeRing<kDim, kK, kV> ring{p, shared_bytes};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kItems; ++i) {
      BarrierInit(&shared.item_full[i], 1);
      BarrierInit(&shared.item_empty[i], Shared::kWarps);
    }
    shared.stages = ring.Stages();
    for (int i = 0; i < shared.stages; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], 1);
      shared.serial[i] = ~0u;
    }
    BarrierInitFence();
  }
  if (lane == 0 && warp < Shared::kWarps) shared.items_done[warp] = 0;
  if (warp == Shared::kWarps) {
    Produce<kDim, kK, kV>(p, shared, ring, lane);
    return;
  }
  __syncthreads();
  for (;;) {
    const uint32_t done = ItemsDone(shared);
    BarrierWait(&shared.item_full[done % Shared::kItems], done / Shared::kItems % 2);
    if (CurrentItem(shared).work.sequence < 0) break;
    LoadQueries<kDim, kK>(p, shared, shared.q[done % Shared::kItems], warp, lane);
    NamedBarrierSync(1, 32 * Shared::kWarps);
    if (CurrentItem(shared).work.q_tokens * p.group <= 8) {
      WorkOnItem<kDim, kK, kV, 1>(p, shared, ring, warp, lane);
    } else {
      WorkOnItem<kDim, kK, kV, 2>(p, shared, ring, warp, lane);
    }
    const int combine = CurrentItem(shared).link.combine;
    if (combine >= 0) CombineIfLast<kDim>(p, shared, combine);
    __syncwarp();
    if (lane == 0) {
      BarrierArrive(&shared.item_empty[ItemsDone(shared) % Shared::kItems]);
      ItemsDone(shared) = ItemsDone(shared) + 1;
    }
    __syncwarp();
  }
}

// The table's row of one instantiation.
template <int kDim, int kK, int kV>
KernelEntry DecodeEntry() {
  const auto format = [](int f) {
    return f == kAnyFormat ? std::nullopt : std::optional(static_cast<KvFormat>(f));
  };
  return {.phase = Phase::kDecode,
          .head_dim = kDim,
          .k = format(kK),
          .v = format(kV),
          .math = AttentionMath::k16Bit,
          .soft_cap = true,
          .function = reinterpret_cast<const void*>(&decode_kernel<kDim, kK, kV>),
          .rows = kDecodeRows,
          .tile_tokens = kPageSize,
          .threads = DecodeShared<kDim>::kThreads,
          .shared_bytes = kDecodeSharedBytes};
}

}  // namespace octavo::cuda
