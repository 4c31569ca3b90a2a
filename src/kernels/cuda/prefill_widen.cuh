// The producer of 16-bit prefill over 8-bit pages: a warpgroup that makes of pages the swizzled
// float16 tiles that the tensor cores read. All three 8-bit formats are exact in float16. A 16-bit
// operand of a mixed cache arrives by TMA as ever.
//
// What counts is bytes under way: 32 KB, for L2 takes most of a microsecond to answer. A thread
// copies to slots of its own what it alone will widen, so that nothing but the stages' barriers
// keeps the four warps together.
#pragma once

#include "base/dtype.h"
#include "kernels/cuda/prefill_tiles.cuh"

namespace octavo::cuda {

constexpr int kProducerBarrier = 8;  // named barrier of the producer's 128 threads

// A step is 4 KB of an operand's page, 32 bytes of each thread.
constexpr int kStepLoads = 2;  // of 16 bytes
constexpr int kSlots = 8;

// What lies beside the tiles. Scales are per token and head, 0 of pages that are not there.
template <int kHeadDim, int kTileTokens, int kStages, bool kKeys, bool kValues>
struct WideningProducer {
  static constexpr bool kWidenKeys = kKeys, kWidenValues = kValues;
  static constexpr int kOperandSteps = kTileTokens * kHeadDim / 4096;
  static constexpr int kSteps = kOperandSteps * (kKeys + kValues);  // of a tile
  static constexpr int kTilesAhead = kSlots / kSteps;
  static_assert(kSlots % kSteps == 0);
  static constexpr int kKeyWriters = kKeys ? 4 : 1, kValueWriters = kValues ? 4 : 1;
  alignas(16) uint4 slots[kSlots][kStepLoads][128];
  float slot_scales[kTilesAhead][kKeys + kValues][kTileTokens];
  alignas(16) float k_scales[kStages][kTileTokens];  // of the tile in each stage
  alignas(16) float v_scales[kStages][kTileTokens];
};

// Four elements to two pairs of float16.
template <DType kStored>
__device__ __forceinline__ uint2 WidenFour(uint32_t four) {
  const uint16_t low = static_cast<uint16_t>(four), high = static_cast<uint16_t>(four >> 16);
  if constexpr (kStored == DType::kF8E5M2) return {WidenE5M2(low), WidenE5M2(high)};
  if constexpr (kStored == DType::kF8E4M3) return {WidenE4M3(low), WidenE4M3(high)};
  // x + 128 as the low byte of the float16 1024 + ..., less 1152.
  const uint32_t biased = four ^ 0x80808080u;
  return {SubtractF16(__byte_perm(biased, 0x64646464u, 0x4140), 0x64806480u),
          SubtractF16(__byte_perm(biased, 0x64646464u, 0x4342), 0x64806480u)};
}

// Where a thread's bytes of a step are and go. K is rows of tokens, V rows of head_dim, each of 64
// tokens.
template <int kHeadDim, int kTileTokens, bool kValues>
struct Steps {
  static constexpr int kInPage = kPageSize * kHeadDim / 4096;
  static constexpr int kRowBytes = kValues ? kPageSize : kHeadDim;
  static constexpr int kRows = 4096 / kRowBytes;
  static constexpr int kPanels = kRowBytes / 64;  // 64 bytes fill a panel's row of 128
  static constexpr int kLoadRows = kRows / kStepLoads;
  static_assert(kLoadRows % 8 == 0);  // so a thread's swizzle is always the same

  // Four threads take 64 bytes of a row, the next four those of another row and, where there are
  // several, another panel: with their swizzles they write to different banks.
  int from;          // bytes of the page, in step 0
  int to, to_other;  // bytes of the tile: of a thread's first and last eight elements
  __device__ Steps() {
    const int thread = static_cast<int>(threadIdx.x) % 128, quad = thread / 4, lane = thread % 4;
    const int row = quad / (2 * kPanels) * 2 + quad % 2;
    const int panel = kPanels == 1 ? 0 : (quad / 2 % kPanels) ^ (quad % 2);
    const int swizzle = ((2 * lane) ^ (row % 8)) * 16;
    from = row * kRowBytes + panel * 64 + lane * 16;
    to = (panel * kTileTokens + row) * 128 + swizzle;
    to_other = to - swizzle + (swizzle ^ 16);
  }

