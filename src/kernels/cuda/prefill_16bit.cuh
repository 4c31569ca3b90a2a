// Prefill with 16-bit queries and probabilities, for every cache format. 16-bit pages go to the
// tensor cores as they stand; of 8-bit ones the producer warpgroup makes float16 tiles
// (prefill_widen.cuh).
//
// A warpgroup issues Q K of the next tile, then P V of this one, and works on the next tile's
// exponentials while the tensor cores work on P V. Their float32 sums are good enough for 16-bit
// operands: one level.
#pragma once

#include <optional>

#include "kernels/cuda/prefill_rows.cuh"
#include "kernels/cuda/prefill_tiles.cuh"
#include "kernels/cuda/prefill_widen.cuh"

namespace octavo::cuda {

template <WgmmaType kType>
struct Range16Bit;
// Rescaling may wait until a score is 2^8 times the largest so far: bfloat16 and the float32 sums
// do not mind.
template <>
struct Range16Bit<WgmmaType::kBF16> {
  static constexpr float kOffset = 0, kLimit = 8;
};
// float16 loses what is below 2^-24 and above 2^16, also after a token's v scale has joined: scales
// of 1e-4 to 64, that is int8 values up to 8,000, are within it.
template <>
struct Range16Bit<WgmmaType::kF16> {
  static constexpr float kOffset = 8, kLimit = 10;
};

// How an operand's pages become tensor core operands.
enum class Operand { kBF16, kF16, kWiden };

constexpr WgmmaType TypeOf(Operand operand) {
  return operand == Operand::kBF16 ? WgmmaType::kBF16 : WgmmaType::kF16;
}

template <int kHeadDim, int kTileTokens, int kStages, Operand kKeys, Operand kValues>
using ProducerOf =
    std::conditional_t<kKeys == Operand::kWiden || kValues == Operand::kWiden,
                       WideningProducer<kHeadDim, kTileTokens, kStages, kKeys == Operand::kWiden,
                                        kValues == Operand::kWiden>,
                       PlainProducer>;

// kQuerySteps: steps of Q K whose queries are in registers, where that pays. It spares shared
// memory a third to a half of what a step reads of it.
template <int kHeadDim, int kConsumers, int kTileTokens, int kStages, int kQuerySteps_,
          Operand kKeys, Operand kValues>
struct Prefill16BitConfig
    : PrefillTiles<kHeadDim, 2, kConsumers, kTileTokens, kStages, kHeadDim,
                   ProducerOf<kHeadDim, kTileTokens, kStages, kKeys, kValues>> {
  using Producer = ProducerOf<kHeadDim, kTileTokens, kStages, kKeys, kValues>;
  using Tiles = PrefillTiles<kHeadDim, 2, kConsumers, kTileTokens, kStages, kHeadDim, Producer>;
  static constexpr WgmmaType kKey = TypeOf(kKeys), kValue = TypeOf(kValues);
  // Three warpgroups and tiles of 128 tokens leave no registers for it.
  static constexpr bool kSoftCap = kConsumers == 2 || kTileTokens == 64;
  static constexpr bool kWidenKeys = kKeys == Operand::kWiden;
  static constexpr bool kWidenValues = kValues == Operand::kWiden;
  static constexpr int kQuerySteps = kQuerySteps_;
};

// 1 - 2 / (e^2x + 1): absolute error near 1e-7, where tanh.approx has 5e-4.
__device__ __forceinline__ float SoftCapTanh(float x) {
  return 1.0f - __fdividef(2.0f, Exp2(2 * kLog2E * x) + 1.0f);
}

template <class C>
struct Consumer16Bit {
  using ScoreProduct = Wgmma<C::kKey, C::kTileTokens>;
  using ValueProduct = Wgmma<C::kValue, C::kHeadDim>;

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

  // A factor per key.
  __device__ __forceinline__ void ScaleKeys(const float* scales) {
    const float* lane_scales = scales + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < C::kTileTokens / 8; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(lane_scales + 8 * j);
      scores[4 * j] *= scale.x;
      scores[4 * j + 1] *= scale.y;
      scores[4 * j + 2] *= scale.x;
      scores[4 * j + 3] *= scale.y;
    }
  }

