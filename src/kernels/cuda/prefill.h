// Prefill: blocks of up to 128 or 192 query rows against all the keys they see, on wgmma. One
// persistent grid takes items from a list; splits leave partial results to combine.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/table.h"
#include "kernels/cuda/work.h"
#include "octavo/kv_layout.h"

namespace octavo::cuda {

struct PrefillParams {
  CUtensorMap q;     // [tokens, heads, head_dim], read in boxes of 64 rows
  CUtensorMap k, v;  // one layer's pages; the fourth coordinate says which
  const WorkItem* items = nullptr;
  const ListRange* round = nullptr;       // of items
  int32_t* counters = nullptr;            // [2] zero before and after every launch
  const uint32_t* block_table = nullptr;  // null: pages are widened, and an item's `sequence` is
  int64_t block_table_stride = 0;         // where page 0 would be
  Partials partials;
  int heads = 0, group = 0;
  int pack_shift = 0;  // log2 of an item's `pack`
  int window = 0;
  float scale_log2 = 0;            // softmax scale * log2(e)
  float soft_cap = 0;              // 0: none; 16-bit math only
  const float* q_scale = nullptr;  // [tokens, heads]
  const float* k_scale = nullptr;  // [kv_heads], optional
  const float* v_scale = nullptr;
  const float* sinks = nullptr;  // [heads], optional
  void* out = nullptr;           // [tokens, heads, head_dim] bfloat16
  float* lse = nullptr;          // [tokens, heads], optional
};

std::vector<KernelEntry> PrefillFp8Kernels();
std::vector<KernelEntry> Prefill16BitKernels();

}  // namespace octavo::cuda
