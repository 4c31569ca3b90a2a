// One warp, one page in shared memory, up to 8 * kTiles query rows: scores, softmax, and the
// weighted sum of values, on mma.sync with keys (then value columns) as the 16 rows of A.
//
// Which key stands in which row of A is ours to choose, as is the order of head_dim in the sum of a
// score. Both are chosen so that a lane reads 16 bytes at a time and so that probabilities, turned
// by movmatrix, are B operands as they are. In scores, row i + 8 h (i < 8, h < 2) of A's tile m is
//   8-bit V:  key 16 (i / 2) + 8 h + 2 m + i % 2    16-bit V:  key 8 (i / 2) + 32 h + 2 m + i % 2.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/cuda/ptx.cuh"
#include "octavo/kv_layout.h"

namespace octavo::cuda {

template <KvFormat kFormat_>
struct FormatTag {
  static constexpr KvFormat kFormat = kFormat_;
};

__host__ __device__ constexpr bool IsWide(KvFormat f) {
  return f == KvFormat::kBF16 || f == KvFormat::kF16;
}
__host__ __device__ constexpr bool HasScaleInPage(KvFormat f) {
  return f == KvFormat::kFp8PerTokenHead || f == KvFormat::kInt8PerTokenHead;
}

// A kernel's formats: one that is known when it is compiled, or any.
inline constexpr int kAnyFormat = -1;
template <int kFormat>
__device__ __forceinline__ KvFormat Resolve(KvFormat format) {
  return kFormat == kAnyFormat ? format : static_cast<KvFormat>(kFormat);
}
// f(FormatTag) with a tag that stands for the elements' type.
template <int kFormat, class F>
__device__ __forceinline__ void WithElements(KvFormat format, F&& f) {
  if constexpr (kFormat != kAnyFormat) {
    f(FormatTag<static_cast<KvFormat>(kFormat)>());
  } else {
    switch (format) {
      case KvFormat::kBF16:
        return f(FormatTag<KvFormat::kBF16>());
      case KvFormat::kF16:
        return f(FormatTag<KvFormat::kF16>());
      case KvFormat::kFp8E5M2:
        return f(FormatTag<KvFormat::kFp8E5M2>());
      case KvFormat::kInt8PerTokenHead:
        return f(FormatTag<KvFormat::kInt8PerTokenHead>());
      default:
        return f(FormatTag<KvFormat::kFp8E4M3>());
    }
  }
}

// Four 8-bit elements to two pairs of float16, all exact.
template <KvFormat kFormat>
__device__ __forceinline__ void Widen(uint32_t four, uint32_t& low, uint32_t& high) {
  if constexpr (kFormat == KvFormat::kFp8E5M2) {  // the upper byte of a float16
    low = __byte_perm(four, 0, 0x1404);
    high = __byte_perm(four, 0, 0x3424);
  } else if constexpr (kFormat == KvFormat::kInt8PerTokenHead) {
    // Byte b under the exponent of 1024 reads as 1024 + b.
    const uint32_t biased = four ^ 0x80808080u;
    constexpr uint32_t kMinus1152 = 0xE480E480u;
    asm("add.rn.f16x2 %0, %1, %2;"
        : "=r"(low)
        : "r"(__byte_perm(biased, 0x64646464u, 0x4140)), "r"(kMinus1152));
    asm("add.rn.f16x2 %0, %1, %2;"
        : "=r"(high)
        : "r"(__byte_perm(biased, 0x64646464u, 0x4342)), "r"(kMinus1152));
  } else {
    low = WidenE4M3(static_cast<uint16_t>(four));
    high = WidenE4M3(static_cast<uint16_t>(four >> 16));
  }
}

template <KvFormat kFormat>
__device__ __forceinline__ void Mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint2 b) {
  if constexpr (kFormat == KvFormat::kBF16) {
    MmaBF16(d, a0, a1, a2, a3, b.x, b.y);
  } else {
    MmaF16(d, a0, a1, a2, a3, b.x, b.y);
  }
}

__device__ __forceinline__ uint32_t Word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ uint4 Load16(const std::byte* p) {
  return *reinterpret_cast<const uint4*>(p);
}

// Query fragments in shared memory, [kDim / 16 steps][2 tiles][32 lanes] b0 and b1 of the step.
// Lane 4 i + t holds row 8 tile + i; its four dimensions are QueryDim(step, t) and those behind it.
__host__ __device__ constexpr int QueryStep(bool wide_k, int dim) {
  return wide_k ? 2 * (dim / 32) + dim / 4 % 2 : 4 * (dim / 64) + dim / 4 % 4;
}
__host__ __device__ constexpr int QueryLane(bool wide_k, int dim) {
  return wide_k ? dim / 8 % 4 : dim / 16 % 4;
}

