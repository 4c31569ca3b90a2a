// The producer of 16-bit prefill over 8-bit pages: a warpgroup that turns pages, landed in a
// staging area by bulk copies, into the swizzled float16 tiles that the tensor cores read. All
// three 8-bit formats are exact in float16. A 16-bit operand of a mixed cache arrives by TMA as
// ever.
#pragma once

#include "kernels/cuda/prefill_tiles.cuh"

namespace octavo::cuda {

constexpr int kProducerBarrier = 8;  // named barrier of the producer's 128 threads

template <int kHeadDim, int kTileTokens, int kStages, bool kKeys, bool kValues>
struct WidenStaging {
  static constexpr bool kWidenKeys = kKeys, kWidenValues = kValues;
  alignas(128) uint8_t k[kKeys ? kTileTokens * kHeadDim : 1];
  alignas(128) uint8_t v[kValues ? kTileTokens * kHeadDim : 1];
  // Per token and head, of the tile in each stage; of pages that are not there, 0.
  float k_scales[kStages][kTileTokens], v_scales[kStages][kTileTokens];
  uint64_t k_landed, v_landed;

  __device__ void Init() {
    BarrierInit(&k_landed, 1);
    BarrierInit(&v_landed, 1);
  }
};

// Four elements to two pairs of float16.
__device__ __forceinline__ uint2 WidenFour(KvFormat format, uint32_t four) {
  const uint16_t low = static_cast<uint16_t>(four), high = static_cast<uint16_t>(four >> 16);
  if (format == KvFormat::kFp8E5M2) return {WidenE5M2(low), WidenE5M2(high)};
  if (format != KvFormat::kInt8PerTokenHead) return {WidenE4M3(low), WidenE4M3(high)};
  // x + 128 as the low byte of the float16 1024 + ..., less 1152.
  const uint32_t biased = four ^ 0x80808080u;
  return {SubtractF16(__byte_perm(biased, 0x64646464u, 0x4140), 0x64806480u),
          SubtractF16(__byte_perm(biased, 0x64646464u, 0x4342), 0x64806480u)};
}

// A tile's 16-byte pieces, shared out over the warpgroup. K: rows of tokens. V: rows of head_dim,
// 64 tokens each, whose order in a group of 16 is undone here: a word's low pair belongs to the
// first eight.
template <class Tiles, bool kValues>
__device__ __forceinline__ void WidenTile(KvFormat format, const uint8_t* staging, uint8_t* tile,
                                          const int (&pages)[Tiles::kTilePages]) {
  constexpr int kPageBytes = kPageSize * Tiles::kHeadDim;
  constexpr int kPieces = (kValues ? kPageSize : Tiles::kHeadDim) / 16;  // in a row
  constexpr int kRows = kPageBytes / 16 / kPieces;
#pragma unroll
  for (int page = 0; page < Tiles::kTilePages; ++page) {
    const bool present = static_cast<uint32_t>(pages[page]) != kNoPage;
#pragma unroll 1
    for (int i = threadIdx.x; i < kPageBytes / 16; i += 128) {
      const int row = i / kPieces, piece = i % kPieces;
      uint4 x{};
      if (present) x = *reinterpret_cast<const uint4*>(staging + page * kPageBytes + 16 * i);
      const uint2 a = WidenFour(format, x.x), b = WidenFour(format, x.y),
                  c = WidenFour(format, x.z), d = WidenFour(format, x.w);
      uint4 first = {a.x, a.y, b.x, b.y}, second = {c.x, c.y, d.x, d.y};
      if (kValues) {
        first = {a.x, b.x, c.x, d.x};
        second = {a.y, b.y, c.y, d.y};
      }
      // K: panels of [tile tokens, 128 bytes]; V: one of [head_dim, 128 bytes] per page.
      uint8_t* to = kValues ? tile + (page * kRows + row) * 128
                            : tile + ((piece / 4) * Tiles::kTileTokens + page * kRows + row) * 128;
      const int chunk = piece % 4 * 2;
      // Lanes on different panels write different halves first, else they meet in the banks.
      const int swap = piece / 4 % 2;
      *reinterpret_cast<uint4*>(to + ((chunk + swap) ^ row % 8) * 16) = swap ? second : first;
      *reinterpret_cast<uint4*>(to + ((chunk + 1 - swap) ^ row % 8) * 16) = swap ? first : second;
    }
  }
}

// One operand's way into the tiles.
template <class Tiles, bool kValues>
struct Widener {
  static constexpr int kPages = Tiles::kTilePages;
  const PrefillParams& p;
  typename Tiles::Shared& shared;
  uint32_t landed_phase = 0;

