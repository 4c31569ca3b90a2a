// Experts of bfloat16 for many rows: pairs are the rows of wgmma's A, 64 of each warpgroup, and the
// 256 outputs the columns of its B. Of the two ways it reads shared memory least; its copies and
// reads together are what the product waits for. Where a tile's pairs end before its second 64, the
// second warpgroup only lets the stages go.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts_many.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace octavo::cuda {
namespace {

constexpr int kBothOuts = 256;  // of both matrices

__device__ __forceinline__ float2 Bias2(const BFloat16* bias, int64_t at) {
  return bias ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(bias + at))
              : make_float2(0, 0);
}

// Accumulators 4 j + 2 half and the next are columns 8 j + 2 (lane % 4) and the next.
__device__ __forceinline__ void PutActivated(const ExpertsParams& p, const ExpertTile& tile,
                                             int pair, int half, int first_column,
                                             const float (&sums)[kBothOuts / 2]) {
  const Activator activated(p.activation, p.limit);
  BFloat16* to = p.activated + int64_t{pair} * p.intermediate;
#pragma unroll
  for (int j = 0; j < kBothOuts / 16; ++j) {
    const int column = first_column + 8 * j;
    if (column >= p.intermediate) break;
    const int64_t at = tile.expert * p.bias_stride + column;
    const float2 gate = Bias2(p.gate_bias, at), up = Bias2(p.up_bias, at);
    const float* g = sums + 4 * j + 2 * half;
    const float* u = g + kBothOuts / 4;
    *reinterpret_cast<uint32_t*>(to + column) =
        PackBF16(activated(g[0] + gate.x, u[0] + up.x), activated(g[1] + gate.y, u[1] + up.y));
  }
}

__device__ __forceinline__ void PutResults(const ExpertsParams& p, const ExpertTile& tile, int pair,
                                           int half, int first_column,
                                           const float (&sums)[kBothOuts / 2]) {
  const int source = p.sorted[pair];
  const float weight = p.pair_weights[source];
  float* to = p.results + int64_t{source} * p.hidden;
#pragma unroll
  for (int j = 0; j < kBothOuts / 8; ++j) {
    const int column = first_column + 8 * j;
    if (column >= p.hidden) break;
    const float2 bias = Bias2(p.down_bias, tile.expert * p.bias_stride + column);
    const float* s = sums + 4 * j + 2 * half;
    *reinterpret_cast<float2*>(to + column) =
        make_float2((s[0] + bias.x) * weight, (s[1] + bias.y) * weight);
  }
}

template <bool kGated>
struct BFloat16ManyTiles {
  static constexpr int kPairs = kWideExpertTile, kOuts = kBothOuts / 2, kConsumers = 2, kStages = 4;
  static constexpr int kBytes = kOuts * kManyRowBytes, kStepX = kManyRowBytes, kRowsY = 1;
  static constexpr int kBoxPairs = kPairs;

  static CUtensorMap Map(const void* base, int64_t k, int64_t outs, int64_t experts,
                         int64_t stride) {
    return BFloat16Map(base, k, outs, experts, stride, kOuts);
  }

  static __device__ __forceinline__ void Take(const ManyTile& tile, const ExpertsParams& p,
                                              ManyRing<BFloat16ManyTiles>& ring) {
    const int group = static_cast<int>(threadIdx.x / 128);
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (tile.pairs.begin + 64 * group >= tile.pairs.end) {
      for (int step = 0; step < tile.steps; ++step, ring.Next()) {
        ring.WaitFull();
        ring.LetGo(ring.index);
      }
      return;
    }
    float sums[kBothOuts / 2];
    Multiply(tile.steps, group, ring, sums);
    const int row = tile.pairs.begin + static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
    const int column = tile.out + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = row + 8 * half;
      if (pair >= tile.pairs.end) continue;
      if constexpr (kGated)
        PutActivated(p, tile.pairs, pair, half, column, sums);
      else
        PutResults(p, tile.pairs, pair, half, column, sums);
    }
  }

 private:
  // sums: this warpgroup's 64 pairs by 256 outputs.
  static __device__ __forceinline__ void Multiply(int steps, int group,
                                                  ManyRing<BFloat16ManyTiles>& ring,
                                                  float (&sums)[kBothOuts / 2]) {
    int previous = -1;
    for (int step = 0; step < steps; ++step, ring.Next()) {
      const WgmmaOperand<kManyRowBytes> x(ring.stage().x + group * 64 * kManyRowBytes),
          weights(ring.stage().weights);
      ring.WaitFull();
      WgmmaFence();
#pragma unroll
      for (int bytes = 0; bytes < kManyRowBytes; bytes += 32)
        Wgmma<WgmmaType::kBF16, kBothOuts>::SS(sums, x.At(bytes), weights.At(bytes), step + bytes);
      WgmmaCommit();
      WgmmaWait<1>();
      if (previous >= 0) ring.LetGo(previous);
      previous = ring.index;
    }
    WgmmaWait<0>();
    ring.LetGo(previous);
  }
};

}  // namespace

void RunManyBFloat16Experts(const ExpertsParams& p, cudaStream_t stream) {
  RunManyProducts<BFloat16ManyTiles<true>, BFloat16ManyTiles<false>>(p, stream);
}

}  // namespace octavo::cuda
