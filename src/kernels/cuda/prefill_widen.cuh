// The producer of 16-bit prefill over 8-bit pages: a warpgroup that turns pages, landed in
// staging slots by bulk copies, into the swizzled float16 tiles that the tensor cores read. All
// three 8-bit formats are exact in float16. A 16-bit operand of a mixed cache arrives by TMA as
// ever.
#pragma once

#include "base/dtype.h"
#include "kernels/cuda/prefill_tiles.cuh"

namespace octavo::cuda {

constexpr int kProducerBarrier = 8;  // named barrier of the producer's 128 threads

// Pieces, K of a tile and V of a tile by turns where both are widened, land in a ring of slots, so
// that copies are under way while one piece is widened.
template <int kHeadDim, int kTileTokens, int kStages, bool kKeys, bool kValues>
struct WidenStaging {
  static constexpr bool kWidenKeys = kKeys, kWidenValues = kValues;
  // As many as fit beside the tiles of 227 KB.
  static constexpr int kSlots = kHeadDim == 64 ? 4 : kHeadDim == 128 ? 3 : 2;
  alignas(128) uint8_t slots[kSlots][kTileTokens * kHeadDim];
  // Per token and head, of the tile in each stage; of pages that are not there, 0.
  alignas(16) float k_scales[kStages][kTileTokens];
  alignas(16) float v_scales[kStages][kTileTokens];
  uint64_t landed[kSlots];

  __device__ void Init() {
    for (uint64_t& barrier : landed) BarrierInit(&barrier, 1);
  }
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

// A tile's 16-byte pieces, shared out over the warpgroup. K: rows of tokens. V: rows of head_dim,
// 64 tokens each, whose order in a group of 16 is undone here: a word's low pair belongs to the
// first eight.
template <class Tiles, bool kValues, DType kStored>
__device__ __forceinline__ void WidenTile(const uint8_t* staging, uint8_t* tile,
                                          const int (&pages)[Tiles::kTilePages]) {
  constexpr int kPageBytes = kPageSize * Tiles::kHeadDim;
  constexpr int kPieces = (kValues ? kPageSize : Tiles::kHeadDim) / 16;  // in a row
  constexpr int kRows = kPageBytes / 16 / kPieces;
  constexpr int kRounds = kPageBytes / 16 / 128, kBatch = 2;
#pragma unroll 1
  for (int page = 0; page < Tiles::kTilePages; ++page) {
    // Not pages[page], which would put them into memory.
    const int entry = page == 0 ? pages[0] : pages[Tiles::kTilePages - 1];
    const bool present = static_cast<uint32_t>(entry) != kNoPage;
#pragma unroll 1
    for (int round = 0; round < kRounds; round += kBatch) {
      uint4 x[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int i = static_cast<int>(threadIdx.x) + 128 * (round + n);
        x[n] = present ? *reinterpret_cast<const uint4*>(staging + page * kPageBytes + 16 * i)
                       : uint4{};
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int i = static_cast<int>(threadIdx.x) + 128 * (round + n);
        const int row = i / kPieces, piece = i % kPieces;
        const uint2 a = WidenFour<kStored>(x[n].x), b = WidenFour<kStored>(x[n].y),
                    c = WidenFour<kStored>(x[n].z), d = WidenFour<kStored>(x[n].w);
        uint4 first = {a.x, a.y, b.x, b.y}, second = {c.x, c.y, d.x, d.y};
        if (kValues) {
          first = {a.x, b.x, c.x, d.x};
          second = {a.y, b.y, c.y, d.y};
        }
        // K: panels of [tile tokens, 128 bytes]; V: one of [head_dim, 128 bytes] per page.
        uint8_t* to = kValues
                          ? tile + (page * kRows + row) * 128
                          : tile + ((piece / 4) * Tiles::kTileTokens + page * kRows + row) * 128;
        const int chunk = piece % 4 * 2;
        // Lanes on different panels write different halves first, else they meet in the banks.
        const int swap = piece / 4 % 2;
        *reinterpret_cast<uint4*>(to + ((chunk + swap) ^ row % 8) * 16) = swap ? second : first;
        *reinterpret_cast<uint4*>(to + ((chunk + 1 - swap) ^ row % 8) * 16) = swap ? first : second;
      }
    }
  }
}

// The copies of an item's pieces into the slots, in order. One warp; its first lane issues.
template <class Tiles, class Staging>
class PieceLoader {
 public:
  static constexpr int kPages = Tiles::kTilePages;

  __device__ PieceLoader(const PrefillParams& p, Staging& staging, const WorkItem& item, int tile,
                         int first_tile)
      : p_(p),
        staging_(staging),
        reader_(p, item),
        kv_head_(item.head / p.group),
        tile_(tile),
        first_tile_(first_tile) {}

  // The next piece, if there is one, into `slot`.
  __device__ void Issue(int slot) {
    if (tile_ < first_tile_) return;
    if (!values_) reader_.Read(tile_ * kPages, pages_);
    const bool values = Staging::kWidenValues && (values_ || !Staging::kWidenKeys);
    if (threadIdx.x % 32 == 0) Copy(slot, values);
    values_ = Staging::kWidenKeys && Staging::kWidenValues && !values_;
    if (!values_) --tile_;
  }

