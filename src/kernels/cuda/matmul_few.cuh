// Products of few rows with a stream of weights: 16 rows of the weights (outputs) are the rows of
// A of mma.m16n8k16, 8 rows of x the columns of B.
//
// A lane reads eight neighbouring elements of k of the weight rows lane/4 and lane/4 + 8, and of
// the row of x lane/4: whatever order mma gives the eight, weights and x share it. So nothing is
// transposed or exchanged. Of bfloat16 weights these are 16 bytes each, and a warp takes 32 of k
// per step; MXFP4 weights lie so that 16 bytes are the same of both rows, for 64 of k. The warps of
// a block take steps in turn and add up at the end, always in the same order.
#pragma once

#include "kernels/cuda/mxfp4.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/vector8.cuh"

namespace octavo::cuda {

inline constexpr int kFewOuts = 16;  // outputs of a block

// Weights pass through once.
__device__ __forceinline__ uint4 LoadWeights(const BFloat16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// A lane's part of 16 outputs of a matrix [outs, k] of bfloat16, read in pieces of a step each. A
// piece is 32 of k, kStep / 32 times: Low and High are those that this lane multiplies. Outputs
// behind the last are read from the last.
struct BFloat16Few {
  static constexpr int kWarps = 8;                            // of a block
  static constexpr int kStep = 32, kStride = kWarps * kStep;  // of k: of a warp, of a block
  static constexpr int kMultiple = 8;                         // that k is of
  static constexpr int kAhead = 4;       // steps whose weights are on their way: 4 KiB per warp
  static constexpr int kAheadOfTwo = 2;  // the same, of two matrices
  static constexpr int kFarAhead = 8;    // where a multiprocessor has two blocks, not more
  static constexpr bool kEarlyXOfTwo = true;
  static constexpr int kBlocks = 4, kBlocksOfTwo = 2;  // of a multiprocessor
  struct Piece {
    uint4 low{}, high{};
    __device__ const uint4& Low(int) const { return low; }
    __device__ const uint4& High(int) const { return high; }
  };

  __device__ BFloat16Few(const void* matrix, int first_out, int outs, int k_) : k(k_) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int first = min(first_out + lane / 4, outs - 1),
              second = min(first_out + lane / 4 + 8, outs - 1);
    low = static_cast<const BFloat16*>(matrix) + int64_t{first} * k + lane % 4 * 8;
    high_offset = (second - first) * k;
  }
  // Step i of this warp's, counted from where it advanced to; it begins at `at` of k.
  __device__ Piece Load(int /*i*/, int at) const {
    if (at + static_cast<int>(threadIdx.x % 4) * 8 >= k) return {};
    return {LoadWeights(low + at), LoadWeights(low + at + high_offset)};
  }
  __device__ void Advance(int /*steps*/) {}

  const BFloat16* low;
  int high_offset, k;
};

// The same of an MXFP4 matrix.
struct Mxfp4Few {
  static constexpr int kWarps = 4;  // so that all blocks of one row's experts fit at once
  static constexpr int kStep = mxfp4::kTileColumns, kStride = kWarps * kStep;
  static constexpr int kMultiple = mxfp4::kBlock;
  static constexpr int kAhead = 5;  // 2.7 KiB per warp
  static constexpr int kAheadOfTwo = 3;
  static constexpr bool kEarlyXOfTwo = false;  // there are no registers
  static constexpr int kBlocks = 6, kBlocksOfTwo = 6;
  using Piece = Mxfp4Piece;

  __device__ Mxfp4Few(const void* matrix, int first_out, int /*outs*/, int k_)
      : tiles(static_cast<const std::byte*>(matrix) + mxfp4::TileOffset(k_, first_out, 0) +
              static_cast<int>(threadIdx.x / 32) * mxfp4::kTileBytes),
        k(k_) {}
  __device__ Piece Load(int i, int at) const {
    if (at >= k) return {};
    return tiles.Load(i * kWarps * mxfp4::kTileBytes);
  }
  __device__ void Advance(int steps) { tiles.Advance(steps * kWarps * mxfp4::kTileBytes); }

