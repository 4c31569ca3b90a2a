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
    k_from_ = p_.claim + kv_head_ * p_.head_bytes + keys_.from;
    v_from_ = p_.claim + kv_head_ * p_.head_bytes + p_.v_bytes + values_.from;
    for (int i = 0; i < kTilesAhead; ++i, NextTile()) {
      const bool exists = tile - i >= first_tile;
      if (exists) ahead.Read((tile - i) * kPages, pages_);
      if constexpr (Producer::kWidenKeys) Load<false>(exists);
      if constexpr (Producer::kWidenValues) Load<true>(exists);
    }
    for (; tile >= first_tile; --tile, ring.Advance(), NextTile()) {
      if constexpr (!Producer::kWidenKeys || !Producer::kWidenValues) LoadOther(tile, other, ring);
      const bool more = tile - kTilesAhead >= first_tile;
      if (more) ahead.Read((tile - kTilesAhead) * kPages, pages_);
      if constexpr (Producer::kWidenKeys) Widen<false>(more, ring);
      if constexpr (Producer::kWidenValues) Widen<true>(more, ring);
    }
  }

 private:
  static constexpr int kPages = Tiles::kTilePages;
  static constexpr int kTilesAhead = Producer::kTilesAhead;
  template <bool kValues>
  using StepsOf = Steps<Tiles::kHeadDim, Tiles::kTileTokens, kValues>;
  template <bool kValues>
  __device__ __forceinline__ const StepsOf<kValues>& Place() const {
    if constexpr (kValues) {
      return values_;
    } else {
      return keys_;
    }
  }

  // Slots go round; a tile's first step is in first_slot_.
  __device__ __forceinline__ void NextTile() {
    first_slot_ = (first_slot_ + Producer::kSteps) % kSlots;
  }
  // This thread's part of an operand's first slot.
  template <bool kValues>
  __device__ __forceinline__ uint4* Slot() const {
    constexpr int kBefore = kValues && Producer::kWidenKeys ? Producer::kOperandSteps : 0;
    return &shared_.producer.slots[first_slot_ + kBefore][0][thread_];
  }
  template <bool kValues>
  __device__ __forceinline__ float* ScaleSlot() const {
    return &shared_.producer.slot_scales[first_slot_ / Producer::kSteps]
                                        [kValues && Producer::kWidenKeys][thread_];
  }
  template <bool kValues>
  __device__ __forceinline__ int64_t TokenScales() const {
    return thread_ >= Tiles::kTileTokens ? -1 : kValues ? p_.v_token_scales : p_.k_token_scales;
  }

  // What this thread will widen of a step, and of its tile's scales. Of the tile of pages_; it goes
  // to where the same step of an earlier tile was.
  __device__ __forceinline__ uint32_t Page(int page) const {
    return static_cast<uint32_t>(page == 0 ? pages_[0] : pages_[kPages - 1]);
  }
  template <bool kValues>
  __device__ __forceinline__ const std::byte* Source(uint32_t page) const {
    return (kValues ? v_from_ : k_from_) + int64_t{page} * kPageUnit;
  }
  __device__ __forceinline__ void LoadStep(uint4* slot, const std::byte* from, bool present) const {
#pragma unroll
    for (int i = 0; i < kStepLoads; ++i) CopyAsync<16>(slot + 128 * i, from + 2048 * i, present);
  }
  template <bool kValues>
  __device__ __forceinline__ void LoadScale() const {
    const uint32_t page = Page(thread_ / kPageSize);
    CopyAsync<4>(ScaleSlot<kValues>(),
                 p_.claim + int64_t{page} * kPageUnit + TokenScales<kValues>() +
                     (kv_head_ * kPageSize + thread_ % kPageSize) * 4,
                 page != kNoPage);
  }

  // An operand's steps, before anything is widened.
  template <bool kValues>
  __device__ __forceinline__ void Load(bool exists) const {
    constexpr int kInPage = StepsOf<kValues>::kInPage;
    uint4* slot = Slot<kValues>();
    if (exists && TokenScales<kValues>() >= 0) LoadScale<kValues>();
#pragma unroll 1
    for (int step = 0; step < Producer::kOperandSteps; ++step, slot += 128 * kStepLoads) {
      const uint32_t page = Page(step / kInPage);
      if (exists) LoadStep(slot, Source<kValues>(page) + step % kInPage * 4096, page != kNoPage);
      CopyAsyncCommit();
    }
  }

  template <bool kValues>
  __device__ __forceinline__ void Widen(bool more, const Ring<Tiles::kStages>& ring) const {
    const int stage = ring.stage;
    CopyAsyncWait<kSlots - 1>();
    BarrierWait(kValues ? &shared_.v_empty[stage] : &shared_.k_empty[stage], ring.phase ^ 1);
    if (TokenScales<kValues>() >= 0) {
      (kValues ? shared_.producer.v_scales : shared_.producer.k_scales)[stage][thread_] =
          *ScaleSlot<kValues>();
      if (more) LoadScale<kValues>();
    }
    uint8_t* tile = kValues ? &shared_.v[stage][0][0][0] : &shared_.k[stage][0][0][0];
    switch (kValues ? p_.v_format : p_.k_format) {
      case KvFormat::kFp8E5M2:
        WidenSteps<kValues, DType::kF8E5M2>(more, tile);
        break;
      case KvFormat::kInt8PerTokenHead:
        WidenSteps<kValues, DType::kI8>(more, tile);
        break;
      default:
        WidenSteps<kValues, DType::kF8E4M3>(more, tile);
    }
    FenceProxyAsync();
    __syncwarp();
    if (thread_ % 32 == 0) BarrierArrive(kValues ? &shared_.v_full[stage] : &shared_.k_full[stage]);
  }

  // Code that is run through once per tile should be short: beside the consumers' it is fetched
  // anew each time.
  template <bool kValues, DType kStored>
  __device__ __forceinline__ void WidenSteps(bool more, uint8_t* tile) const {
    using Its = StepsOf<kValues>;
    uint4* slot = Slot<kValues>();
#pragma unroll 1
    for (int p = 0; p < kPages; ++p) {
      const uint32_t page = Page(p);
      const std::byte* from = Source<kValues>(page);
#pragma unroll
      for (int part = 0; part < Its::kInPage; ++part) {
        CopyAsyncWait<kSlots - 1>();
        uint4 bytes[kStepLoads];
#pragma unroll
        for (int i = 0; i < kStepLoads; ++i) bytes[i] = slot[128 * i];
        Place<kValues>().template Widen<kStored>(bytes, tile);
        if (more) LoadStep(slot, from + part * 4096, page != kNoPage);
        CopyAsyncCommit();
        slot += 128 * kStepLoads;
        tile += Its::kRows * 128;
      }
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
  const StepsOf<false> keys_;
  const StepsOf<true> values_;
  // This thread's first bytes of the item's head in page 0.
  const std::byte *k_from_ = nullptr, *v_from_ = nullptr;
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
