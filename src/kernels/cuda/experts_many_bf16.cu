// Experts of bfloat16 for many rows: pairs are the rows of wgmma's A, 64 of each warpgroup, and the
// 256 outputs the columns of its B, which of the two ways reads shared memory least. Where a tile's
// pairs end before its second 64, the second warpgroup only lets the stages go.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts_many.cuh"

namespace octavo::cuda {
namespace {

constexpr int kBothOuts = 256;  // of both matrices

// Two neighbouring biases each of columns first, first + 8, ...; behind the last column, the last.
// All loads stand before stores and branches, or ptxas puts each where it is needed and waits for
// it.
template <int kCount>
struct Biases {
  __nv_bfloat162 two[kCount];

  __device__ __forceinline__ Biases(const BFloat16* bias, int64_t at, int first, int columns) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      two[j] = bias ? *reinterpret_cast<const __nv_bfloat162*>(bias + at +
                                                               min(first + 8 * j, columns - 2))
                    : __nv_bfloat162{};
    }
  }
};

// Accumulators 4 j + 2 half and the next are pair `pair + 8 half`, columns first_column + 8 j and
// the next.
__device__ __forceinline__ void PutActivated(const ExpertsParams& p, const ExpertTile& tile,
                                             int pair, int first_column,
                                             const float (&sums)[kBothOuts / 2]) {
  const Activator activated(p.activation, p.limit);
  constexpr int kColumns = kBothOuts / 16;
  const int64_t at = tile.expert * p.bias_stride;
  const Biases<kColumns> gate_bias(p.gate_bias, at, first_column, p.intermediate),
      up_bias(p.up_bias, at, first_column, p.intermediate);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (pair + 8 * half >= tile.end) break;
    BFloat16* to = p.activated + int64_t{pair + 8 * half} * p.intermediate;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = first_column + 8 * j;
      if (column >= p.intermediate) break;
      const float2 gate = __bfloat1622float2(gate_bias.two[j]),
                   up = __bfloat1622float2(up_bias.two[j]);
      const float* g = sums + 4 * j + 2 * half;
      const float* u = g + kBothOuts / 4;
      *reinterpret_cast<uint32_t*>(to + column) =
          PackBF16(activated(g[0] + gate.x, u[0] + up.x), activated(g[1] + gate.y, u[1] + up.y));
    }
  }
}

__device__ __forceinline__ void PutResults(const ExpertsParams& p, const ExpertTile& tile, int pair,
                                           int first_column, const float (&sums)[kBothOuts / 2]) {
  constexpr int kColumns = kBothOuts / 8;
  const Biases<kColumns> biases(p.down_bias, tile.expert * p.bias_stride, first_column, p.hidden);
  int source[2];
  float weight[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    source[half] = __ldg(p.sorted + min(pair + 8 * half, tile.end - 1));
#pragma unroll
  for (int half = 0; half < 2; ++half) weight[half] = __ldg(p.pair_weights + source[half]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* to = p.results + int64_t{source[half]} * p.hidden;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = first_column + 8 * j;
      const float2 bias = __bfloat1622float2(biases.two[j]);
      const float* s = sums + 4 * j + 2 * half;
      if (pair + 8 * half < tile.end && column < p.hidden)
        *reinterpret_cast<float2*>(to + column) =
            make_float2((s[0] + bias.x) * weight[half], (s[1] + bias.y) * weight[half]);
    }
  }
}

template <bool kGateUp>
struct BFloat16ManyTiles {
  static constexpr bool kGated = kGateUp;
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
    if constexpr (kGated)
      PutActivated(p, tile.pairs, row, column, sums);
    else
      PutResults(p, tile.pairs, row, column, sums);
  }

 private:
  // sums: this warpgroup's 64 pairs by 256 outputs.
  static __device__ __forceinline__ void Multiply(int steps, int group,
                                                  ManyRing<BFloat16ManyTiles>& ring,
                                                  float (&sums)[kBothOuts / 2]) {
    MultiplyStages(steps, ring, [&](int step) {
      const WgmmaOperand<kManyRowBytes> x(ring.stage().x + group * 64 * kManyRowBytes),
          weights(ring.stage().weights);
      WgmmaFence();
#pragma unroll
      for (int bytes = 0; bytes < kManyRowBytes; bytes += 32)
        Wgmma<WgmmaType::kBF16, kBothOuts>::SS(sums, x.At(bytes), weights.At(bytes), step + bytes);
      WgmmaCommit();
      WgmmaWait<1>();
    });
  }
};

}  // namespace

void RunManyBFloat16Experts(const ExpertsParams& p, cudaStream_t stream) {
  RunManyProducts<BFloat16ManyTiles<true>, BFloat16ManyTiles<false>>(p, stream);
}

}  // namespace octavo::cuda
