// Prefill with 16-bit queries and probabilities over 16-bit pages, or over what widen_pages.h makes
// of others.
//
// A warpgroup issues Q K of the next tile, then P V of this one, and works on the next tile's
// exponentials while the tensor cores work on P V. Their float32 sums are good enough for 16-bit
// operands: one level.
#pragma once

#include "kernels/cuda/prefill_rows.cuh"
#include "kernels/cuda/prefill_tiles.cuh"

namespace octavo::cuda {

template <WgmmaType kType>
struct Range16Bit;
// Rescaling may wait until a score is 2^8 times the largest so far: bfloat16 and the float32 sums
// do not mind.
template <>
struct Range16Bit<WgmmaType::kBF16> {
  static constexpr float kOffset = 0, kLimit = 8;
};
// float16 loses what is below 2^-24 and above 2^16.
template <>
struct Range16Bit<WgmmaType::kF16> {
  static constexpr float kOffset = 8, kLimit = 10;
};

// kQuerySteps: all steps of Q K if queries are in registers, where that pays, or 0. It spares
// shared memory a third to a half of what a step reads of it.
template <WgmmaType kType_, int kHeadDim, int kConsumers, int kTileTokens, int kStages,
          int kQuerySteps_>
struct Prefill16BitConfig : PrefillTiles<kHeadDim, 2, kConsumers, kTileTokens, kStages> {
  using Tiles = PrefillTiles<kHeadDim, 2, kConsumers, kTileTokens, kStages>;
  static constexpr WgmmaType kType = kType_;
  static constexpr bool kSoftCap = kConsumers == 2;  // three leave no registers for it
  static constexpr int kQuerySteps = kQuerySteps_;
  static_assert(kQuerySteps == 0 || kQuerySteps == kHeadDim / 16);
};

// 1 - 2 / (e^2x + 1): absolute error near 1e-7, where tanh.approx has 5e-4.
__device__ __forceinline__ float SoftCapTanh(float x) {
  return 1.0f - __fdividef(2.0f, Exp2(2 * kLog2E * x) + 1.0f);
}

template <class C>
struct Consumer16Bit {
  using ScoreProduct = Wgmma<C::kType, C::kTileTokens>;
  using ValueProduct = Wgmma<C::kType, C::kHeadDim>;

  typename C::Shared& shared;
  const int warpgroup;
  const WgmmaOperand<128> q, k, v;  // this warpgroup's queries; stage 0
  float scores[C::kTileTokens / 2];
  float out[C::kHeadDim / 2];
  uint32_t probabilities[C::kTileTokens / 4];
  uint32_t queries[C::kQuerySteps > 0 ? 4 * C::kQuerySteps : 1];

  __device__ Consumer16Bit(typename C::Shared& shared, int warpgroup)
      : shared(shared),
        warpgroup(warpgroup),
        q(shared.q[0][64 * warpgroup]),
        k(shared.k),
        v(shared.v) {}

  __device__ __forceinline__ void IssueScores(int stage) {
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      const uint64_t keys = k.At(stage * C::kTileBytes + panel * C::kTileTokens * 128 + within);
      if (step < C::kQuerySteps) {
        const uint32_t* a = queries + 4 * step;
        ScoreProduct::RS(scores, a[0], a[1], a[2], a[3], keys, step > 0);
      } else {
        ScoreProduct::SS(scores, q.At(panel * C::kRows * 128 + within), keys, step > 0);
      }
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void IssueValues(int stage) {
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < C::kTileTokens / 16; ++step) {
      ValueProduct::RS(out, probabilities[4 * step], probabilities[4 * step + 1],
                       probabilities[4 * step + 2], probabilities[4 * step + 3],
                       v.At(stage * C::kTileBytes + step / 4 * C::kHeadDim * 128 + step % 4 * 32),
                       1);
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void SoftCap(float in, float out) {
#pragma unroll
    for (float& s : scores) s = out * SoftCapTanh(s * in);
  }

  static __device__ __forceinline__ uint32_t ToF16(uint32_t two) {
    return PackF16(__uint_as_float(two << 16), __uint_as_float(two & 0xFFFF0000u));
  }

  // This warpgroup's queries from bfloat16 to float16, where they lie.
  __device__ __forceinline__ void QueriesToF16() {
    constexpr int kLoads = 64 * C::kPanel / 16 / 128;  // of a thread and panel
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      auto* rows = reinterpret_cast<uint4*>(shared.q[panel][64 * warpgroup]) + threadIdx.x % 128;
      uint4 x[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) x[i] = rows[128 * i];
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        rows[128 * i] = {ToF16(x[i].x), ToF16(x[i].y), ToF16(x[i].z), ToF16(x[i].w)};
    }
    FenceProxyAsync();
    NamedBarrierSync(1 + warpgroup, 128);
  }

  // Queries as the A operand stands in registers: word i is 16 bytes * (i / 2) further, eight rows
  // lower where i is odd.
  __device__ __forceinline__ void ReadQueries() {
    const int thread = static_cast<int>(threadIdx.x) % 128, row = thread % 32 / 4;
    const uint8_t* rows = shared.q[0][64 * warpgroup + thread / 32 * 16 + row] + thread % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4 * C::kQuerySteps; ++i) {
      const int chunk = i / 2 % 8, panel = i / 16;
      queries[i] = *reinterpret_cast<const uint32_t*>(rows + panel * C::kRows * 128 +
                                                      i % 2 * 8 * 128 + (chunk ^ row) * 16);
      if (C::kType == WgmmaType::kF16) queries[i] = ToF16(queries[i]);
    }
  }

