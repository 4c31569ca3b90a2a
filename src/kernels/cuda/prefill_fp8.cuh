// Prefill on FP8 tensor cores. docs/kernels/prefill.md has the arithmetic behind the shapes.
//
// A block is one producer warp and kConsumers warpgroups of 64 query rows. K tiles [tokens, head_dim] and V
// tiles [head_dim, tokens] arrive by TMA as the pages hold them, both K-major. Accumulator registers of S,
// packed to e4m3, are the A operand of P V as they stand, since V's tokens are stored in their order.
//
// Two-level accumulation: the tensor cores keep about 14 bits, so each tile's P V starts from zero and is
// added to float32 registers here, in columns of 64: one multiply-add, which the rescaling of the online
// softmax needs anyway.
//
// Two warpgroups take turns at the tensor cores (P V of a tile, then Q K of the next) so that one's products
// run under the other's exponentials.
#pragma once

#include "kernels/cuda/prefill_rows.cuh"
#include "kernels/cuda/prefill_tiles.cuh"

namespace octavo::cuda {

// The largest e4m3 number is 448 = 2^8.8.
struct Fp8Range {
  static constexpr float kOffset = 8.0f, kLimit = 8.8f;
};

template <int kHeadDim, int kConsumers, int kTileTokens, int kStages, bool kOverlap_, int kBuffers_,
          bool kTwoLevel_>
struct PrefillFp8Config : PrefillTiles<kHeadDim, 1, kConsumers, kTileTokens, kStages> {
  using Tiles = PrefillTiles<kHeadDim, 1, kConsumers, kTileTokens, kStages>;
  static constexpr bool kOverlap = kOverlap_;
  static constexpr int kBuffers = kBuffers_;  // chunks of 64 columns in the tensor cores at a time
  static constexpr bool kTwoLevel = kTwoLevel_;
};

template <class C>
struct Fp8Consumer {
  static constexpr int kChunks = C::kHeadDim / 64;
  static constexpr int kBuffers = C::kTwoLevel ? C::kBuffers : kChunks;
  using ScoreProduct = Wgmma<WgmmaType::kE4M3, C::kTileTokens>;
  using ValueProduct = Wgmma<WgmmaType::kE4M3, 64>;

  const uint64_t q, k, v;  // descriptors: this warpgroup's queries, stage 0
  float scores[C::kTileTokens / 2];
  float out[C::kHeadDim / 2];
  float tile_out[C::kTwoLevel ? kBuffers : 1][32];
  uint32_t probabilities[C::kTileTokens / 8];

  __device__ Fp8Consumer(typename C::Shared& shared, int warpgroup)
      : q(WgmmaDescriptor<C::kPanel>(shared.q[0][64 * warpgroup])),
        k(WgmmaDescriptor<C::kPanel>(shared.k)),
        v(WgmmaDescriptor<kPageSize>(shared.v)) {}

