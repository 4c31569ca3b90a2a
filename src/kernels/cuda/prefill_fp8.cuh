// Prefill on FP8 tensor cores. docs/kernels/prefill.md has the arithmetic behind the shapes.
//
// Accumulator registers of S, packed to e4m3, are the A operand of P V as they stand, since V's
// tokens are stored in their order.
//
// Two-level accumulation: the tensor cores keep about 14 bits, so each tile's P V starts from zero
// and is added to float32 registers here, in columns of 64: one multiply-add, which the rescaling
// of the online softmax needs anyway. A row of ones behind V sums P as it was rounded, so that
// numerator and denominator share their rounding.
//
// Nothing overlaps inside a warpgroup: with the scores of the next tile beside the sums of this
// one, registers spill, and what the others do meanwhile is enough (docs/kernels/prefill.md has
// what was tried).
#pragma once

#include "kernels/cuda/prefill_rows.cuh"
#include "kernels/cuda/prefill_tiles.cuh"

namespace octavo::cuda {

// The largest e4m3 number is 448 = 2^8.8.
struct Fp8Range {
  static constexpr float kOffset = 8.0f, kLimit = 8.8f;
};

// kBuffers: chunks of 64 columns in the tensor cores at a time. kSumRow: P is summed by a row of
// ones behind V; without it, by the threads.
template <int kHeadDim, int kConsumers, int kTileTokens, int kStages, int kBuffers_, bool kSumRow_,
          bool kTwoLevel_>
struct PrefillFp8Config
    : PrefillTiles<kHeadDim, 1, kConsumers, kTileTokens, kStages, kHeadDim + (kSumRow_ ? 8 : 0)> {
  using Tiles =
      PrefillTiles<kHeadDim, 1, kConsumers, kTileTokens, kStages, kHeadDim + (kSumRow_ ? 8 : 0)>;
  static constexpr int kBuffers = kBuffers_;
  static constexpr bool kSumRow = kSumRow_;
  static constexpr bool kTwoLevel = kTwoLevel_;
};

template <class C>
struct Fp8Consumer {
  static constexpr int kChunks = C::kHeadDim / 64;
  using ScoreProduct = Wgmma<WgmmaType::kE4M3, C::kTileTokens>;

  const WgmmaOperand<C::kPanel> q, k;  // this warpgroup's queries; stage 0
  const WgmmaOperand<kPageSize> v;
  float scores[C::kTileTokens / 2];
  float out[C::kHeadDim / 2];
  float tile_out[C::kTwoLevel ? C::kBuffers : 1][C::kSumRow ? 36 : 32];
  uint32_t probabilities[C::kTileTokens / 8];

  __device__ Fp8Consumer(typename C::Shared& shared, int warpgroup)
      : q(shared.q[0][64 * warpgroup]), k(shared.k), v(shared.v) {}

  __device__ __forceinline__ void IssueScores(int stage) {
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 32; ++step) {
      const int panel = step * 32 / C::kPanel, within = step * 32 % C::kPanel;
      ScoreProduct::SS(scores, q.At(panel * C::kRows * C::kPanel + within),
                       k.At(stage * C::kTileBytes + panel * C::kTileTokens * C::kPanel + within),
                       step > 0);
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void Pack() {
#pragma unroll
    for (int j = 0; j < C::kTileTokens / 32; ++j) {
      const float* x = scores + 16 * j;
      probabilities[4 * j] = PackE4M3(x[0], x[1], x[4], x[5]);
      probabilities[4 * j + 1] = PackE4M3(x[2], x[3], x[6], x[7]);
      probabilities[4 * j + 2] = PackE4M3(x[8], x[9], x[12], x[13]);
      probabilities[4 * j + 3] = PackE4M3(x[10], x[11], x[14], x[15]);
    }
  }

  // P times kColumns columns of V, from zero or on top of what there is.
  template <int kColumns>
  __device__ __forceinline__ void Multiply(float (&sums)[kColumns / 2], int stage, int chunk) {
    const int begin = stage * C::kTilePages * C::kValuePageBytes + chunk * 64 * kPageSize;
    WgmmaFence();
#pragma unroll
    for (int j = 0; j < C::kTileTokens / 32; ++j) {
      Wgmma<WgmmaType::kE4M3, kColumns>::RS(sums, probabilities[4 * j], probabilities[4 * j + 1],
                                            probabilities[4 * j + 2], probabilities[4 * j + 3],
                                            v.At(begin + j / 2 * C::kValuePageBytes + j % 2 * 32),
                                            !C::kTwoLevel || j > 0);
    }
    WgmmaCommit();
  }

  // The last chunk also sums P, as rounded, in the column of ones.
  __device__ __forceinline__ void IssueChunk(int stage, int chunk) {
    auto& sums = tile_out[chunk % C::kBuffers];
    if constexpr (C::kSumRow) {
      if (chunk == kChunks - 1) return Multiply<72>(sums, stage, chunk);
    }
    Multiply<64>(reinterpret_cast<float(&)[32]>(sums), stage, chunk);
  }

  __device__ __forceinline__ void AddChunk(int chunk, PrefillRow& a, PrefillRow& b) {
    const auto& x = tile_out[chunk % C::kBuffers];
    float* o = out + 32 * chunk;
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
      o[j] = fmaf(o[j], a.rescale, x[j]);
      o[j + 1] = fmaf(o[j + 1], a.rescale, x[j + 1]);
      o[j + 2] = fmaf(o[j + 2], b.rescale, x[j + 2]);
      o[j + 3] = fmaf(o[j + 3], b.rescale, x[j + 3]);
    }
    if constexpr (C::kSumRow) {
      if (chunk == kChunks - 1) {
        a.sum += x[32];
        b.sum += x[34];
      }
    }
  }

