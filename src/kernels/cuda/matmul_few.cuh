// Products of few rows with a stream of weights: 16 rows of the weights (outputs) are the rows of
// A of mma.m16n8k16, 8 rows of x the columns of B.
//
// A lane reads eight neighbouring elements of k of the weight rows lane/4 and lane/4 + 8, and of
// the row of x lane/4: whatever order mma gives the eight, weights and x share it. So nothing is
// transposed or exchanged. Of bfloat16 weights these are 16 bytes each, and a warp takes 32 of k
// per step; MXFP4 weights lie so that 16 bytes are the same of both rows, for 64 of k. The warps of
// a block share k out in turn and add up at the end, always in the same order.
#pragma once

#include "kernels/cuda/mxfp4.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/vector8.cuh"

namespace octavo::cuda {

inline constexpr int kFewWarps = 8;
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
  static constexpr int kStep = 32;        // of k, of one warp
  static constexpr int kAhead = 4;        // steps whose weights are on their way: 4 KiB per warp
  static constexpr int kAheadOfTwo = 2;   // the same, of two matrices
  static constexpr int kBlocksOfTwo = 2;  // of a multiprocessor
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
    high_offset = int64_t{second - first} * k;
  }
  __device__ Piece Load(int at) const {
    if (at + static_cast<int>(threadIdx.x % 4) * 8 >= k) return {};
    return {LoadWeights(low + at), LoadWeights(low + at + high_offset)};
  }

  const BFloat16* low;
  int64_t high_offset;
  int k;
};

// The same of an MXFP4 matrix.
struct Mxfp4Few {
  static constexpr int kStep = mxfp4::kTileColumns;
  static constexpr int kAhead = 6;  // 3 KiB per warp
  static constexpr int kAheadOfTwo = 3;
  static constexpr int kBlocksOfTwo = 3;
  using Piece = Mxfp4Piece;

  __device__ Mxfp4Few(const void* matrix, int first_out, int /*outs*/, int k_)
      : tiles(static_cast<const std::byte*>(matrix) + mxfp4::TileOffset(k_, first_out, 0)), k(k_) {}
  __device__ Piece Load(int at) const {
    if (at >= k) return {};
    return LoadMxfp4Piece(tiles + mxfp4::TileOffset(k, 0, at));
  }

  const std::byte* tiles;
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

// One block's share of k, of 16 outputs of each matrix and 8 * kTiles rows of x. `x_row(n)`: the
// row of x that this lane reads for tile n, at this lane's first element, or null. `inputs` is
// called once the weights' first loads are on their way.
template <int kAhead, class X, class Weights, int kMatrices, int kTiles, class XRow, class Inputs>
__device__ __forceinline__ void StreamFew(const Weights (&weights)[kMatrices], int k,
                                          const XRow& x_row, const Inputs& inputs,
                                          float (&sums)[kMatrices][kTiles][4]) {
  const int lane_k = static_cast<int>(threadIdx.x % 4) * 8;
  const int warp = static_cast<int>(threadIdx.x / 32);
  constexpr int kStride = kFewWarps * Weights::kStep;
  typename Weights::Piece pieces[kAhead][kMatrices];
  const auto load = [&](int slot, int at) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) pieces[slot][m] = weights[m].Load(at);
  };
  int begin = warp * Weights::kStep;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, begin + i * kStride);
  inputs();
  const X* rows[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) rows[n] = x_row(n);
  while (begin < k) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = begin + i * kStride;
#pragma unroll
      for (int part = 0; part < Weights::kStep / 32; ++part) {
        const int x_at = at + 32 * part;
        const bool inside = x_at + lane_k < k;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          FewX<X> x;
          if (inside && rows[n]) x.Load(rows[n] + x_at);
#pragma unroll
          for (int m = 0; m < kMatrices; ++m)
            x.Multiply(sums[m][n], pieces[i][m].Low(part), pieces[i][m].High(part));
        }
      }
      load(i, at + kAhead * kStride);
    }
    begin += kAhead * kStride;
  }
}

// The warps' sums, added in order: partial[warp][out][row], rows of 8 * kTiles + 1 floats.
template <int kTiles>
struct FewPartials {
  static constexpr int kRows = 8 * kTiles;
  float sums[kFewWarps][kFewOuts][kRows + 1];

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
    for (int warp = 0; warp < kFewWarps; ++warp) sum += sums[warp][out][row];
    return sum;
  }
};

}  // namespace octavo::cuda