  __device__ __forceinline__ void SoftCap(float in, float out) {
#pragma unroll
    for (float& s : scores) s = out * SoftCapTanh(s * in);
  }

  // This warpgroup's queries from bfloat16 to float16, where they lie.
  __device__ __forceinline__ void QueriesToF16() {
    for (int panel = 0; panel < C::kPanels; ++panel) {
      auto* rows = reinterpret_cast<uint32_t*>(shared.q[panel][64 * warpgroup]);
      for (int i = threadIdx.x % 128; i < 64 * C::kPanel / 4; i += 128) {
        rows[i] = PackF16(__uint_as_float(rows[i] << 16), __uint_as_float(rows[i] & 0xFFFF0000u));
      }
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
    }
  }

  __device__ __forceinline__ void Pack() {
#pragma unroll
    for (int i = 0; i < C::kTileTokens / 4; ++i) {
      probabilities[i] = C::kValue == WgmmaType::kBF16 ? PackBF16(scores[2 * i], scores[2 * i + 1])
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
    if (item.sequence < 0) break;
    PrefillRow a{.scale = p.soft_cap > 0 ? 1.0f : ScoreScale(p, item, ThreadRow())},
        b{.scale = a.scale};
    const TileRange tiles = TilesOf<C::kTileTokens>(p, item, warpgroup);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) consumer.out[i] = 0;
    if constexpr (C::kKey == WgmmaType::kF16) consumer.QueriesToF16();
    consumer.ReadQueries();

    int tile = tiles.end - 1;
    const auto scores_done = [&](int stage) {
      if constexpr (C::kWidenKeys) {
        if (p.k_token_scales >= 0) {
          consumer.ScaleKeys(shared.producer.k_scales[stage]);
          NamedBarrierSync(1 + warpgroup, 128);  // all have read them
        }
      }
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
      OnlineSoftmax<C::kTileTokens, Range16Bit<C::kValue>>(consumer.scores, a, b);
    };
    const auto pack = [&](const Ring<C::kStages>& place) {
      if constexpr (C::kWidenValues) {
        if (p.v_token_scales >= 0) {
          BarrierWait(&shared.v_full[place.stage], place.phase);
          consumer.ScaleKeys(shared.producer.v_scales[place.stage]);
        }
      }
      consumer.Pack();
    };
    if (tiles.end > tiles.begin) {
      BarrierWait(&shared.k_full[ring.stage], ring.phase);
      consumer.IssueScores(ring.stage);
      WgmmaWait<0>();
      scores_done(ring.stage);
      pack(ring);
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
        pack(next);
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
    if constexpr (C::kSpecial) {
      ProduceWidened<typename C::Tiles, typename C::Producer>(p, shared);
    } else if (threadIdx.x < 32) {
      Produce<typename C::Tiles>(p, shared);
    }
  } else {
    RegistersUp<C::kConsumerRegisters>();
    Consume16Bit<C>(p, shared);
  }
}

constexpr std::optional<KvFormat> FormatOf(Operand operand) {
  if (operand == Operand::kWiden) return std::nullopt;
  return operand == Operand::kBF16 ? KvFormat::kBF16 : KvFormat::kF16;
}

template <int kHeadDim, int kConsumers, int kTileTokens, int kStages, int kQuerySteps,
          Operand kKeys, Operand kValues>
KernelEntry Prefill16BitEntry() {
  using Config =
      Prefill16BitConfig<kHeadDim, kConsumers, kTileTokens, kStages, kQuerySteps, kKeys, kValues>;
  return {.phase = Phase::kPrefill,
          .head_dim = kHeadDim,
          .k = FormatOf(kKeys),
          .v = FormatOf(kValues),
          .math = AttentionMath::k16Bit,
          .soft_cap = Config::kSoftCap,
          .function = reinterpret_cast<const void*>(prefill_16bit_kernel<Config>),
          .rows = Config::kRows,
          .tile_tokens = Config::kTileTokens,
          .threads = Config::kThreads,
          .shared_bytes = Config::kSharedBytes};
}

}  // namespace octavo::cuda
