// Prefill on FP8 tensor cores. docs/kernels/prefill.md has the arithmetic behind the shapes.
//
// Accumulator registers of S, packed to e4m3, are the A operand of P V as they stand, since V's
// tokens are stored in their order.
//
// Scores, exponents and exponentials are float16, two to a register: half the registers, and half
// the instructions. A score has 11 bits then, its operands have 4. Append scales queries such that
// no score of codes is beyond float16 (QueryScale).
//
// Two-level accumulation: the tensor cores keep about 14 bits, so each tile's P V starts from zero
// and is added to float32 registers here, in columns of 64: one multiply-add, which the rescaling
// of the online softmax needs anyway. A row of ones behind V sums P as it was rounded, so that
// numerator and denominator share their rounding.
//
// Nothing overlaps inside a warpgroup: more warpgroups and larger tiles are worth more
// (docs/kernels/prefill.md has what was tried).
#pragma once

#include "kernels/cuda/prefill_rows.cuh"
#include "kernels/cuda/prefill_tiles.cuh"

namespace octavo::cuda {

// A row in float16, every number twice: the exponentials so far are 2^(score * scale + shift), and
// `shift` moves as in prefill_rows.cuh. The largest e4m3 number is 448 = 2^8.8.
struct Fp8Row {
  static constexpr float kOffset = 8.0f, kLimit = 8.8f, kFarthest = 65504.0f;

  uint32_t scale;                                  // the float16 nearest to the exact one
  uint32_t shift = PackF16(kFarthest, kFarthest);  // nothing seen: see PrefillRow
  float sum = 0, rescale = 1;

  __device__ explicit Fp8Row(float exact_scale) {
    // Not 0, by which -inf would be NaN.
    exact_scale = fminf(fmaxf(exact_scale, 0x1p-24f), kFarthest);
    scale = PackF16(exact_scale, exact_scale);
  }
  // The row for StoreRow, its shift as the exact scale would have it: a row's largest score, which
  // the shift comes from, is off by the scale's rounding.
  __device__ PrefillRow Exact(float exact_scale) const {
    return {.shift = fmaf(LowF16(shift) - kOffset, exact_scale / LowF16(scale), kOffset),
            .sum = sum};
  }
};

// kBuffers: chunks of 64 columns in the tensor cores at a time. kSumRow: P is summed by a row of
// ones behind V; without it, by the threads.
template <int kHeadDim, int kConsumers, int kTileTokens, int kStages, int kBuffers_, bool kSumRow_,
          bool kTwoLevel_, int kMultiplied_>
struct PrefillFp8Config
    : PrefillTiles<kHeadDim, 1, kConsumers, kTileTokens, kStages, kHeadDim + (kSumRow_ ? 8 : 0)> {
  using Tiles =
      PrefillTiles<kHeadDim, 1, kConsumers, kTileTokens, kStages, kHeadDim + (kSumRow_ ? 8 : 0)>;
  static constexpr int kBuffers = kBuffers_;
  static constexpr bool kSumRow = kSumRow_;
  static constexpr bool kTwoLevel = kTwoLevel_;
  static constexpr int kMultiplied = kMultiplied_;
};

// MaskScores of prefill_rows.cuh for pairs of float16: s[2 j] is row a's, s[2 j + 1] row b's.
template <int kKeys>
__device__ __forceinline__ void MaskPairs(uint32_t (&s)[kKeys / 4], int begin,
                                          const PrefillParams& p, const WorkItem& item, int row) {
  constexpr uint32_t kLow = 0xFC00u, kHigh = 0xFC000000u;
  const int last_a = item.position + (row >> p.pack_shift),
            last_b = item.position + ((row + 8) >> p.pack_shift);
  const int behind_a = p.window > 0 ? last_a - p.window : -1,
            behind_b = p.window > 0 ? last_b - p.window : -1;
  const int lane_column = begin + 2 * (threadIdx.x % 4);
  const auto mask = [](uint32_t& pair, int key, int last, int behind) {
    if (key > last || key <= behind) pair = (pair & 0xFFFF0000u) | kLow;
    if (key + 1 > last || key + 1 <= behind) pair = (pair & 0xFFFFu) | kHigh;
  };
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    mask(s[2 * j], lane_column + 8 * j, last_a, behind_a);
    mask(s[2 * j + 1], lane_column + 8 * j, last_b, behind_b);
  }
}

// 2^x of a pair, x below 16, by multiplications, within 0.2 %: the special function unit has enough
// to do. 2^-14 for anything smaller.
__device__ __forceinline__ uint32_t Exp2Polynomial(uint32_t x) {
  constexpr uint32_t kLowest = 0xCB00CB00u;                                // -14
  constexpr uint32_t kRounder = 0x66006600u, kMinusRounder = 0xE600E600u;  // 1536
  const uint32_t c2 = PackF16(0.24f, 0.24f), c1 = PackF16(0.703f, 0.703f), c0 = PackF16(1, 1);
  x = MaxNaNF16(x, kLowest);
  const uint32_t rounded = AddF16(x, kRounder);  // the integer in the lowest bits
  const uint32_t f = SubtractF16(x, AddF16(rounded, kMinusRounder));
  // To the exponents, which stay in range, so that nothing carries from half to half.
  return FmaF16(f, FmaF16(f, c2, c1), c0) + (rounded - kRounder) * 1024;
}

