// MXFP4 weights (kernels/mxfp4.h) in a warp's registers.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/mxfp4.h"

namespace octavo::cuda {

// Eight values of a word times their scale as bfloat16, in order: exact. `factor`: 2^126 times the
// scale, twice. Right shifts and masks are what costs: a multiprocessor does 64 of them at a time,
// left shifts elsewhere at the same time.
__device__ __forceinline__ uint4 WidenMxfp4(uint32_t word, uint32_t factor) {
  return make_uint4(MultiplyBF16(mxfp4::TinyPair(word, 0), factor),
                    MultiplyBF16(mxfp4::TinyPair(word, 1), factor),
                    MultiplyBF16(mxfp4::TinyPair(word, 2), factor),
                    MultiplyBF16(mxfp4::TinyPair(word, 3), factor));
}

// Where this lane's part of a tile begins, and its scales.
__device__ __forceinline__ const std::byte* LaneCodes(const std::byte* tile) {
  return tile + 16 * (threadIdx.x % 32);
}
__device__ __forceinline__ const std::byte* LaneScales(const std::byte* tile) {
  return tile + mxfp4::kCodeBytes + threadIdx.x % 32 / 4 * 4;
}

// What a lane holds of a tile: piece `lane` and the scales of its two rows.
struct Mxfp4Piece {
  uint4 codes{};
  uint32_t scales = 0;

  // Columns 8 * (lane % 4) and on of the tile's first or second 32, of row lane / 4 and of row
  // lane / 4 + 8.
  __device__ __forceinline__ uint4 Low(int half) const {
    return WidenMxfp4(half ? codes.z : codes.x, Factor(2 * half));
  }
  __device__ __forceinline__ uint4 High(int half) const {
    return WidenMxfp4(half ? codes.w : codes.y, Factor(2 * half + 1));
  }

 private:
  // The scale's code becomes exponent bits: 2^(code - 127 + 126).
  __device__ __forceinline__ uint32_t Factor(int i) const {
    return __byte_perm(scales, 0, 0x4040 | i << 8 | i) * 0x80 + 0x3F003F00;
  }
};

// Where a lane reads tiles in global memory.
class Mxfp4Tiles {
 public:
  __device__ explicit Mxfp4Tiles(const std::byte* tile) {
    codes_ = LaneCodes(tile);
    scales_ = LaneScales(tile);
    // Two registers each; ptxas would rather add them up anew for every load.
    asm volatile("" : "+l"(codes_), "+l"(scales_));
  }
  __device__ __forceinline__ Mxfp4Piece Load(int bytes) const {
    Mxfp4Piece piece;
    piece.codes = LoadStreaming(codes_ + bytes);
    piece.scales = __ldg(reinterpret_cast<const uint32_t*>(scales_ + bytes));
    return piece;
  }
  __device__ void Advance(int bytes) {
    codes_ += bytes;
    scales_ += bytes;
  }

 private:
  const std::byte *codes_, *scales_;
};

// Where column k of what these are multiplied with must stand for wgmma, of whose A a lane holds
// columns 2 c, 2 c + 1 of each eight; of a tile it holds eight neighbours in 32.
__host__ __device__ constexpr int MmaColumn(int k) {
  return (k & ~31) | (k & 6) << 2 | (k >> 3 & 3) << 1 | (k & 1);
}

}  // namespace octavo::cuda
