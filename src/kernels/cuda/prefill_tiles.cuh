// The memory side of prefill: what lies in shared memory, and the warp that fills it.
//
// A block is one producer warpgroup and kConsumers warpgroups of 64 query rows. K tiles [tokens,
// head_dim] and V tiles [head_dim, tokens] arrive by TMA as the pages hold them, both K-major, in
// rows of at most 128 bytes (panels), swizzled as wide as a row. Tiles go from an item's highest to
// its lowest.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/wgmma.cuh"

namespace octavo::cuda {

// kValueRows: more than head_dim, and behind every V page stands a row of ones (e4m3), the rest
// zeros.
template <int kHeadDim_, int kElementSize_, int kConsumers_, int kTileTokens_, int kStages_,
          int kValueRows_ = kHeadDim_>
struct PrefillTiles {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kElementSize = kElementSize_;  // of q, k and v in shared memory
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kTileTokens = kTileTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kValueRows = kValueRows_;

  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kTilePages = kTileTokens / kPageSize;
  static constexpr int kRowBytes = kHeadDim * kElementSize;
  static constexpr int kPanel = kRowBytes < 128 ? kRowBytes : 128;
  static constexpr int kPanels = kRowBytes / kPanel;
  static constexpr int kValueRowBytes = kPageSize * kElementSize;
  static constexpr int kTileBytes = kTileTokens * kRowBytes;
  static constexpr int kValuePageBytes = kValueRows * kValueRowBytes;  // in shared memory
  // Registers of a thread, in eights, as a warpgroup each of producer and consumers; together no
  // more than the block starts with, or setmaxnreg waits for ever.
  static constexpr int kBlockRegisters = 65536 / kThreads / 8 * 8 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters =
      (kBlockRegisters - kProducerRegisters) / kConsumers / 8 * 8;
  static_assert(kConsumerRegisters <= 240);

  struct Shared {
    alignas(1024) uint8_t q[kPanels][kRows][kPanel];
    alignas(1024) uint8_t k[kStages][kPanels][kTileTokens][kPanel];
    alignas(1024) uint8_t v[kStages][kTilePages][kValueRows][kValueRowBytes];
    WorkItem items[2];  // this one and the next
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // to align it
  static_assert(kSharedBytes <= 227 * 1024);

  static __device__ Shared& Init(uint8_t* memory) {
    auto& shared = *reinterpret_cast<Shared*>(AlignShared<1024>(memory));
    if (threadIdx.x == 0) {
      BarrierInit(&shared.q_full, 1);
      BarrierInit(&shared.q_empty, kConsumers);
      for (int stage = 0; stage < kStages; ++stage) {
        BarrierInit(&shared.k_full[stage], 1);
        BarrierInit(&shared.v_full[stage], 1);
        BarrierInit(&shared.k_empty[stage], kConsumers);
        BarrierInit(&shared.v_empty[stage], kConsumers);
      }
      BarrierInitFence();
    }
    if constexpr (kValueRows > kHeadDim) {
      constexpr int kWords = (kValueRows - kHeadDim) * kValueRowBytes / 4;
      for (int i = threadIdx.x; i < kStages * kTilePages * kWords; i += kThreads) {
        const int page = i / kWords, word = i % kWords;
        auto* rows =
            reinterpret_cast<uint32_t*>(shared.v[page / kTilePages][page % kTilePages][kHeadDim]);
        rows[word] =
            word < kValueRowBytes / 4 ? 0x38383838u : 0;  // a row of one value has no order
      }
      FenceProxyAsync();
    }
    WaitForPriorKernels();
    __syncthreads();
    return shared;
  }
};

// A place in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The items of a block: its own first, then whatever number the others have left. One warp.
class ItemQueue {
 public:
  __device__ explicit ItemQueue(const PrefillParams& p)
      : p_(p), items_(p.items + p.round->first), count_(p.round->count), index_(blockIdx.x) {}

  // q_tokens 0: there is none.
  __device__ WorkItem Current() const { return index_ < count_ ? items_[index_] : WorkItem{}; }
  // Between Fetch and Advance the next number may be under way.
  __device__ void Fetch() {
    if (threadIdx.x % 32 == 0) next_ = static_cast<int>(gridDim.x) + atomicAdd(p_.counters, 1);
  }
  __device__ void Advance() { index_ = __shfl_sync(~0u, next_, 0); }
  // The last block to come here leaves the counters as it found them.
  __device__ void Finish() {
    if (threadIdx.x % 32 != 0) return;
    if (atomicAdd(p_.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
      p_.counters[0] = 0;
      p_.counters[1] = 0;
    }
  }

 private:
  const PrefillParams& p_;
  const WorkItem* items_;
  int count_, index_, next_ = 0;
};

// Where an item's pages are, 32 at a time from the highest down: block table entries, or for
// widened pages their numbers. Pages that the item does not read are kNoPage: zeros to TMA.
class PageReader {
 public:
  __device__ PageReader(const PrefillParams& p, const WorkItem& item)
      : table_(p.block_table ? p.block_table + item.sequence * p.block_table_stride : nullptr),
        page_0_(static_cast<uint32_t>(item.sequence)),
        begin_(item.page_begin),
        end_(item.page_end) {}

