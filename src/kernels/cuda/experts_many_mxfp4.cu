// Experts of MXFP4 for many rows: outputs are the rows of wgmma's A, which may come from registers,
// and are widened on their way there; pairs are the columns of B, as few as a tile has. So weights
// pass through shared memory as they are, and with few pairs their bytes are what a tile costs.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts_many.cuh"
#include "kernels/cuda/mxfp4.cuh"

namespace octavo::cuda {
namespace {

// Of sums[m][4 j + 2 half + i], the output is `out + 8 half`, the pair 8 j + 2 (lane % 4) + i of
// the tile's.
template <int kN>
__device__ __forceinline__ void PutActivated(const ExpertsParams& p, const ExpertTile& tile,
                                             int out, const float (&sums)[2][kN / 2]) {
  const Activator activated(p.activation, p.limit);
  const int lane = static_cast<int>(threadIdx.x % 32);
  float gate_bias[2] = {}, up_bias[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!p.gate_bias || out + 8 * half >= p.intermediate) continue;
    const int64_t at = tile.expert * p.bias_stride + out + 8 * half;
    gate_bias[half] = ToFloat(p.gate_bias[at]);
    up_bias[half] = ToFloat(p.up_bias[at]);
  }
  const int column = out - lane / 4 + lane % 4 * 2;  // two neighbours, once transposed
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    uint32_t two[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* gate = sums[0] + 4 * j + 2 * half;
      const float* up = sums[1] + 4 * j + 2 * half;
      two[half] = Movmatrix(PackBF16(activated(gate[0] + gate_bias[half], up[0] + up_bias[half]),
                                     activated(gate[1] + gate_bias[half], up[1] + up_bias[half])));
    }
    const int pair = tile.begin + 8 * j + lane / 4;
    if (pair < tile.end && column < p.intermediate) {
      BFloat16* row = p.activated + int64_t{pair} * p.intermediate;
      *reinterpret_cast<uint2*>(row + MmaColumn(column)) = make_uint2(two[0], two[1]);
    }
  }
}

// `outs`: of either matrix.
template <int kN, int kMatrices>
__device__ __forceinline__ void PutResults(const ExpertsParams& p, const ExpertTile& tile,
                                           const int (&outs)[kMatrices],
                                           const float (&sums)[kMatrices][kN / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float bias[kMatrices][2] = {};
#pragma unroll
  for (int i = 0; i < 2 * kMatrices; ++i) {
    const int out = outs[i / 2] + i % 2 * 8;
    if (p.down_bias && out < p.hidden)
      bias[i / 2][i % 2] = ToFloat(p.down_bias[tile.expert * p.bias_stride + out]);
  }
  // Loads before stores, and no branches: ptxas would put each where it is needed, and wait for it.
  constexpr int kTogether = 8;
#pragma unroll
  for (int first = 0; first < kN / 4; first += kTogether) {
    const auto pair = [&](int n) {
      return tile.begin + (first + n) / 2 * 8 + lane % 4 * 2 + (first + n) % 2;
    };
    int source[kTogether];
    float weight[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) source[n] = __ldg(p.sorted + min(pair(n), tile.end - 1));
#pragma unroll
    for (int n = 0; n < kTogether; ++n) weight[n] = __ldg(p.pair_weights + source[n]);
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      float* to = p.results + int64_t{source[n]} * p.hidden;
#pragma unroll
      for (int i = 0; i < 2 * kMatrices; ++i) {
        const int out = outs[i / 2] + i % 2 * 8;
        const float sum = sums[i / 2][(first + n) / 2 * 4 + i % 2 * 2 + n % 2];
        if (pair(n) < tile.end && out < p.hidden) to[out] = (sum + bias[i / 2][i % 2]) * weight[n];
      }
    }
  }
}

__device__ __forceinline__ Mxfp4Piece SharedPiece(const std::byte* tile) {
  return {*reinterpret_cast<const uint4*>(LaneCodes(tile)),
          *reinterpret_cast<const uint32_t*>(LaneScales(tile))};
}