  __device__ uint64_t* Landed() const {
    return kValues ? &shared.extra.v_landed : &shared.extra.k_landed;
  }

  // One thread.
  __device__ void Load(const int (&pages)[kPages], int kv_head) {
    constexpr int kPageBytes = kPageSize * Tiles::kHeadDim;
    uint8_t* to = kValues ? shared.extra.v : shared.extra.k;
    int present = 0;
    for (int page : pages) present += static_cast<uint32_t>(page) != kNoPage;
    BarrierArriveExpect(Landed(), present * kPageBytes);
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      if (static_cast<uint32_t>(pages[i]) == kNoPage) continue;
      const std::byte* from = p.claim + static_cast<uint32_t>(pages[i]) * kPageUnit +
                              kv_head * p.head_bytes + (kValues ? p.v_bytes : 0);
      BulkLoad(to + i * kPageBytes, from, kPageBytes, Landed());
    }
  }

  // The whole warpgroup; `stage` is free.
  __device__ void Widen(const int (&pages)[kPages], int kv_head, int stage) {
    const int64_t scales = kValues ? p.v_token_scales : p.k_token_scales;
    if (scales >= 0 && threadIdx.x < Tiles::kTileTokens) {
      const int token = threadIdx.x;
      static_assert(kPages <= 2);
      const auto page =
          static_cast<uint32_t>(kPages == 2 && token >= kPageSize ? pages[kPages - 1] : pages[0]);
      float scale = 0;
      if (page != kNoPage) {
        scale = reinterpret_cast<const float*>(p.claim + page * kPageUnit +
                                               scales)[kv_head * kPageSize + token % kPageSize];
      }
      (kValues ? shared.extra.v_scales : shared.extra.k_scales)[stage][token] = scale;
    }
    BarrierWait(Landed(), landed_phase);
    landed_phase ^= 1;
    uint8_t* tile = kValues ? &shared.v[stage][0][0][0] : &shared.k[stage][0][0][0];
    WidenTile<Tiles, kValues>(kValues ? p.v_format : p.k_format,
                              kValues ? shared.extra.v : shared.extra.k, tile, pages);
    FenceProxyAsync();
    NamedBarrierSync(kProducerBarrier, 128);
  }
};

// Produce() of prefill_tiles.cuh for a warpgroup that widens K, V or both.
template <class Tiles, class Staging>
__device__ void ProduceWidened(const PrefillParams& p, typename Tiles::Shared& shared) {
  constexpr int kPages = Tiles::kTilePages;
  const bool elected = threadIdx.x == 0;
  ItemQueue queue(p);
  Ring<Tiles::kStages> ring;
  Widener<Tiles, false> keys{p, shared};
  Widener<Tiles, true> values{p, shared};
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
    PageReader reader(p, item);
    const int first_tile = item.page_begin / kPages;
    int tile = (item.page_end + kPages - 1) / kPages - 1;
    int pages[kPages], next_pages[kPages] = {};
    reader.Read(tile * kPages, pages);
    if (elected && tile >= first_tile) {
      if (Staging::kWidenKeys) keys.Load(pages, kv_head);
      if (Staging::kWidenValues) values.Load(pages, kv_head);
    }
    for (; tile >= first_tile; --tile) {
      const bool more = tile > first_tile;
      if (more) reader.Read((tile - 1) * kPages, next_pages);
      BarrierWait(&shared.k_empty[ring.stage], ring.phase ^ 1);
      if constexpr (Staging::kWidenKeys) {
        keys.Widen(pages, kv_head, ring.stage);
        if (elected) {
          BarrierArrive(&shared.k_full[ring.stage]);
          if (more) keys.Load(next_pages, kv_head);
        }
      } else if (elected) {
        LoadKeys<Tiles>(p, shared, ring.stage, kv_head, pages);
      }
      BarrierWait(&shared.v_empty[ring.stage], ring.phase ^ 1);
      if constexpr (Staging::kWidenValues) {
        values.Widen(pages, kv_head, ring.stage);
        if (elected) {
          BarrierArrive(&shared.v_full[ring.stage]);
          if (more) values.Load(next_pages, kv_head);
        }
      } else if (elected) {
        LoadValues<Tiles>(p, shared, ring.stage, kv_head, pages);
      }
#pragma unroll
      for (int i = 0; i < kPages; ++i) pages[i] = next_pages[i];
      ring.Advance();
    }
    if (threadIdx.x < 32) queue.Advance();
  }
  if (threadIdx.x < 32) queue.Finish();
}

}  // namespace octavo::cuda
