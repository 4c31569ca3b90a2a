// Queries and keys: norm, rotation and their stores, some heads of one token by a warp.
#pragma once

#include "kernels/cuda/append.cuh"

namespace octavo::cuda {

// A lane's two runs of eight elements are such that rotation pairs them: as many lanes as it takes
// hold pairs (i, i + rotary_dim / 2), the others what is not rotated.
struct Runs {
  int first, second;
  bool rotated;
};
template <int kHeadDim>
__device__ __forceinline__ Runs RunsOf(int lane, int rotary_dim) {
  const int rotating = rotary_dim / 16;
  if (lane < rotating) return {8 * lane, 8 * lane + rotary_dim / 2, true};
  const int first = rotary_dim + 8 * (lane - rotating);
  return {first, first + (kHeadDim - rotary_dim) / 2, false};
}

struct Angles {
  float cos[8], sin[8];
};
__device__ __forceinline__ Angles LoadAngles(const AppendParams& p, int token, const Runs& runs) {
  Angles angles;
  const float* row = p.cos_sin + int64_t{token} * p.rotary_dim + runs.first;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const auto cos = *reinterpret_cast<const float4*>(row + i);
    const auto sin = *reinterpret_cast<const float4*>(row + p.rotary_dim / 2 + i);
    angles.cos[i] = cos.x, angles.cos[i + 1] = cos.y;
    angles.cos[i + 2] = cos.z, angles.cos[i + 3] = cos.w;
    angles.sin[i] = sin.x, angles.sin[i + 1] = sin.y;
    angles.sin[i + 2] = sin.z, angles.sin[i + 3] = sin.w;
  }
  return angles;
}

// `weights`: [head_dim] in shared memory, the offset already added.
template <int kHeadDim>
__device__ __forceinline__ void Normalise(const float* weights, float eps, const Runs& runs,
                                          float (&x)[16]) {
  float parts[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) parts[i % 4] = fmaf(x[i], x[i], parts[i % 4]);
  const float squares = SumOverLanes<kHeadDim / 16>((parts[0] + parts[1]) + (parts[2] + parts[3]));
  const float inverse = ReciprocalRoot(squares * (1.0f / kHeadDim) + eps);
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const auto w =
        *reinterpret_cast<const float4*>(weights + (i < 8 ? runs.first + i : runs.second + i - 8));
    x[i] *= inverse * w.x;
    x[i + 1] *= inverse * w.y;
    x[i + 2] *= inverse * w.z;
    x[i + 3] *= inverse * w.w;
  }
}

