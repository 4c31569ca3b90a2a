// MXFP4 weights (kernels/mxfp4.h) in a warp's registers.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/mxfp4.h"

namespace octavo::cuda {

// Eight values of a word times their scale as bfloat16, in order: exact. `scale` is its code.
//
// Sign, exponent and mantissa of a value, put where bfloat16 has its sign, lowest exponent bits and
// highest mantissa bit, are that value times 2^-126, subnormal ones too.
__device__ __forceinline__ uint4 WidenMxfp4(uint32_t word, uint32_t scale) {
  const uint32_t factor = scale * 0x00800080u + 0x3F003F00u;  // 2^(scale - 127 + 126), twice
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t on_top = word << (12 - 4 * i);  // of either half
    pairs[i] = MultiplyBF16((on_top & 0x80008000u) | ((on_top >> 6) & 0x01C001C0u), factor);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// What a lane holds of a tile: piece `lane` and the scales of its two rows.
struct Mxfp4Piece {
  uint4 codes{};
  uint32_t scales = 0;

  // Columns 8 * (lane % 4) and on of the tile's first or second 32, of row lane / 4 and of row
  // lane / 4 + 8.
  __device__ __forceinline__ uint4 Low(int half) const {
    return WidenMxfp4(half ? codes.z : codes.x, scales >> (16 * half) & 0xFF);
  }
  __device__ __forceinline__ uint4 High(int half) const {
    return WidenMxfp4(half ? codes.w : codes.y, scales >> (16 * half + 8) & 0xFF);
  }
};

__device__ __forceinline__ Mxfp4Piece LoadMxfp4Piece(const std::byte* tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Mxfp4Piece piece;
  piece.codes = LoadStreaming(tile + 16 * lane);
  piece.scales = __ldg(reinterpret_cast<const uint32_t*>(tile + mxfp4::kCodeBytes + lane / 4 * 4));
  return piece;
}

}  // namespace octavo::cuda