  // Tokens of V stand in an order of their own within 16 (docs/kv-cache.md), undone here: a word's
  // low pair belongs to the first eight.
  template <DType kStored>
  __device__ __forceinline__ void Widen(const uint4 (&bytes)[kStepLoads], uint8_t* rows) const {
#pragma unroll
    for (int i = 0; i < kStepLoads; ++i) {
      const uint2 a = WidenFour<kStored>(bytes[i].x), b = WidenFour<kStored>(bytes[i].y),
                  c = WidenFour<kStored>(bytes[i].z), d = WidenFour<kStored>(bytes[i].w);
      uint8_t* at = rows + i * kLoadRows * 128;
      *reinterpret_cast<uint4*>(at + to) =
          kValues ? uint4{a.x, b.x, c.x, d.x} : uint4{a.x, a.y, b.x, b.y};
      *reinterpret_cast<uint4*>(at + to_other) =
          kValues ? uint4{a.y, b.y, c.y, d.y} : uint4{c.x, c.y, d.x, d.y};
    }
  }
  // rows: where the step's first row is in panel 0.
  __device__ __forceinline__ void Widen(KvFormat format, const uint4 (&bytes)[kStepLoads],
                                        uint8_t* rows) const {
    switch (format) {
      case KvFormat::kFp8E5M2:
        return Widen<DType::kF8E5M2>(bytes, rows);
      case KvFormat::kInt8PerTokenHead:
        return Widen<DType::kI8>(bytes, rows);
      default:
        return Widen<DType::kF8E4M3>(bytes, rows);
    }
  }
};

// An item's tiles from the last to the first, of each its K, then its V. The whole warpgroup.
template <class Tiles, class Producer>
class Widener {
 public:
  __device__ Widener(const PrefillParams& p, typename Tiles::Shared& shared)
      : p_(p), shared_(shared), thread_(static_cast<int>(threadIdx.x) % 128) {}

  __device__ __forceinline__ void Run(const WorkItem& item, Ring<Tiles::kStages>& ring) {
    const int first_tile = item.page_begin / kPages;
    int tile = (item.page_end + kPages - 1) / kPages - 1;
    PageReader ahead(p_, item), other(p_, item);
    kv_head_ = item.head / p_.group;
    for (int i = 0; i < kTilesAhead; ++i) {
      LoadSteps<0>(ahead, tile - i, first_tile);
      NextSlot<kSteps>();
    }
    for (; tile >= first_tile; --tile, ring.Advance()) {
      if constexpr (!Producer::kWidenKeys || !Producer::kWidenValues) LoadOther(tile, other, ring);
      if (tile - kTilesAhead >= first_tile) ahead.Read((tile - kTilesAhead) * kPages, pages_);
      RunSteps<0>(tile - kTilesAhead >= first_tile, ring);
      NextSlot<kSteps>();
    }
  }

 private:
  static constexpr int kPages = Tiles::kTilePages;
  using KeySteps = Steps<Tiles::kHeadDim, Tiles::kTileTokens, false>;
  using ValueSteps = Steps<Tiles::kHeadDim, Tiles::kTileTokens, true>;
  static constexpr int kSteps = Producer::kSteps, kOfOperand = Producer::kOperandSteps;
  static constexpr int kTilesAhead = Producer::kTilesAhead;
  static constexpr bool IsValues(int step) {
    return Producer::kWidenValues && (!Producer::kWidenKeys || step >= kOfOperand);
  }

  // Slots go round; a tile's first step is in first_slot_.
  template <int kCount>
  __device__ __forceinline__ void NextSlot() {
    first_slot_ = (first_slot_ + kCount) % kSlots;
  }
  __device__ __forceinline__ uint4* SlotOf(int step) const {
    return &shared_.producer.slots[first_slot_ + step][0][thread_];
  }
  template <bool kValues>
  __device__ __forceinline__ float* ScaleSlot() const {
    return &shared_.producer
                .slot_scales[first_slot_ / kSteps][kValues && Producer::kWidenKeys][thread_];
  }
  template <bool kValues>
  __device__ __forceinline__ int64_t TokenScales() const {
    return thread_ >= Tiles::kTileTokens ? -1 : kValues ? p_.v_token_scales : p_.k_token_scales;
  }

  // Asks for this thread's bytes of a step of the tile of pages_, in whose slot the same step of an
  // earlier tile was.
  template <int kStep>
  __device__ __forceinline__ void Load() const {
    constexpr bool kValues = IsValues(kStep);
    constexpr int kPage = kStep % kOfOperand / KeySteps::kInPage;
    constexpr int kPart = kStep % KeySteps::kInPage;
    const auto page = static_cast<uint32_t>(pages_[kPage]);
    const std::byte* from = p_.claim + page * kPageUnit + kv_head_ * p_.head_bytes +
                            (kValues ? p_.v_bytes + values_.from : keys_.from) + kPart * 4096;
#pragma unroll
    for (int i = 0; i < kStepLoads; ++i) {
      CopyAsync<16>(SlotOf(kStep) + 128 * i, from + 2048 * i, page != kNoPage);
    }
    const int64_t scales = TokenScales<kValues>();
    if (kStep % kOfOperand == 0 && scales >= 0) {
      const auto of = static_cast<uint32_t>(pages_[0]),
                 last = static_cast<uint32_t>(pages_[kPages - 1]);
      const uint32_t its = thread_ < kPageSize ? of : last;
      CopyAsync<4>(
          ScaleSlot<kValues>(),
          p_.claim + its * kPageUnit + scales + (kv_head_ * kPageSize + thread_ % kPageSize) * 4,
          its != kNoPage);
    }
  }
  // All steps of the tile, if the item has it.
  template <int kStep>
  __device__ __forceinline__ void LoadSteps(PageReader& reader, int tile, int first_tile) {
    if constexpr (kStep == 0) {
      if (tile >= first_tile) reader.Read(tile * kPages, pages_);
    }
    if constexpr (kStep < kSteps) {
      if (tile >= first_tile) Load<kStep>();
      CopyAsyncCommit();
      LoadSteps<kStep + 1>(reader, tile, first_tile);
    }
  }