__device__ __forceinline__ bool OutOfRange(uint32_t exponents) {
  return !(LowF16(exponents) <= Fp8Row::kLimit && HighF16(exponents) <= Fp8Row::kLimit);
}

// Brings a row's exponentials back into range if the largest score over the quad asks for it.
__device__ __forceinline__ void MoveShift(Fp8Row& row, uint32_t largest) {
  largest = MaxNaNF16(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = MaxNaNF16(largest, __shfl_xor_sync(~0u, largest, 2));
  // The same sum as in the vote, or a row's bits would depend on who else votes.
  if (!OutOfRange(FmaF16(largest, row.scale, row.shift))) return;
  const float score = LowF16(MaxNaNF16(largest, largest >> 16));
  float shift = fmaf(-score, LowF16(row.scale), Fp8Row::kOffset);  // NaN stays NaN
  if (shift > Fp8Row::kFarthest) shift = Fp8Row::kFarthest;
  if (shift < -Fp8Row::kFarthest) shift = -Fp8Row::kFarthest;
  const uint32_t shifts = PackF16(shift, shift);
  const float factor = Exp2(LowF16(shifts) - LowF16(row.shift));
  row.shift = shifts;
  row.sum *= factor;
  row.rescale *= factor;
}

// Scores of a tile to exponentials of at most 2^kLimit. kSum: adds them to the rows' sums. One of
// kMultiplied pairs does without the special function unit.
template <int kKeys, bool kSum, int kMultiplied>
__device__ __forceinline__ void OnlineSoftmaxPairs(uint32_t (&s)[kKeys / 4], Fp8Row& a, Fp8Row& b) {
  uint32_t max_a = s[0], max_b = s[1];
#pragma unroll
  for (int i = 2; i < kKeys / 4; i += 2) {
    max_a = MaxNaNF16(max_a, s[i]);
    max_b = MaxNaNF16(max_b, s[i + 1]);
  }
  a.rescale = b.rescale = 1;
  if (__any_sync(~0u, OutOfRange(MaxNaNF16(FmaF16(max_a, a.scale, a.shift),
                                           FmaF16(max_b, b.scale, b.shift))))) {
    MoveShift(a, max_a);
    MoveShift(b, max_b);
  }
  const auto exponential = [](int i, uint32_t x) {
    return i / 2 % kMultiplied == kMultiplied - 1 ? Exp2Polynomial(x) : Exp2F16(x);
  };
#pragma unroll
  for (int i = 0; i < kKeys / 4; i += 8) {
#pragma unroll
    for (int j = i; j < i + 8; j += 2) {
      s[j] = exponential(j, FmaF16(s[j], a.scale, a.shift));
      s[j + 1] = exponential(j, FmaF16(s[j + 1], b.scale, b.shift));
    }
    if constexpr (kSum) {
      // No more than four in float16, or small ones are lost beside a large one.
      const uint32_t of_a = AddF16(AddF16(s[i], s[i + 2]), AddF16(s[i + 4], s[i + 6]));
      const uint32_t of_b = AddF16(AddF16(s[i + 1], s[i + 3]), AddF16(s[i + 5], s[i + 7]));
      a.sum += LowF16(of_a) + HighF16(of_a);
      b.sum += LowF16(of_b) + HighF16(of_b);
    }
  }
}

template <class C>
struct Fp8Consumer {
  static constexpr int kChunks = C::kHeadDim / 64;
  using ScoreProduct = Wgmma<WgmmaType::kE4M3ToF16, C::kTileTokens>;

  const WgmmaOperand<C::kPanel> q, k;  // this warpgroup's queries; stage 0
  const WgmmaOperand<kPageSize> v;
  uint32_t scores[C::kTileTokens / 4];  // pairs of float16
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
      const uint32_t* x = scores + 8 * j;
      probabilities[4 * j] = PackE4M3(x[0], x[2]);
      probabilities[4 * j + 1] = PackE4M3(x[1], x[3]);
      probabilities[4 * j + 2] = PackE4M3(x[4], x[6]);
      probabilities[4 * j + 3] = PackE4M3(x[5], x[7]);
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

  __device__ __forceinline__ void AddChunk(int chunk, Fp8Row& a, Fp8Row& b) {
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
  __device__ __forceinline__ void Values(int stage, Fp8Row& a, Fp8Row& b) {
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
    if (item.q_tokens == 0) break;
    Fp8Row a(ScoreScale(p, item, ThreadRow())), b(ScoreScale(p, item, ThreadRow() + 8));
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
        MaskPairs<C::kTileTokens>(consumer.scores, tile * C::kTileTokens, p, item, ThreadRow());
      }
      OnlineSoftmaxPairs<C::kTileTokens, !C::kSumRow, C::kMultiplied>(consumer.scores, a, b);
      consumer.Pack();
      BarrierWait(&shared.v_full[ring.stage], ring.phase);
      consumer.Values(ring.stage, a, b);
      if (elected) BarrierArrive(&shared.v_empty[ring.stage]);
      ring.Advance();
    }
    StoreRow<C::kHeadDim>(p, item, a.Exact(ScoreScale(p, item, ThreadRow())), ThreadRow(),
                          consumer.out);
    StoreRow<C::kHeadDim>(p, item, b.Exact(ScoreScale(p, item, ThreadRow() + 8)), ThreadRow() + 8,
                          consumer.out + 2);
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
