// Experts of MXFP4 for many rows: outputs are the rows of wgmma's A, which may come from registers,
// and are widened on their way there; pairs are the columns of B, as few as a tile has. So weights
// pass through shared memory as they are, and with few pairs their bytes are what a tile costs. A
// warpgroup takes 64 of the first and 64 of the second 128 outputs.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts_many.cuh"
#include "kernels/cuda/mxfp4.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace octavo::cuda {
namespace {

// What a lane holds of 64 outputs and a step: A, four times.
__device__ __forceinline__ void Widen(const std::byte* weights, uint32_t (&a)[16]) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const std::byte* tile = weights + warp * mxfp4::kTileBytes;
  const Mxfp4Piece piece{
      *reinterpret_cast<const uint4*>(tile + 16 * lane),
      *reinterpret_cast<const uint32_t*>(tile + mxfp4::kCodeBytes + lane / 4 * 4)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 low = piece.Low(half), high = piece.High(half);
    const uint32_t both[] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) a[8 * half + i] = both[i];
  }
}

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
      two[half] =
          Movmatrix(PackBF16(activated(gate[0] + gate_bias[half], up[0] + up_bias[half]),
                             activated(gate[1] + gate_bias[half], up[1] + up_bias[half])));
    }
    const int pair = tile.begin + 8 * j + lane / 4;
    if (pair < tile.end && column < p.intermediate) {
      BFloat16* row = p.activated + int64_t{pair} * p.intermediate;
      *reinterpret_cast<uint2*>(row + MmaColumn(column)) = make_uint2(two[0], two[1]);
    }
  }
}

template <int kN>
__device__ __forceinline__ void PutResults(const ExpertsParams& p, const ExpertTile& tile, int out,
                                           const float (&sums)[kN / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float bias[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (p.down_bias && out + 8 * half < p.hidden)
      bias[half] = ToFloat(p.down_bias[tile.expert * p.bias_stride + out + 8 * half]);
  }
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = tile.begin + 8 * j + lane % 4 * 2 + i;
      if (pair >= tile.end) break;
      const int source = p.sorted[pair];
      const float weight = p.pair_weights[source];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (out + 8 * half < p.hidden)
          p.results[int64_t{source} * p.hidden + out + 8 * half] =
              (sums[4 * j + 2 * half + i] + bias[half]) * weight;
      }
    }
  }
}

struct Mxfp4Weights {
  static constexpr int kBytes = kManyOuts / mxfp4::kTileRows * mxfp4::kTileBytes;
  static constexpr int kStepX = mxfp4::kTileBytes / 4, kRowsY = mxfp4::kTileRows;
  static constexpr int kStages = 8, kBoxPairs = 16;
  static_assert(kManyStepK == mxfp4::kTileColumns);

  static CUtensorMap Map(const void* base, int64_t k, int64_t outs, int64_t experts,
                         int64_t stride) {
    const auto unsigned64 = [](int64_t n) { return static_cast<cuuint64_t>(n); };
    const int64_t row = mxfp4::TilesAcross(k) * mxfp4::kTileBytes;
    const cuuint64_t dims[] = {unsigned64(row / 4), unsigned64(mxfp4::Bytes(outs, k) / row),
                               unsigned64(experts)};
    const cuuint64_t strides[] = {unsigned64(row),
                                  unsigned64(std::max(stride, mxfp4::Bytes(outs, k)))};
    const cuuint32_t box[] = {kStepX, kManyOuts / kRowsY, 1};
    return MakeWordTensorMap(base, 3, dims, strides, box);
  }

  // More widths of the product gain nothing, and ptxas finds no registers for them.
  template <bool kGated>
  static __device__ __forceinline__ void Take(const ManyTile& tile, const ExpertsParams& p,
                                              ManyRing<Mxfp4Weights>& ring) {
    if (tile.pairs.end - tile.pairs.begin <= 32)
      Take<kGated, 32>(tile, p, ring);
    else
      Take<kGated, kManyExpertPairs>(tile, p, ring);
  }

 private:
  template <bool kGated, int kN>
  static __device__ __forceinline__ void Take(const ManyTile& tile, const ExpertsParams& p,
                                              ManyRing<Mxfp4Weights>& ring) {
    float sums[2][kN / 2] = {};
    Multiply<kN>(tile.steps, ring, sums);
    const int row = static_cast<int>(threadIdx.x / 32) * 16 + static_cast<int>(threadIdx.x % 32) / 4;
    if constexpr (kGated) {
      PutActivated<kN>(p, tile.pairs, tile.out + row, sums);
    } else {
      PutResults<kN>(p, tile.pairs, tile.out + row, sums[0]);
      PutResults<kN>(p, tile.pairs, tile.second_out + row, sums[1]);
    }
  }

  // sums[m]: this warpgroup's 64 of the first or second outputs, by kN pairs.
  template <int kN>
  static __device__ __forceinline__ void Multiply(int steps, ManyRing<Mxfp4Weights>& ring,
                                                  float (&sums)[2][kN / 2]) {
    uint32_t a[2][16];
    int previous = -1;
    for (int step = 0; step < steps; ++step, ring.Next()) {
      const WgmmaOperand<kManyRowBytes> x(ring.stage().x);
      ring.WaitFull();
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        WgmmaWait<1>();  // for the last products of a[m]
        Widen(ring.stage().weights[m], a[m]);
        WgmmaFence();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Wgmma<WgmmaType::kBF16, kN>::RS(sums[m], a[m][4 * i], a[m][4 * i + 1], a[m][4 * i + 2],
                                          a[m][4 * i + 3], x.At(32 * i), 1);
        }
        WgmmaCommit();
      }
      if (previous >= 0) ring.LetGo(previous);
      previous = ring.index;
    }
    WgmmaWait<0>();
    ring.LetGo(previous);
  }
};

}  // namespace

void RunManyMxfp4Experts(const ExpertsParams& p, cudaStream_t stream) {
  RunManyExpertsOf<Mxfp4Weights>(p, stream);
}

}  // namespace octavo::cuda