  __device__ __forceinline__ void Pack() {
#pragma unroll
    for (int i = 0; i < C::kTileTokens / 4; ++i) {
      probabilities[i] = C::kType == WgmmaType::kBF16 ? PackBF16(scores[2 * i], scores[2 * i + 1])
                                                      : PackF16(scores[2 * i], scores[2 * i + 1]);
    }
  }

  __device__ __forceinline__ void Rescale(const PrefillRow& a, const PrefillRow& b) {
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; i += 4) {
      out[i] *= a.rescale;
      out[i + 1] *= a.rescale;
      out[i + 2] *= b.rescale;
      out[i + 3] *= b.rescale;
    }
  }
};

template <class C>
__device__ void Consume16Bit(const PrefillParams& p, typename C::Shared& shared) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool elected = threadIdx.x % 128 == 0;
  Consumer16Bit<C> consumer(shared, warpgroup);
  Ring<C::kStages> ring;
  for (uint32_t item_phase = 0;; item_phase ^= 1) {
    BarrierWait(&shared.q_full, item_phase);
    const WorkItem& item = shared.items[item_phase];
    if (item.q_tokens == 0) break;
    PrefillRow a{.scale = p.soft_cap > 0 ? 1.0f : ScoreScale(p, item, ThreadRow())},
        b{.scale = a.scale};
    const TileRange tiles = TilesOf<C::kTileTokens>(p, item, warpgroup);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) consumer.out[i] = 0;
    if constexpr (C::kType == WgmmaType::kF16 && C::kQuerySteps == 0) consumer.QueriesToF16();
    consumer.ReadQueries();

    int tile = tiles.end - 1;
    const auto scores_done = [&](int stage) {
      if (elected) {
        BarrierArrive(&shared.k_empty[stage]);
        if (tile == tiles.begin) BarrierArrive(&shared.q_empty);
      }
      if (C::kSoftCap && p.soft_cap > 0) {
        consumer.SoftCap(ScoreScale(p, item, ThreadRow()) * kLn2 / p.soft_cap, p.soft_cap * kLog2E);
      }
      if (tile >= tiles.causal || IsWindowed<C::kTileTokens>(p, item, tile)) {
        MaskScores<C::kTileTokens>(consumer.scores, tile * C::kTileTokens, p, item, ThreadRow());
      }
      OnlineSoftmax<C::kTileTokens, Range16Bit<C::kType>>(consumer.scores, a, b);
    };
    if (tiles.end > tiles.begin) {
      BarrierWait(&shared.k_full[ring.stage], ring.phase);
      consumer.IssueScores(ring.stage);
      WgmmaWait<0>();
      scores_done(ring.stage);
      consumer.Pack();
      for (--tile; tile >= tiles.begin; --tile) {
        Ring<C::kStages> next = ring;
        next.Advance();
        BarrierWait(&shared.k_full[next.stage], next.phase);
        consumer.IssueScores(next.stage);
        BarrierWait(&shared.v_full[ring.stage], ring.phase);
        consumer.IssueValues(ring.stage);
        WgmmaWait<1>();
        scores_done(next.stage);
        WgmmaWait<0>();
        if (elected) BarrierArrive(&shared.v_empty[ring.stage]);
        if (__any_sync(~0u, a.rescale != 1.0f || b.rescale != 1.0f)) consumer.Rescale(a, b);
        consumer.Pack();
        ring = next;
      }
      BarrierWait(&shared.v_full[ring.stage], ring.phase);
      consumer.IssueValues(ring.stage);
      WgmmaWait<0>();
      if (elected) BarrierArrive(&shared.v_empty[ring.stage]);
      ring.Advance();
    } else if (elected) {
      BarrierArrive(&shared.q_empty);
    }
    StoreRow<C::kHeadDim>(p, item, a, ThreadRow(), consumer.out);
    StoreRow<C::kHeadDim>(p, item, b, ThreadRow() + 8, consumer.out + 2);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    prefill_16bit_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ uint8_t memory[];
  auto& shared = C::Init(memory);
  if (threadIdx.x < 128) {
    RegistersDown<C::kProducerRegisters>();
    if (threadIdx.x < 32) Produce<typename C::Tiles>(p, shared);
  } else {
    RegistersUp<C::kConsumerRegisters>();
    Consume16Bit<C>(p, shared);
  }
}

template <WgmmaType kType, int kHeadDim, int kConsumers, int kTileTokens, int kStages,
          int kQuerySteps>
KernelEntry Prefill16BitEntry() {
  using Config = Prefill16BitConfig<kType, kHeadDim, kConsumers, kTileTokens, kStages, kQuerySteps>;
  constexpr KvFormat kFormat = kType == WgmmaType::kBF16 ? KvFormat::kBF16 : KvFormat::kF16;
  return {.phase = Phase::kPrefill,
          .head_dim = kHeadDim,
          .k = kFormat,
          .v = kFormat,
          .math = AttentionMath::k16Bit,
          .soft_cap = Config::kSoftCap,
          .function = reinterpret_cast<const void*>(prefill_16bit_kernel<Config>),
          .rows = Config::kRows,
          .tile_tokens = Config::kTileTokens,
          .threads = Config::kThreads,
          .shared_bytes = Config::kSharedBytes};
}

}  // namespace octavo::cuda
