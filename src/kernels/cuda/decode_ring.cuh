// The memory side of decode: what lies in shared memory, and the warp that fills it.
//
// A stage is a page of one kv head as it lies in memory: K and V, each with 64 scales behind it
// where its format has them. At head_dim 256, where a page can be a third of the ring, K and V are
// stages of their own.
#pragma once

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_page.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/plan.h"

namespace octavo::cuda {

// All that a block may have.
inline constexpr int kDecodeSharedBytes = 227 << 10;
inline constexpr int kMaxStages = 32;

// exp2 arguments are raised by this much, which keeps small probabilities out of float16's
// subnormal numbers.
inline constexpr float kProbabilityShift = 12;

template <int kDim>
struct DecodeShared {
  // Registers are dealt out to four warps at a time: 8 with the producer may have 255 each, 9 only
  // 168.
  static constexpr int kWarps = kDim == 256 ? 4 : 7;
  static constexpr int kParts = kDim == 256 ? 2 : 1;  // of a page
  static constexpr int kItems = kDim == 256 ? 2 : 4;
  static constexpr int kThreads = 32 * (kWarps + 1);
  // Merged at a time: 16 rows of 32 columns, 8 of 64, 4 of 128 or 2 of 256, rows padded by 4.
  static constexpr int kMergeFloats = 16 * (32 + 4);

  struct alignas(16) Item {
    WorkItem work;  // sequence -1: there are no more
    ItemLink link;
    uint32_t ring_begin, ring_end;         // serials of its stages
    int32_t ring_stage;                    // index of the first one
    uint32_t ring_phase;                   // and its parity
    float row_sink[kDecodeRows], v_scale;  // where there are such
    float score_scale;                     // DecodeParams::scale and K's
  };

  alignas(128) std::byte q[kItems][kDecodeRows * kDim * 2];  // as in memory
  uint2 q_fragments[kDim / 16 * 2 * 32];
  float merge[kWarps][kMergeFloats];
  float row_scale[kDecodeRows];
  float row_factor[kDecodeRows];  // of a row's merged values
  int32_t row_last[kDecodeRows];  // position of the last key that a row sees
  float max[kWarps][kDecodeRows], sum[kWarps][kDecodeRows];
  Item items[kItems];
  uint32_t pages[kMaxStages];   // what a stage holds: block table entry,
  uint32_t serial[kMaxStages];  // how many stages were filled before it
  uint32_t items_done[kWarps];
  int32_t last_arrival;
  int32_t stages;
  uint64_t item_full[kItems], item_empty[kItems];
  uint64_t full[kMaxStages], empty[kMaxStages];
};

// Where stages and their parts lie; constants where the formats are, since registers are short.
template <int kDim, int kK, int kV>
struct DecodeRing {
  static constexpr int kBegin = (sizeof(DecodeShared<kDim>) + 127) / 128 * 128;
  static constexpr int kScaleBytes = kPageSize * static_cast<int>(sizeof(float));

  const DecodeParams& p;
  std::byte* shared;

  __device__ __forceinline__ int KBytes() const {
    return kPageSize * kDim * (IsWide(Resolve<kK>(p.k_format)) ? 2 : 1);
  }
  __device__ __forceinline__ int VBytes() const {
    return kPageSize * kDim * (IsWide(Resolve<kV>(p.v_format)) ? 2 : 1);
  }
  __device__ __forceinline__ int KScaleBytes() const {
    return HasScaleInPage(Resolve<kK>(p.k_format)) ? kScaleBytes : 0;
  }
  __device__ __forceinline__ int VScaleBytes() const {
    return HasScaleInPage(Resolve<kV>(p.v_format)) ? kScaleBytes : 0;
  }
  // With scales.
  __device__ __forceinline__ int KAllBytes() const { return KBytes() + KScaleBytes(); }
  __device__ __forceinline__ int VAllBytes() const { return VBytes() + VScaleBytes(); }
  __device__ __forceinline__ int StageBytes() const {
    return DecodeShared<kDim>::kParts == 1 ? KAllBytes() + VAllBytes()
                                           : max(KAllBytes(), VAllBytes());
  }
  __device__ __forceinline__ int Stages() const {
    return min(kMaxStages, (kDecodeSharedBytes - kBegin) / StageBytes());
  }
  // Of the stage that holds K, or V; the same one if a page is one stage.
  __device__ __forceinline__ std::byte* K(int stage) const {
    return shared + kBegin + stage * StageBytes();
  }
  __device__ __forceinline__ std::byte* V(int stage) const {
    return K(stage) + (DecodeShared<kDim>::kParts == 1 ? KAllBytes() : 0);
  }
  __device__ __forceinline__ float* VScales(int stage) const {
    return reinterpret_cast<float*>(V(stage) + VBytes());
  }
  __device__ __forceinline__ float* KScales(int stage) const {
    return reinterpret_cast<float*>(K(stage) + KBytes());
  }
};

// A consumer warp's place in the list of items. At head_dim 256 registers are short: nothing of
// this is kept in one while pages are worked on, so the compiler must not see that it is the same
// again.
__device__ __forceinline__ int ThreadAgain() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread);
}
template <class Shared>
__device__ __forceinline__ volatile uint32_t& ItemsDone(Shared& shared) {
  return shared.items_done[ThreadAgain() / 32];
}
template <class Shared>
__device__ __forceinline__ const typename Shared::Item& CurrentItem(Shared& shared) {
  return shared.items[ItemsDone(shared) % Shared::kItems];
}

