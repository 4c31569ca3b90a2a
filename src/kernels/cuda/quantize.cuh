// Rounding sixteen elements of one head to a cache format, as base/float_bits.h defines it: divide
// in float32, round to nearest even, saturate 8-bit floats, keep NaN. Dynamic scales come from the
// whole head, whose elements are spread over `kLanes` neighbouring lanes of a warp.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "octavo/kv_layout.h"

namespace octavo::cuda {

__device__ __forceinline__ bool IsDynamic(KvFormat format) {
  return format == KvFormat::kFp8PerTokenHead || format == KvFormat::kInt8PerTokenHead;
}
__device__ __forceinline__ bool IsStaticFp8(KvFormat format) {
  return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
}
__device__ __forceinline__ bool Is16Bit(KvFormat format) {
  return format == KvFormat::kBF16 || format == KvFormat::kF16;
}

// The larger; NaN if either is.
__device__ __forceinline__ float MaxNaN(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ float LargestMagnitude(const float (&x)[16]) {
  float parts[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    parts[i] =
        MaxNaN(MaxNaN(fabsf(x[i]), fabsf(x[i + 4])), MaxNaN(fabsf(x[i + 8]), fabsf(x[i + 12])));
  return MaxNaN(MaxNaN(parts[0], parts[1]), MaxNaN(parts[2], parts[3]));
}

__device__ __forceinline__ float SumOfMagnitudes(const float (&x)[16]) {
  float parts[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) parts[i % 4] += fabsf(x[i]);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

template <int kLanes>
__device__ __forceinline__ float SumOverLanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, step);
  return x;
}

template <int kLanes>
__device__ __forceinline__ float MaxOverLanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = MaxNaN(x, __shfl_xor_sync(0xFFFFFFFF, x, step));
  return x;
}

// x / scale as __fdiv_rn rounds it, without a branch per element: the correction's remainder is
// exact, so that the last sum is the rounded quotient (Markstein). `factor` brings an extreme scale
// to where reciprocal and remainder are normal numbers.
struct Divisor {
  float scale, reciprocal, factor;
};
__device__ __forceinline__ Divisor MakeDivisor(float scale) {
  const float magnitude = fabsf(scale);
  const float factor = magnitude < 0x1p-60f ? 0x1p80f : magnitude > 0x1p60f ? 0x1p-80f : 1.0f;
  scale *= factor;
  const float rough = Reciprocal(scale);
  return {scale, fmaf(fmaf(-scale, rough, 1.0f), rough, rough), factor};
}
// x is already times `factor`, and |x / scale| below 2^100 or NaN.
__device__ __forceinline__ float Divide(float x, const Divisor& by) {
  const float first = x * by.reciprocal;
  const float second = fmaf(fmaf(-by.scale, first, x), by.reciprocal, first);
  // The sums make -0 positive.
  return copysignf(fmaf(fmaf(-by.scale, second, x), by.reciprocal, second), first);
}
inline constexpr float kDivides = 0x1p100f;

// A head's dynamic scale; NaN if any of its elements is NaN or infinite.
__device__ __forceinline__ float DynamicScale(float amax, bool is_int8) {
  const Divisor by{is_int8 ? 127.0f : 448.0f, is_int8 ? 1 / 127.0f : 1 / 448.0f, 1};
  if (!(amax <= FLT_MAX)) return __int_as_float(0x7FC00000);
  const float scale = amax < 0x1p-30f ? 1e-6f : fmaxf(Divide(amax, by), 1e-6f);
  if (is_int8) return scale;
  return __uint_as_float((__float_as_uint(scale) + 0x7FFFFF) & 0x7F800000);  // a power of two
}

// A query's scale: the magnitudes of its codes add up to 128, and with rounding to 136 at most, so
// that a score of codes is at most 136 * 448 < 65504 and its sums may be float16. Of e4m3's 15
// binades what lies below 2^-6 is subnormal. NaN if any element is NaN or infinite.
__device__ __forceinline__ float QueryScale(float magnitudes) {
  if (!(magnitudes <= FLT_MAX)) return __int_as_float(0x7FC00000);
  return fmaxf(magnitudes * (1.0f / 128), 1e-6f);
}

// What a thread saw of K or of V.
struct Statistics {
  float amax = 0;
  uint32_t saturated = 0;
};

// Sixteen codes: 8-bit in word[0] to word[3], 16-bit in all.
struct Codes {
  uint32_t word[8];
};

__device__ __forceinline__ uint32_t PackInt8(float a, float b, float c, float d) {
  // NaN becomes 0. A dynamic scale leaves nothing beyond 127.
  const uint32_t low = __byte_perm(__float2int_rn(a), __float2int_rn(b), 0x0040);
  const uint32_t high = __byte_perm(__float2int_rn(c), __float2int_rn(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// *scale: of a static format its scale, of a dynamic format set here. All lanes of the warp call.
template <int kLanes>
__device__ __forceinline__ Codes Quantize(KvFormat format, float (&x)[16], float* scale,
                                          Statistics& statistics) {
  Codes codes;
  const float largest = LargestMagnitude(x);
  const bool is_int8 = format == KvFormat::kInt8PerTokenHead;
  if (Is16Bit(format)) *scale = 1.0f;
  if (IsDynamic(format)) *scale = DynamicScale(MaxOverLanes<kLanes>(largest), is_int8);
  const Divisor by = MakeDivisor(*scale);

  // Of a dynamic format the elements themselves count; |x| / |scale| rises with |x|.
  const bool divides = IsStaticFp8(format);
  auto seen = [&](float magnitude) {
    if (!divides) return magnitude;
    const float quotient = magnitude * by.factor * fabsf(by.reciprocal);
    return quotient < kDivides ? fabsf(Divide(magnitude * by.factor, by)) : quotient;
  };
  const float limit = format == KvFormat::kFp8E4M3   ? 464.0f      // this tie goes to 448
                      : format == KvFormat::kFp8E5M2 ? 61439.996f  // a tie at 61440 goes beyond
                                                     : FLT_MAX;
  bool wild = false;
  if (const float s = seen(largest); s <= limit) {
    statistics.amax = fmaxf(statistics.amax, s);
  } else {  // something saturates or is not finite: rare, so a small loop
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      float one = fabsf(x[0]);
#pragma unroll
      for (int j = 1; j < 16; ++j) one = i == j ? fabsf(x[j]) : one;
      if (!(one <= FLT_MAX)) continue;
      one = seen(one);
      if (one > limit) ++statistics.saturated;
      if (one <= FLT_MAX) statistics.amax = fmaxf(statistics.amax, one);
    }
    wild = true;
  }
  if (format == KvFormat::kBF16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) codes.word[i] = PackBF16(x[2 * i], x[2 * i + 1]);
    return codes;
  }
  if (format == KvFormat::kF16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) codes.word[i] = PackF16(x[2 * i], x[2 * i + 1]);
    return codes;
  }
  if (by.factor != 1.0f) {
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= by.factor;
  }
  if (wild) {  // what Divide cannot take saturates all the same
    const float beyond = fabsf(by.scale) * 0x1p20f;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      x[i] = fabsf(x[i] * by.reciprocal) >= kDivides ? copysignf(beyond, x[i]) : x[i];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = Divide(x[i], by);
  if (format == KvFormat::kFp8E5M2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      codes.word[i] = PackE5M2(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  } else if (is_int8) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      codes.word[i] = PackInt8(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      codes.word[i] = PackE4M3(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }
  return codes;
}

}  // namespace octavo::cuda