  // Pages [first, first + kPages); the whole warp.
  template <int kPages>
  __device__ void Read(int first, int (&pages)[kPages]) {
    if (first < loaded_end_ - 32) {
      loaded_end_ = first + kPages;
      const int page = loaded_end_ - 1 - static_cast<int>(threadIdx.x % 32);
      loaded_ = page < begin_ || page >= end_ ? kNoPage
                : table_                      ? table_[page]
                                              : page_0_ + static_cast<uint32_t>(page);
    }
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      pages[i] = static_cast<int>(__shfl_sync(~0u, loaded_, loaded_end_ - 1 - (first + i)));
    }
  }

 private:
  const uint32_t* table_;
  uint32_t page_0_;
  int begin_, end_;
  int loaded_end_ = INT32_MAX;
  uint32_t loaded_ = kNoPage;
};

template <class Tiles>
__device__ __forceinline__ void LoadQueries(const PrefillParams& p, typename Tiles::Shared& shared,
                                            const WorkItem& item) {
  BarrierArriveExpect(&shared.q_full, Tiles::kRows * Tiles::kRowBytes);
  const int box_tokens = 64 >> p.pack_shift;
  for (int panel = 0; panel < Tiles::kPanels; ++panel) {
    for (int w = 0; w < Tiles::kConsumers; ++w) {
      TmaLoad3(shared.q[panel][64 * w], &p.q, &shared.q_full, panel * Tiles::kPanel, item.head,
               item.q_row + w * box_tokens);
    }
  }
}

template <class Tiles>
__device__ __forceinline__ void LoadKeys(const PrefillParams& p, typename Tiles::Shared& shared,
                                         int stage, int kv_head,
                                         const int (&pages)[Tiles::kTilePages]) {
  BarrierArriveExpect(&shared.k_full[stage], Tiles::kTileBytes);
#pragma unroll
  for (int i = 0; i < Tiles::kTilePages; ++i) {
#pragma unroll
    for (int panel = 0; panel < Tiles::kPanels; ++panel) {
      TmaLoad4(shared.k[stage][panel][kPageSize * i], &p.k, &shared.k_full[stage],
               panel * Tiles::kPanel, 0, kv_head, pages[i]);
    }
  }
}

template <class Tiles>
__device__ __forceinline__ void LoadValues(const PrefillParams& p, typename Tiles::Shared& shared,
                                           int stage, int kv_head,
                                           const int (&pages)[Tiles::kTilePages]) {
  BarrierArriveExpect(&shared.v_full[stage], Tiles::kTileBytes);
#pragma unroll
  for (int i = 0; i < Tiles::kTilePages; ++i) {
    TmaLoad4(shared.v[stage][i], &p.v, &shared.v_full[stage], 0, 0, kv_head, pages[i]);
  }
}

// One warp loads everything that the consumers of this block read.
template <class Tiles>
__device__ void Produce(const PrefillParams& p, typename Tiles::Shared& shared) {
  const bool elected = threadIdx.x % 32 == 0;
  ItemQueue queue(p);
  Ring<Tiles::kStages> ring;
  for (uint32_t item_phase = 0;; item_phase ^= 1) {
    const WorkItem item = queue.Current();
    BarrierWait(&shared.q_empty, item_phase ^ 1);
    if (elected) shared.items[item_phase] = item;
    if (item.q_tokens == 0) {
      if (elected) BarrierArrive(&shared.q_full);
      break;
    }
    if (elected) LoadQueries<Tiles>(p, shared, item);
    queue.Fetch();
    const bool widened = Tiles::kElementSize == 2 && !p.block_table;
    const int kv_head = widened ? 0 : item.head / p.group;
    PageReader reader(p, item);
    const int first_tile = item.page_begin / Tiles::kTilePages;
    const int tiles_end = (item.page_end + Tiles::kTilePages - 1) / Tiles::kTilePages;
    for (int tile = tiles_end - 1; tile >= first_tile; --tile) {
      int pages[Tiles::kTilePages];
      reader.Read(tile * Tiles::kTilePages, pages);
      BarrierWait(&shared.k_empty[ring.stage], ring.phase ^ 1);
      if (elected) LoadKeys<Tiles>(p, shared, ring.stage, kv_head, pages);
      BarrierWait(&shared.v_empty[ring.stage], ring.phase ^ 1);
      if (elected) LoadValues<Tiles>(p, shared, ring.stage, kv_head, pages);
      ring.Advance();
    }
    queue.Advance();
  }
  queue.Finish();
}

}  // namespace octavo::cuda