  template <int kStep>
  __device__ __forceinline__ void RunSteps(bool more, const Ring<Tiles::kStages>& ring) const {
    if constexpr (kStep < kSteps) {
      constexpr bool kValues = IsValues(kStep);
      constexpr int kWithin = kStep % kOfOperand;
      const int stage = ring.stage;
      CopyAsyncWait<kSlots - 1>();
      if constexpr (kWithin == 0) {
        BarrierWait(kValues ? &shared_.v_empty[stage] : &shared_.k_empty[stage], ring.phase ^ 1);
        if (TokenScales<kValues>() >= 0) {
          (kValues ? shared_.producer.v_scales : shared_.producer.k_scales)[stage][thread_] =
              *ScaleSlot<kValues>();
        }
      }
      uint4 bytes[kStepLoads];
#pragma unroll
      for (int i = 0; i < kStepLoads; ++i) bytes[i] = SlotOf(kStep)[128 * i];
      if constexpr (kValues) {
        values_.Widen(p_.v_format, bytes,
                      &shared_.v[stage][0][0][0] + kWithin * ValueSteps::kRows * 128);
      } else {
        keys_.Widen(p_.k_format, bytes,
                    &shared_.k[stage][0][0][0] + kWithin * KeySteps::kRows * 128);
      }
      if constexpr (kWithin == kOfOperand - 1) {
        FenceProxyAsync();
        __syncwarp();
        if (thread_ % 32 == 0)
          BarrierArrive(kValues ? &shared_.v_full[stage] : &shared_.k_full[stage]);
      }
      if (more) Load<kStep>();
      CopyAsyncCommit();
      RunSteps<kStep + 1>(more, ring);
    }
  }

  // The operand that is not widened.
  __device__ __forceinline__ void LoadOther(int tile, PageReader& reader,
                                            const Ring<Tiles::kStages>& ring) const {
    if (thread_ >= 32) return;
    int pages[kPages];
    reader.Read(tile * kPages, pages);
    BarrierWait(Producer::kWidenKeys ? &shared_.v_empty[ring.stage] : &shared_.k_empty[ring.stage],
                ring.phase ^ 1);
    if (thread_ != 0) return;
    if constexpr (Producer::kWidenKeys) {
      LoadValues<Tiles>(p_, shared_, ring.stage, kv_head_, pages);
    } else {
      LoadKeys<Tiles>(p_, shared_, ring.stage, kv_head_, pages);
    }
  }

  const PrefillParams& p_;
  typename Tiles::Shared& shared_;
  const int thread_;
  const KeySteps keys_;
  const ValueSteps values_;
  int kv_head_ = 0, first_slot_ = 0;
  int pages_[kPages] = {};
};

// Produce() of prefill_tiles.cuh for a warpgroup that widens K, V or both.
template <class Tiles, class Producer>
__device__ __forceinline__ void ProduceWidened(const PrefillParams& p,
                                               typename Tiles::Shared& shared) {
  const bool first_warp = threadIdx.x < 32, elected = threadIdx.x == 0;
  ItemQueue queue(p);
  Ring<Tiles::kStages> ring;
  Widener<Tiles, Producer> widener(p, shared);
  for (uint32_t item_phase = 0;; item_phase ^= 1) {
    if (first_warp) {
      const WorkItem item = queue.Current();
      BarrierWait(&shared.q_empty, item_phase ^ 1);
      if (elected) shared.items[item_phase] = item;
    }
    NamedBarrierSync(kProducerBarrier, 128);
    const WorkItem item = shared.items[item_phase];
    if (item.sequence < 0) {
      if (elected) BarrierArrive(&shared.q_full);
      break;
    }
    if (elected) LoadQueries<Tiles>(p, shared, item);
    if (first_warp) queue.Fetch();
    widener.Run(item, ring);
    if (first_warp) queue.Advance();
  }
  if (first_warp) queue.Finish();
}

}  // namespace octavo::cuda