// What an item's kv head has beside queries and pages; a sink for each lane of the producer.
struct ItemHead {
  int kv_head;
  float sink = 0, v_scale = 0, k_scale = 1;

  __device__ ItemHead(const DecodeParams& p, const WorkItem& item, int lane)
      : kv_head(DivideByGroup(item.head, p.group_inverse)) {
    if (item.sequence < 0) return;
    if (p.sinks && lane < kDecodeRows)
      sink = p.sinks[item.head + lane - DivideByGroup(lane, p.group_inverse) * p.group];
    if (p.v_scale) v_scale = p.v_scale[kv_head];
    if (p.k_scale) k_scale = p.k_scale[kv_head];
  }
};

template <int kDim, int kK, int kV>
__device__ __forceinline__ void Produce(const DecodeParams& p, DecodeShared<kDim>& shared,
                                        const DecodeRing<kDim, kK, kV>& ring, int lane) {
  using Shared = DecodeShared<kDim>;
  const bool elected = lane == 0;
  const int k_bytes = ring.KAllBytes(), v_bytes = ring.VAllBytes();
  const int row_bytes = p.group * kDim * 2;  // of a token's queries
  const PlanCounts counts = *p.counts;
  const bool shares = counts.decode_shared < counts.decode_items;
  int stage = 0, slot = 0;
  uint32_t phase = 0, slot_phase = 0, serial = 0;
  WorkItem item = p.items[blockIdx.x];
  ItemLink link = p.links[blockIdx.x];
  ItemHead head(p, item, lane);
  const auto entries_from = [&](int begin) {
    return begin + lane < item.page_end
               ? __ldg(p.block_table + item.sequence * p.block_table_stride + begin + lane)
               : kNoPage;
  };
  uint32_t entries = item.sequence >= 0 ? entries_from(item.page_begin) : kNoPage;
  __syncthreads();  // barriers have been initialised meanwhile
  WaitForPriorKernels();
  const int stages = shared.stages;
  bool more = item.sequence >= 0;
  while (more) {
    BarrierWait(&shared.item_empty[slot], slot_phase ^ 1);
    int next = 0;
    if (lane < kDecodeRows) shared.items[slot].row_sink[lane] = head.sink;
    __syncwarp();
    if (elected) {
      shared.items[slot].work = item;
      shared.items[slot].link = link;
      shared.items[slot].v_scale = head.v_scale;
      shared.items[slot].score_scale = p.scale * head.k_scale;
      shared.items[slot].ring_begin = serial;
      shared.items[slot].ring_end =
          serial + static_cast<uint32_t>(item.page_end - item.page_begin) * Shared::kParts;
      shared.items[slot].ring_stage = stage;
      shared.items[slot].ring_phase = phase;
      BarrierArriveExpect(&shared.item_full[slot], item.q_tokens * row_bytes);
      for (int t = 0; t < item.q_tokens; ++t) {
        const int64_t row = int64_t{item.q_row + t} * p.heads + item.head;
        BulkLoad(shared.q[slot] + t * row_bytes,
                 static_cast<const std::byte*>(p.q) + row * kDim * 2, row_bytes,
                 &shared.item_full[slot]);
      }
      // Known by the time that this item's pages are on their way.
      next = link.next >= 0 ? link.next
             : shares       ? counts.decode_shared + atomicAdd(p.counters, 1)
                            : counts.decode_items;
    }
    const std::byte* const pages = p.claims + int64_t{head.kv_head} * (k_bytes + v_bytes);
    for (int begin = item.page_begin; begin < item.page_end; begin += 32) {
      if (begin > item.page_begin) entries = entries_from(begin);
      const int count = min(32, item.page_end - begin);
      for (int i = 0; i < count; ++i) {
        const uint32_t page = __shfl_sync(~0u, entries, i);
        const int64_t at = int64_t{page} * kPageUnit;
#pragma unroll
        for (int part = 0; part < Shared::kParts; ++part) {
          const bool has_k = part == 0, has_v = part == Shared::kParts - 1;
          if (elected) {
            uint64_t* full = &shared.full[stage];
            BarrierWait(&shared.empty[stage], phase ^ 1);
            shared.pages[stage] = page;
            *const_cast<volatile uint32_t*>(&shared.serial[stage]) = serial;
            if (page == kNoPage) {
              BarrierArrive(full);
            } else {
              const int bytes = (has_k ? k_bytes : 0) + (has_v ? v_bytes : 0);
              BarrierArriveExpect(full, bytes);
              BulkLoad(ring.K(stage), pages + at + (has_k ? 0 : k_bytes), bytes, full);
            }
          }
          __syncwarp();
          ++serial;
          if (++stage == stages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
    if (++slot == Shared::kItems) {
      slot = 0;
      slot_phase ^= 1;
    }
    next = __shfl_sync(~0u, next, 0);
    more = next < counts.decode_items;
    if (more) {
      item = p.items[next];
      link = p.links[next];
      head = ItemHead(p, item, lane);
      entries = entries_from(item.page_begin);
    }
  }
  // From here on the bus is less than busy.
  LetNextKernelStart();
  BarrierWait(&shared.item_empty[slot], slot_phase ^ 1);
  if (elected) {
    shared.items[slot].work.sequence = -1;
    BarrierArrive(&shared.item_full[slot]);
  }
  // The last block to come here leaves the counters as it found them.
  if (elected && shares && atomicAdd(p.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
    p.counters[0] = 0;
    p.counters[1] = 0;
  }
}

}  // namespace octavo::cuda