  Mxfp4Tiles tiles;
  int k;
};

// sums[n] += weights[16 outs, k] . x[8 n + 8 rows, k]
__device__ __forceinline__ void FewProduct(float (&sums)[4], const uint4& low, const uint4& high,
                                           const uint4& x) {
  MmaBF16(sums, low.x, high.x, low.y, high.y, x.x, x.y);
  MmaBF16(sums, low.z, high.z, low.w, high.w, x.z, x.w);
}

// This lane's eight elements of x; float32 ones as the sum of two bfloat16.
template <class X>
struct FewX;
template <>
struct FewX<BFloat16> {
  uint4 x{};
  __device__ void Load(const BFloat16* p) { x = *reinterpret_cast<const uint4*>(p); }
  __device__ void Multiply(float (&sums)[4], const uint4& low, const uint4& high) const {
    FewProduct(sums, low, high, x);
  }
};
template <>
struct FewX<float> {
  uint4 x{}, rest{};
  __device__ void Load(const float* p) {
    const Vector8 v = Load8(p);
    Vector8 difference;
    alignas(16) BFloat16 rounded[8], remainder[8];
    Store8(rounded, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) difference.v[i] = v.v[i] - ToFloat(rounded[i]);
    Store8(remainder, difference);
    x = *reinterpret_cast<const uint4*>(rounded);
    rest = *reinterpret_cast<const uint4*>(remainder);
  }
  __device__ void Multiply(float (&sums)[4], const uint4& low, const uint4& high) const {
    FewProduct(sums, low, high, x);
    FewProduct(sums, low, high, rest);
  }
};

// One warp's share of k, of 16 outputs of each matrix and 8 * kTiles rows of x. `x_row(n)`: the
// row of x that this lane reads for tile n, at this lane's first element. `inputs` is called once
// the weights' first loads are on their way. With kEarlyX x is asked for as early as the weights,
// which takes registers.
template <int kAhead, bool kEarlyX, class X, class Weights, int kMatrices, int kTiles, class XRow,
          class Inputs>
__device__ __forceinline__ void StreamFew(Weights (&weights)[kMatrices], int k, const XRow& x_row,
                                          const Inputs& inputs,
                                          float (&sums)[kMatrices][kTiles][4]) {
  constexpr int kStep = Weights::kStep, kStride = Weights::kStride, kParts = kStep / 32;
  const int first_k = static_cast<int>(threadIdx.x / 32) * kStep;
  const int lane_k = static_cast<int>(threadIdx.x % 4) * 8;
  constexpr int kXs = kEarlyX ? kAhead : 1;
  static_assert(!kEarlyX || Weights::kMultiple % 32 != 0, "load_x() would read behind x");
  typename Weights::Piece pieces[kAhead][kMatrices];
  FewX<X> x[kXs][kParts][kTiles];
  const X* rows[kTiles];
  const auto load = [&](int i, int first) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
      pieces[i % kAhead][m] = weights[m].Load(i, first + i * kStride);
  };
  const auto load_x = [&](int i, int first) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int at = first + i * kStride + 32 * part;
      const bool present = (Weights::kMultiple % 32 == 0 && part == 0) || at + lane_k < k;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        x[i % kXs][part][n] = {};
        if (present) x[i % kXs][part][n].Load(rows[n] + at);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, first_k);
  inputs();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) rows[n] = x_row(n);
  if constexpr (kEarlyX) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_x(i, first_k);
  }
  for (int first = first_k; first < k; first += kAhead * kStride) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (kParts > 1 && first + i * kStride >= k) break;  // widening nothing takes time
      if constexpr (!kEarlyX) load_x(i, first);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          const uint4& low = pieces[i][m].Low(part);
          const uint4& high = pieces[i][m].High(part);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) x[i % kXs][part][n].Multiply(sums[m][n], low, high);
        }
      }
      load(i + kAhead, first);
      if constexpr (kEarlyX) load_x(i + kAhead, first);
    }
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) weights[m].Advance(kAhead);
  }
}

// The warps' sums, added in order.
template <int kWarps, int kTiles>
struct FewPartials {
  static constexpr int kRows = 8 * kTiles;
  float sums[kWarps][kFewOuts][kRows + 1];

  __device__ void Put(const float (&own)[kTiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int out = lane / 4, row = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      sums[warp][out][8 * n + row] = own[n][0];
      sums[warp][out][8 * n + row + 1] = own[n][1];
      sums[warp][out + 8][8 * n + row] = own[n][2];
      sums[warp][out + 8][8 * n + row + 1] = own[n][3];
    }
  }
  __device__ float Sum(int out, int row) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][out][row];
    return sum;
  }
};

}  // namespace octavo::cuda