// Warpgroups take 64 outputs each: of both matrices, or, where there are four of them for down, of
// one. Narrow tiles of few pairs leave registers for twice as many.
template <bool kGateUp, bool kNarrow>
struct Mxfp4ManyTiles {
  static constexpr bool kGated = kGateUp;
  static constexpr int kPairs = kNarrow ? kNarrowExpertTile : kWideExpertTile;
  static constexpr int kConsumers = kNarrow ? 4 : 2;
  static constexpr int kMatrices = kNarrow && !kGated ? 1 : 2;  // of a warpgroup
  static constexpr int kOuts = 64 * kConsumers * kMatrices / 2;
  static constexpr int kStages = 8, kBoxPairs = 16;
  static constexpr int kStepX = mxfp4::kTileBytes / 4, kRowsY = mxfp4::kTileRows;
  static constexpr int kBytes = kOuts / kRowsY * mxfp4::kTileBytes;
  static_assert(kManyStepK == mxfp4::kTileColumns);

  static CUtensorMap Map(const void* base, int64_t k, int64_t outs, int64_t experts,
                         int64_t stride) {
    const auto unsigned64 = [](int64_t n) { return static_cast<cuuint64_t>(n); };
    const int64_t row = mxfp4::TilesAcross(k) * mxfp4::kTileBytes;
    const cuuint64_t dims[] = {unsigned64(row / 4), unsigned64(mxfp4::Bytes(outs, k) / row),
                               unsigned64(experts)};
    const cuuint64_t strides[] = {unsigned64(row),
                                  unsigned64(std::max(stride, mxfp4::Bytes(outs, k)))};
    const cuuint32_t box[] = {kStepX, kOuts / kRowsY, 1};
    return MakeWordTensorMap(base, 3, dims, strides, box);
  }

  // ptxas finds registers for so many widths of the product.
  static __device__ __forceinline__ void Take(const ManyTile& tile, const ExpertsParams& p,
                                              ManyRing<Mxfp4ManyTiles>& ring) {
    if constexpr (!kNarrow) {
      if (tile.pairs.end - tile.pairs.begin <= kPairs / 2) {
        TakeWidth<kPairs / 2>(tile, p, ring);
        return;
      }
    }
    TakeWidth<kPairs>(tile, p, ring);
  }

 private:
  // Of all outputs of a tile, those of the first matrix before those of the second.
  static __device__ int FirstOut(int matrix) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    return matrix * kOuts + warp * 16;
  }

  template <int kN>
  static __device__ __forceinline__ void TakeWidth(const ManyTile& tile, const ExpertsParams& p,
                                                   ManyRing<Mxfp4ManyTiles>& ring) {
    float sums[kMatrices][kN / 2] = {};
    Multiply<kN>(tile.steps, ring, sums);
    const int row = static_cast<int>(threadIdx.x % 32) / 4;
    if constexpr (kGated) {
      PutActivated<kN>(p, tile.pairs, tile.out + FirstOut(0) + row, sums);
    } else {
      int outs[kMatrices];
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) outs[m] = tile.out + FirstOut(m) + row;
      PutResults<kN>(p, tile.pairs, outs, sums);
    }
  }

  // sums[m]: this warpgroup's 64 outputs of a matrix, by kN pairs.
  template <int kN>
  static __device__ __forceinline__ void Multiply(int steps, ManyRing<Mxfp4ManyTiles>& ring,
                                                  float (&sums)[kMatrices][kN / 2]) {
    uint32_t a[2][kMatrices][8];
    MultiplyStages(steps, ring, [&](int) {
      const WgmmaOperand<kManyRowBytes> x(ring.stage().x);
      const std::byte* weights = ring.stage().weights[0];
      Mxfp4Piece pieces[kMatrices];
#pragma unroll
      for (int m = 0; m < kMatrices; ++m)
        pieces[m] = SharedPiece(weights + FirstOut(m) / kRowsY * mxfp4::kTileBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        WgmmaWait<1>();  // for the last products of a[half]
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          const uint4 low = pieces[m].Low(half), high = pieces[m].High(half);
          const uint32_t both[] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) a[half][m][i] = both[i];
        }
        WgmmaFence();
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t(&f)[8] = a[half][m];
            Wgmma<WgmmaType::kBF16, kN>::RS(sums[m], f[4 * i], f[4 * i + 1], f[4 * i + 2],
                                            f[4 * i + 3], x.At(64 * half + 32 * i), 1);
          }
        }
        WgmmaCommit();
      }
    });
  }
};

}  // namespace

void RunManyMxfp4Experts(const ExpertsParams& p, cudaStream_t stream) {
  if (p.tile_pairs == kNarrowExpertTile)
    RunManyProducts<Mxfp4ManyTiles<true, true>, Mxfp4ManyTiles<false, true>>(p, stream);
  else
    RunManyProducts<Mxfp4ManyTiles<true, false>, Mxfp4ManyTiles<false, false>>(p, stream);
}

}  // namespace octavo::cuda
