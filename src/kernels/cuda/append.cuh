// What both halves of the append kernel (append_heads.cuh, append_values.cuh) share: its arguments,
// and how a lane holds sixteen elements of a head.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quantize.cuh"

namespace octavo::cuda {

inline constexpr int kAppendThreads = 128;
inline constexpr int kAppendWarps = kAppendThreads / 32;
inline constexpr int kMaxAppendTile = 64;  // tokens

struct AppendParams {
  int tokens, heads, kv_heads;
  const void *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  const __nv_bfloat16 *q_norm, *k_norm;
  float norm_eps, norm_offset;
  const float* cos_sin;
  int rotary_dim;
  const int64_t* slots;

  KvFormat k_format, v_format;
  std::byte* arena;                                  // the layer's claim in page 0
  int64_t head_bytes, v_offset, k_scales, v_scales;  // KvLayout's
  const float *k_scale, *v_scale;
  unsigned long long* saturated;
  float* amax;

  __nv_bfloat16* q_out;
  const uint8_t* fp8_queries;
  uint8_t* q_fp8;
  float* q_scale;

  int tile = 0;    // tokens, up to kMaxAppendTile
  int shares = 0;  // warps that share a token's queries and keys
};

__device__ __forceinline__ std::byte* Claim(const AppendParams& p, int64_t slot) {
  return p.arena + slot / kPageSize * kPageUnit;
}

// Two runs of eight elements of a head, as they lie in memory.
template <class Input>
struct Raw;
template <>
struct Raw<__nv_bfloat16> {
  uint4 run[2];
};
template <>
struct Raw<float> {
  uint4 run[4];
};

template <class Input>
__device__ __forceinline__ Raw<Input> Load(const Input* first, const Input* second) {
  Raw<Input> raw;
  if constexpr (sizeof(Input) == 2) {
    raw.run[0] = LoadStreaming(first);
    raw.run[1] = LoadStreaming(second);
  } else {
    raw.run[0] = LoadStreaming(first);
    raw.run[1] = LoadStreaming(first + 4);
    raw.run[2] = LoadStreaming(second);
    raw.run[3] = LoadStreaming(second + 4);
  }
  return raw;
}

__device__ __forceinline__ void WidenPair(uint32_t pair, float* x) {
  x[0] = __uint_as_float(pair << 16);
  x[1] = __uint_as_float(pair & 0xFFFF0000);
}

template <class Input>
__device__ __forceinline__ void Widen(const Raw<Input>& raw, float (&x)[16]) {
  if constexpr (sizeof(Input) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      WidenPair(raw.run[i].x, x + 8 * i);
      WidenPair(raw.run[i].y, x + 8 * i + 2);
      WidenPair(raw.run[i].z, x + 8 * i + 4);
      WidenPair(raw.run[i].w, x + 8 * i + 6);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[4 * i] = __uint_as_float(raw.run[i].x);
      x[4 * i + 1] = __uint_as_float(raw.run[i].y);
      x[4 * i + 2] = __uint_as_float(raw.run[i].z);
      x[4 * i + 3] = __uint_as_float(raw.run[i].w);
    }
  }
}

// Eight codes to `first` and eight to `second`.
__device__ __forceinline__ void StoreCodes(const Codes& codes, bool is_16bit, void* first,
                                           void* second) {
  const uint32_t* word = codes.word;
  if (is_16bit) {
    *static_cast<uint4*>(first) = make_uint4(word[0], word[1], word[2], word[3]);
    *static_cast<uint4*>(second) = make_uint4(word[4], word[5], word[6], word[7]);
  } else {
    *static_cast<uint2*>(first) = make_uint2(word[0], word[1]);
    *static_cast<uint2*>(second) = make_uint2(word[2], word[3]);
  }
}

// A layer's statistics. Its amax rarely changes, so most warps only read it, early.
class Reporter {
 public:
  __device__ Reporter(const AppendParams& p, int which)
      : saturated_(p.saturated == nullptr ? nullptr : p.saturated + which),
        amax_(p.amax == nullptr ? nullptr : p.amax + which),
        known_(amax_ == nullptr ? 0 : *const_cast<const volatile float*>(amax_)) {}
  // By a whole warp.
  __device__ void Report(Statistics statistics) const {
    statistics.amax = MaxOverLanes<32>(statistics.amax);
    statistics.saturated = __reduce_add_sync(0xFFFFFFFF, statistics.saturated);
    if (threadIdx.x % 32 != 0) return;
    if (saturated_ != nullptr && statistics.saturated > 0)
      atomicAdd(saturated_, static_cast<unsigned long long>(statistics.saturated));
    // No float here is negative, so they order as integers.
    if (amax_ != nullptr && statistics.amax > known_)
      atomicMax(reinterpret_cast<int*>(amax_), __float_as_int(statistics.amax));
  }

 private:
  unsigned long long* saturated_;
  float* amax_;
  float known_;
};

}  // namespace octavo::cuda