__device__ __forceinline__ void Rotate(const Angles& angles, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = x[i], b = x[i + 8];
    x[i] = a * angles.cos[i] - b * angles.sin[i];
    x[i + 8] = b * angles.cos[i] + a * angles.sin[i];
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StoreQuery(const AppendParams& p, int64_t row, bool active,
                                           const Runs& runs, bool leads, bool fp8, float (&x)[16]) {
  if (fp8) {
    const float scale = QueryScale(SumOverLanes<kHeadDim / 16>(SumOfMagnitudes(x)));
    const float reciprocal = Reciprocal(scale);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= reciprocal;
    if (!active) return;
    Codes codes;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      codes.word[i] = PackE4M3(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    uint8_t* to = p.q_fp8 + row * kHeadDim;
    StoreCodes(codes, false, to + runs.first, to + runs.second);
    if (leads) p.q_scale[row] = scale;
  } else if (active) {
    Codes codes;
#pragma unroll
    for (int i = 0; i < 8; ++i) codes.word[i] = PackBF16(x[2 * i], x[2 * i + 1]);
    __nv_bfloat16* to = p.q_out + row * kHeadDim;
    StoreCodes(codes, true, to + runs.first, to + runs.second);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StoreKey(const AppendParams& p, int64_t slot, int head, bool active,
                                         const Runs& runs, bool leads, float (&x)[16],
                                         Statistics& statistics) {
  float scale = IsStaticFp8(p.k_format) && active ? p.k_scale[head] : 1.0f;
  const Codes codes = Quantize<kHeadDim / 16>(p.k_format, x, &scale, statistics);
  if (!active) return;
  const bool is_16bit = Is16Bit(p.k_format);
  const int place = static_cast<int>(slot % kPageSize);
  std::byte* stored = Claim(p, slot) + head * p.head_bytes;
  std::byte* to = stored + place * (kHeadDim << is_16bit);
  StoreCodes(codes, is_16bit, to + (runs.first << is_16bit), to + (runs.second << is_16bit));
  if (leads && IsDynamic(p.k_format)) reinterpret_cast<float*>(stored + p.k_scales)[place] = scale;
}

// Shares of tokens' query and key heads, one per warp; unit u is share u % p.shares of token
// u / p.shares of the tile. `weights`: room for the norms of q and of k.
template <int kHeadDim, class Input>
__device__ __forceinline__ void AppendQueriesAndKeys(const AppendParams& p, int tile_begin,
                                                     int unit, float* weights) {
  constexpr int kLanes = kHeadDim / 16;  // of one head
  constexpr int kHeads = 32 / kLanes;    // at a time
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int lane_head = static_cast<int>(threadIdx.x % 32) / kLanes;
  const int q_steps = (p.heads + kHeads - 1) / kHeads;
  const int steps = q_steps + (p.kv_heads + kHeads - 1) / kHeads;
  const int token = tile_begin + unit / p.shares, share = unit % p.shares;
  const bool inside = token < min(tile_begin + p.tile, p.tokens);
  const int begin = steps * share / p.shares, end = inside ? steps * (share + 1) / p.shares : 0;
  const Runs runs = RunsOf<kHeadDim>(lane, p.rotary_dim);

  const int64_t lane_at = lane_head * kHeadDim + runs.first;
  const auto* q = static_cast<const Input*>(p.q) + token * p.q_stride + lane_at;
  const auto* k = static_cast<const Input*>(p.k) + token * p.k_stride + lane_at;
  const int q_active = p.heads - lane_head, k_active = p.kv_heads - lane_head;
  auto load = [&](int step) {
    const bool is_key = step >= q_steps;
    const int head = (is_key ? step - q_steps : step) * kHeads;  // of the warp's first lanes
    if (step >= end || head >= (is_key ? k_active : q_active)) return Raw<Input>{};
    const Input* from = (is_key ? k : q) + head * kHeadDim;
    return Load<Input>(from, from + (runs.second - runs.first));
  };

  // Before it waits: what the kernel in front does not write.
  int64_t slot = -1;
  bool fp8 = false;
  Angles angles;
  if (inside) {
    slot = p.slots[token];
    if (runs.rotated) angles = LoadAngles(p, token, runs);
    fp8 = p.fp8_queries != nullptr && p.fp8_queries[token] != 0;
    if (slot >= 0) PrefetchLine(Claim(p, slot));  // for its address to be known
    if (IsStaticFp8(p.k_format)) PrefetchLine(p.k_scale);
  }
  const Reporter reporter(p, 0);
  if (p.q_norm != nullptr || p.k_norm != nullptr) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kHeadDim; i += kAppendThreads) {
      if (p.q_norm != nullptr) weights[i] = __bfloat162float(p.q_norm[i]) + p.norm_offset;
      if (p.k_norm != nullptr)
        weights[kHeadDim + i] = __bfloat162float(p.k_norm[i]) + p.norm_offset;
    }
    __syncthreads();
  }
  WaitForInputs();
  if (slot < 0) return;
  Raw<Input> next = load(begin), after = load(begin + 1);

  Statistics statistics;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const bool is_key = step >= q_steps;
    float x[16];
    Widen(next, x);
    next = after;
    after = load(step + 2);
    if ((is_key ? p.k_norm : p.q_norm) != nullptr)
      Normalise<kHeadDim>(weights + (is_key ? kHeadDim : 0), p.norm_eps, runs, x);
    if (runs.rotated) Rotate(angles, x);
    const int head = (is_key ? step - q_steps : step) * kHeads + lane_head;
    if (is_key) {
      StoreKey<kHeadDim>(p, slot, head, head < p.kv_heads, runs, lane == 0, x, statistics);
    } else {
      StoreQuery<kHeadDim>(p, int64_t{token} * p.heads + head, head < p.heads, runs, lane == 0, fp8,
                           x);
    }
  }
  if (end > q_steps) reporter.Report(statistics);
}

}  // namespace octavo::cuda
