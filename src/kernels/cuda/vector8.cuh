// Eight elements of bfloat16 or float32, read and written 16 bytes at a time, as float32 between.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace octavo::cuda {

using BFloat16 = __nv_bfloat16;

struct Vector8 {
  float v[8];
};

__device__ __forceinline__ Vector8 Load8(const float* p) {
  Vector8 x;
  *reinterpret_cast<float4*>(x.v) = *reinterpret_cast<const float4*>(p);
  *reinterpret_cast<float4*>(x.v + 4) = *reinterpret_cast<const float4*>(p + 4);
  return x;
}
__device__ __forceinline__ Vector8 Load8(const BFloat16* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  Vector8 x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.v[2 * i] = __uint_as_float(words[i] << 16);
    x.v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
  return x;
}

__device__ __forceinline__ void Store8(float* p, const Vector8& x) {
  *reinterpret_cast<float4*>(p) = *reinterpret_cast<const float4*>(x.v);
  *reinterpret_cast<float4*>(p + 4) = *reinterpret_cast<const float4*>(x.v + 4);
}
__device__ __forceinline__ void Store8(BFloat16* p, const Vector8& x) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x.v[2 * i], x.v[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(BFloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T FromFloat(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return __float2bfloat16_rn(x);
}

}  // namespace octavo::cuda