  __device__ __forceinline__ void IssueScores(int stage) {
    const uint64_t q_rows = Fresh(q), k_stage = Fresh(k) + stage * (C::kTileBytes / 16);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 32; ++step) {
      const int panel = step * 32 / C::kPanel, within = step * 32 % C::kPanel / 16;
      ScoreProduct::SS(scores, q_rows + panel * (C::kRows * C::kPanel / 16) + within,
                       k_stage + panel * (C::kTileTokens * C::kPanel / 16) + within, step > 0);
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

  // P V in the columns of a chunk, from zero or, with one level, on top of `out`.
  __device__ __forceinline__ void IssueValues(int stage, int chunk) {
    float(&sums)[32] = C::kTwoLevel ? tile_out[chunk % kBuffers] : Chunk(chunk);
    const uint64_t v_chunk = Fresh(v) + stage * (C::kTileBytes / 16) + chunk * (64 * kPageSize / 16);
    WgmmaFence();
#pragma unroll
    for (int j = 0; j < C::kTileTokens / 32; ++j) {
      ValueProduct::RS(sums, probabilities[4 * j], probabilities[4 * j + 1],
                       probabilities[4 * j + 2], probabilities[4 * j + 3],
                       v_chunk + j / 2 * (C::kHeadDim * kPageSize / 16) + j % 2 * 2,
                       !C::kTwoLevel || j > 0);
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ float (&Chunk(int chunk))[32] {
    return reinterpret_cast<float(&)[32]>(out[32 * chunk]);
  }

  // Sums of earlier tiles times `rescale`, plus the tile's.
  __device__ __forceinline__ void AddValues(int chunk, float rescale_a, float rescale_b) {
    if constexpr (C::kTwoLevel) {
      const float* x = tile_out[chunk % kBuffers];
      float* o = Chunk(chunk);
#pragma unroll
      for (int j = 0; j < 32; j += 4) {
        o[j] = fmaf(o[j], rescale_a, x[j]);
        o[j + 1] = fmaf(o[j + 1], rescale_a, x[j + 1]);
        o[j + 2] = fmaf(o[j + 2], rescale_b, x[j + 2]);
        o[j + 3] = fmaf(o[j + 3], rescale_b, x[j + 3]);
      }
    }
  }

  __device__ __forceinline__ void RescaleOut(float rescale_a, float rescale_b) {
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 2; j += 4) {
      out[j] *= rescale_a;
      out[j + 1] *= rescale_a;
      out[j + 2] *= rescale_b;
      out[j + 3] *= rescale_b;
    }
  }

  // All of P V; chunks are added while later ones are multiplied.
  __device__ __forceinline__ void Values(int stage, float rescale_a, float rescale_b) {
#pragma unroll
    for (int chunk = 0; chunk < kBuffers; ++chunk) IssueValues(stage, chunk);
    if constexpr (!C::kTwoLevel) WgmmaWait<0>();
#pragma unroll
    for (int chunk = 0; chunk < kChunks * C::kTwoLevel; ++chunk) {
      if (chunk + kBuffers <= kChunks) {
        WgmmaWait<kBuffers - 1>();
      } else {
        WgmmaWait<0>();
      }
      AddValues(chunk, rescale_a, rescale_b);
      if (chunk + kBuffers < kChunks) IssueValues(stage, chunk + kBuffers);
    }
  }
};

template <class C>
__device__ void Consume(const PrefillParams& p, typename C::Shared& shared) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool elected = threadIdx.x % 128 == 0;
  const int row = 64 * warpgroup + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  Fp8Consumer<C> consumer(shared, warpgroup);
  Ring<C::kStages> ring;
  for (uint32_t item_phase = 0;; item_phase ^= 1) {
    BarrierWait(&shared.q_full, item_phase);
    const WorkItem& item = shared.items[item_phase];
    if (item.sequence < 0) break;
    PrefillRow a{.scale = ScoreScale(p, item, row)}, b{.scale = ScoreScale(p, item, row + 8)};
    const TileRange tiles = TilesOf<C::kTileTokens>(p, item, warpgroup);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) consumer.out[i] = 0;

    int tile = tiles.end - 1;
    const auto softmax = [&](int stage, const auto& halfway) {
      if (elected) {
        BarrierArrive(&shared.k_empty[stage]);
        if (tile == tiles.begin) BarrierArrive(&shared.q_empty);
      }
      if (tile >= tiles.causal || tile <= tiles.windowed) {
        MaskScores<C::kTileTokens>(consumer.scores, tile * C::kTileTokens, p, item, row);
      }
      OnlineSoftmax<C::kTileTokens, Fp8Range>(consumer.scores, a, b, halfway);
    };
    if constexpr (C::kOverlap) {
      BarrierWait(&shared.k_full[ring.stage], ring.phase);
      consumer.IssueScores(ring.stage);
      WgmmaWait<0>();
      softmax(ring.stage, [] {});
      consumer.Pack();
      for (--tile; tile >= tiles.begin; --tile) {
        Ring<C::kStages> next = ring;
        next.Advance();
        BarrierWait(&shared.k_full[next.stage], next.phase);
        consumer.IssueScores(next.stage);
        BarrierWait(&shared.v_full[ring.stage], ring.phase);
        const float rescale_a = a.rescale, rescale_b = b.rescale;
        if constexpr (!C::kTwoLevel) consumer.RescaleOut(rescale_a, rescale_b);
#pragma unroll
        for (int chunk = 0; chunk < consumer.kBuffers; ++chunk) consumer.IssueValues(ring.stage, chunk);
        WgmmaWait<consumer.kBuffers>();
        softmax(next.stage, [&] {
          static_assert(consumer.kChunks <= 2);
          if constexpr (consumer.kChunks > consumer.kBuffers) {
            WgmmaWait<0>();
            consumer.AddValues(0, rescale_a, rescale_b);
            consumer.IssueValues(ring.stage, 1);
          }
        });
        WgmmaWait<0>();
        if (elected) BarrierArrive(&shared.v_empty[ring.stage]);
#pragma unroll
        for (int chunk = consumer.kChunks - consumer.kBuffers; chunk < consumer.kChunks; ++chunk) {
          consumer.AddValues(chunk, rescale_a, rescale_b);
        }
        consumer.Pack();
        ring = next;
      }
    } else {
      for (;; --tile) {
        BarrierWait(&shared.k_full[ring.stage], ring.phase);
        consumer.IssueScores(ring.stage);
        WgmmaWait<0>();
        softmax(ring.stage, [] {});
        consumer.Pack();
        if (tile == tiles.begin) break;
        BarrierWait(&shared.v_full[ring.stage], ring.phase);
        if constexpr (!C::kTwoLevel) consumer.RescaleOut(a.rescale, b.rescale);
        consumer.Values(ring.stage, a.rescale, b.rescale);
        if (elected) BarrierArrive(&shared.v_empty[ring.stage]);
        ring.Advance();
      }
    }
    BarrierWait(&shared.v_full[ring.stage], ring.phase);
    if constexpr (!C::kTwoLevel) consumer.RescaleOut(a.rescale, b.rescale);
    consumer.Values(ring.stage, a.rescale, b.rescale);
    if (elected) BarrierArrive(&shared.v_empty[ring.stage]);
    ring.Advance();
    StoreRow<C::kHeadDim>(p, item, a, row, consumer.out);
    StoreRow<C::kHeadDim>(p, item, b, row + 8, consumer.out + 2);
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