  // out = out * rescale + P V; with two levels chunks are added while others are multiplied.
  __device__ __forceinline__ void Values(int stage, PrefillRow& a, PrefillRow& b) {
    if constexpr (C::kTwoLevel) {
      constexpr int kBuffers = C::kBuffers;
#pragma unroll
      for (int chunk = 0; chunk < kBuffers; ++chunk) IssueChunk(stage, chunk);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (chunk + kBuffers <= kChunks) {
          WgmmaWait<kBuffers - 1>();
        } else {
          WgmmaWait<0>();
        }
        AddChunk(chunk, a, b);
        if (chunk + kBuffers < kChunks) IssueChunk(stage, chunk + kBuffers);
      }
    } else {
#pragma unroll
      for (int j = 0; j < C::kHeadDim / 2; j += 4) {
        out[j] *= a.rescale;
        out[j + 1] *= a.rescale;
        out[j + 2] *= b.rescale;
        out[j + 3] *= b.rescale;
      }
      Multiply<C::kHeadDim>(out, stage, 0);
      WgmmaWait<0>();
    }
  }
};

template <class C>
__device__ void Consume(const PrefillParams& p, typename C::Shared& shared) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool elected = threadIdx.x % 128 == 0;
  Fp8Consumer<C> consumer(shared, warpgroup);
  Ring<C::kStages> ring;
  for (uint32_t item_phase = 0;; item_phase ^= 1) {
    BarrierWait(&shared.q_full, item_phase);
    const WorkItem& item = shared.items[item_phase];
    if (item.sequence < 0) break;
    PrefillRow a{.scale = ScoreScale(p, item, ThreadRow())},
        b{.scale = ScoreScale(p, item, ThreadRow() + 8)};
    const TileRange tiles = TilesOf<C::kTileTokens>(p, item, warpgroup);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) consumer.out[i] = 0;

    if (elected && tiles.end <= tiles.begin) BarrierArrive(&shared.q_empty);
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
      BarrierWait(&shared.k_full[ring.stage], ring.phase);
      consumer.IssueScores(ring.stage);
      WgmmaWait<0>();
      if (elected) {
        BarrierArrive(&shared.k_empty[ring.stage]);
        if (tile == tiles.begin) BarrierArrive(&shared.q_empty);
      }
      if (tile >= tiles.causal || IsWindowed<C::kTileTokens>(p, item, tile)) {
        MaskScores<C::kTileTokens>(consumer.scores, tile * C::kTileTokens, p, item, ThreadRow());
      }
      OnlineSoftmax<C::kTileTokens, Fp8Range, !C::kSumRow>(consumer.scores, a, b);
      consumer.Pack();
      BarrierWait(&shared.v_full[ring.stage], ring.phase);
      consumer.Values(ring.stage, a, b);
      if (elected) BarrierArrive(&shared.v_empty[ring.stage]);
      ring.Advance();
    }
    StoreRow<C::kHeadDim>(p, item, a, ThreadRow(), consumer.out);
    StoreRow<C::kHeadDim>(p, item, b, ThreadRow() + 8, consumer.out + 2);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    prefill_fp8_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ uint8_t memory[];
  auto& shared = C::Init(memory);
  if (threadIdx.x < 128) {
    RegistersDown<C::kProducerRegisters>();
    if (threadIdx.x < 32) Produce<typename C::Tiles>(p, shared);
  } else {
    RegistersUp<C::kConsumerRegisters>();
    Consume<C>(p, shared);
  }
}

}  // namespace octavo::cuda