// Keys of a lane's rows of A, and of its scores: Key(m, h) from the page's first.
struct LaneKeys {
  int first, half;
  __device__ __forceinline__ LaneKeys(bool wide_v, int lane) {
    const int i = lane / 4;
    first = (wide_v ? 8 : 16) * (i / 2) + i % 2;
    half = wide_v ? 32 : 8;
  }
  __device__ __forceinline__ int Key(int m, int h) const { return first + 2 * m + half * h; }
};

// s[m][tile] = scores of 16 keys and 8 rows: rows i = lane / 4 and i + 8 of A's tile m, query rows
// 2 (lane % 4) and the next.
template <int kDim, int kTiles, KvFormat kK>
__device__ __forceinline__ void Scores(FormatTag<kK>, const std::byte* k, const LaneKeys& keys,
                                       const uint2* q, int lane, float (&s)[4][kTiles][4]) {
  constexpr bool kWide = IsWide(kK);
  constexpr int kRowBytes = kDim * (kWide ? 2 : 1);
  constexpr int kSteps = kWide ? 2 : 4;  // of 16 dimensions in 64 bytes
  const std::byte* lane_k = k + keys.first * kRowBytes + 16 * (lane % 4);
  const int half_bytes = keys.half * kRowBytes;
  // With 128 registers of sums there is room for half of the keys at a time.
  constexpr int kTogether = kDim * kTiles == 512 ? 2 : 4;
#pragma unroll
  for (int block = 0; block < kRowBytes / 64; ++block) {
#pragma unroll
    for (int begin = 0; begin < 4; begin += kTogether) {
      uint4 rows[kTogether][2];
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        const std::byte* row = lane_k + 2 * (begin + m) * kRowBytes + 64 * block;
        rows[m][0] = Load16(row);
        rows[m][1] = Load16(row + half_bytes);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint2 b[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          b[tile] = q[((block * kSteps + step) * 2 + tile) * 32 + lane];
        }
#pragma unroll
        for (int m = 0; m < kTogether; ++m) {
          uint32_t a0, a1, a2, a3;
          if constexpr (kWide) {
            a0 = Word(rows[m][0], 2 * step);
            a2 = Word(rows[m][0], 2 * step + 1);
            a1 = Word(rows[m][1], 2 * step);
            a3 = Word(rows[m][1], 2 * step + 1);
          } else {
            Widen<kK>(Word(rows[m][0], step), a0, a2);
            Widen<kK>(Word(rows[m][1], step), a1, a3);
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            Mma<kK>(s[begin + m][tile], a0, a1, a2, a3, b[tile]);
          }
        }
      }
    }
  }
}

// o[i][tile] += value columns 16 i ... of 8 rows. p[tile][m] as Probabilities makes them.
template <int kDim, int kTiles, KvFormat kV>
__device__ __forceinline__ void Values(FormatTag<kV>, const std::byte* v, int lane,
                                       const uint2 (&p)[kTiles][4],
                                       float (&o)[kDim / 16][kTiles][4]) {
  constexpr bool kWide = IsWide(kV);
  constexpr int kRowBytes = kPageSize * (kWide ? 2 : 1);
  constexpr int kTogether = kTiles == 1 ? 2 : 1;  // so that products need not wait for each other
  const std::byte* lane_v = v + lane / 4 * kRowBytes + 16 * (lane % 4);
#pragma unroll
  for (int i = 0; i < kDim / 16; i += kTogether) {
    uint4 rows[kTogether][2][kWide ? 2 : 1];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::byte* row = lane_v + (16 * (i + j) + 8 * h) * kRowBytes;
        rows[j][h][0] = Load16(row);
        if constexpr (kWide) rows[j][h][1] = Load16(row + 64);
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        uint32_t a0, a1, a2, a3;
        if constexpr (kWide) {
          a0 = Word(rows[j][0][0], m);
          a2 = Word(rows[j][0][1], m);
          a1 = Word(rows[j][1][0], m);
          a3 = Word(rows[j][1][1], m);
        } else {
          Widen<kV>(Word(rows[j][0][0], m), a0, a2);
          Widen<kV>(Word(rows[j][1][0], m), a1, a3);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Mma<kV>(o[i + j][tile], a0, a1, a2, a3, p[tile][m]);
        }
      }
    }
  }
}

// Probabilities to B operands: p[tile][m] holds keys Key(m, 0) and Key(m, 1) of A's rows, turned.
template <int kTiles, KvFormat kV>
__device__ __forceinline__ void Probabilities(FormatTag<kV>, const float (&s)[4][kTiles][4],
                                              uint2 (&p)[kTiles][4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float* x = s[m][tile];
      if constexpr (kV == KvFormat::kBF16) {
        p[tile][m] = {Movmatrix(PackBF16(x[0], x[1])), Movmatrix(PackBF16(x[2], x[3]))};
      } else {
        p[tile][m] = {Movmatrix(PackF16(x[0], x[1])), Movmatrix(PackF16(x[2], x[3]))};
      }
    }
  }
}

}  // namespace octavo::cuda