 private:
  __device__ void Copy(int slot, bool values) const {
    constexpr int kPageBytes = kPageSize * Tiles::kHeadDim;
    int present = 0;
#pragma unroll
    for (int page : pages_) present += static_cast<uint32_t>(page) != kNoPage;
    BarrierArriveExpect(&staging_.landed[slot], present * kPageBytes);
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      if (static_cast<uint32_t>(pages_[i]) == kNoPage) continue;
      const std::byte* from = p_.claim + static_cast<uint32_t>(pages_[i]) * kPageUnit +
                              kv_head_ * p_.head_bytes + (values ? p_.v_bytes : 0);
      BulkLoad(staging_.slots[slot] + i * kPageBytes, from, kPageBytes, &staging_.landed[slot]);
    }
  }

  const PrefillParams& p_;
  Staging& staging_;
  PageReader reader_;
  int kv_head_, tile_, first_tile_;
  bool values_ = false;  // V of the last pages is next
  int pages_[kPages] = {};
};

// Makes a stage's tile of the piece in the slot. The whole warpgroup; `stage` is free.
template <class Tiles, bool kValues, class Staging>
__device__ __forceinline__ void Widen(const PrefillParams& p, typename Tiles::Shared& shared,
                                      Staging& staging, const Ring<Staging::kSlots>& slot,
                                      const int (&pages)[Tiles::kTilePages], int kv_head,
                                      int stage) {
  const int64_t scales = kValues ? p.v_token_scales : p.k_token_scales;
  const int token = static_cast<int>(threadIdx.x);
  float scale = 0;
  if (scales >= 0 && token < Tiles::kTileTokens) {
    static_assert(Tiles::kTilePages <= 2);
    const auto page = static_cast<uint32_t>(
        Tiles::kTilePages == 2 && token >= kPageSize ? pages[Tiles::kTilePages - 1] : pages[0]);
    if (page != kNoPage) {
      scale = reinterpret_cast<const float*>(p.claim + page * kPageUnit +
                                             scales)[kv_head * kPageSize + token % kPageSize];
    }
  }
  BarrierWait(&staging.landed[slot.stage], slot.phase);
  uint8_t* tile = kValues ? &shared.v[stage][0][0][0] : &shared.k[stage][0][0][0];
  const uint8_t* from = staging.slots[slot.stage];
  switch (kValues ? p.v_format : p.k_format) {
    case KvFormat::kFp8E5M2:
      WidenTile<Tiles, kValues, DType::kF8E5M2>(from, tile, pages);
      break;
    case KvFormat::kInt8PerTokenHead:
      WidenTile<Tiles, kValues, DType::kI8>(from, tile, pages);
      break;
    default:
      WidenTile<Tiles, kValues, DType::kF8E4M3>(from, tile, pages);
  }
  // Only now: the load has had all that time.
  if (scales >= 0 && token < Tiles::kTileTokens)
    (kValues ? staging.v_scales : staging.k_scales)[stage][token] = scale;
  FenceProxyAsync();
  NamedBarrierSync(kProducerBarrier, 128);
}

// Produce() of prefill_tiles.cuh for a warpgroup that widens K, V or both.
template <class Tiles, class Staging>
__device__ void ProduceWidened(const PrefillParams& p, typename Tiles::Shared& shared) {
  constexpr int kPages = Tiles::kTilePages;
  const bool elected = threadIdx.x == 0;
  Staging& staging = shared.extra;
  ItemQueue queue(p);
  Ring<Tiles::kStages> ring;
  Ring<Staging::kSlots> slot;  // of the piece to be widened next
  for (uint32_t item_phase = 0;; item_phase ^= 1) {
    if (threadIdx.x < 32) {
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
    if (threadIdx.x < 32) queue.Fetch();
    const int kv_head = item.head / p.group;
    const int first_tile = item.page_begin / kPages;
    int tile = (item.page_end + kPages - 1) / kPages - 1;
    PageReader reader(p, item);
    PieceLoader<Tiles, Staging> loader(p, staging, item, tile, first_tile);
    if (threadIdx.x < 32) {
      Ring<Staging::kSlots> free = slot;
      for (int i = 0; i < Staging::kSlots; ++i, free.Advance()) loader.Issue(free.stage);
    }
    // Hands the tile over, and the slot to the next piece that has none.
    const auto widened = [&](uint64_t* full) {
      if (elected) BarrierArrive(full);
      if (threadIdx.x < 32) loader.Issue(slot.stage);
      slot.Advance();
    };
    for (; tile >= first_tile; --tile) {
      int pages[kPages];
      reader.Read(tile * kPages, pages);
      BarrierWait(&shared.k_empty[ring.stage], ring.phase ^ 1);
      if constexpr (Staging::kWidenKeys) {
        Widen<Tiles, false>(p, shared, staging, slot, pages, kv_head, ring.stage);
        widened(&shared.k_full[ring.stage]);
      } else if (elected) {
        LoadKeys<Tiles>(p, shared, ring.stage, kv_head, pages);
      }
      BarrierWait(&shared.v_empty[ring.stage], ring.phase ^ 1);
      if constexpr (Staging::kWidenValues) {
        Widen<Tiles, true>(p, shared, staging, slot, pages, kv_head, ring.stage);
        widened(&shared.v_full[ring.stage]);
      } else if (elected) {
        LoadValues<Tiles>(p, shared, ring.stage, kv_head, pages);
      }
      ring.Advance();
    }
    if (threadIdx.x < 32) queue.Advance();
  }
  if (threadIdx.x < 32) queue.Finish();
}

}  // namespace octavo::cuda
