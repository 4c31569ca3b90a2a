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
  CUtensorMap k, v;  // one layer's pages; see PrefillMaps
  const WorkItem* items = nullptr;
  const int32_t* item_count = nullptr;
  int32_t* counters = nullptr;  // [2] zero before and after every launch
  const uint32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
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

  // What only the producer that widens reads: where a layer's claim of page 0 would be, and in it
  // the K of kv head 0; V and the next head's K lie `v_bytes` and `head_bytes` further.
  const std::byte* claim = nullptr;
  int64_t v_bytes = 0, head_bytes = 0;
  KvFormat k_format = KvFormat::kBF16, v_format = KvFormat::kBF16;
  int64_t k_token_scales = -1,
          v_token_scales = -1;  // offsets of kv head 0's in the claim, -1: none
};

// Fills in what follows from the cache and the queries [tokens, heads, head_dim]: maps, addresses,
// scales. The fourth coordinate of the K and V maps is a block table entry; kNoPage, as any
// coordinate outside, reads as zeros.
void SetPrefillMemory(const KvLayer& cache, const void* q, int q_element_size, int tokens,
                      int heads, int pack, PrefillParams* params);

std::vector<KernelEntry> PrefillFp8Kernels();
std::vector<KernelEntry> Prefill16BitKernels64();
std::vector<KernelEntry> Prefill16BitKernels128();
std::vector<KernelEntry> Prefill16BitKernels256();

}  // namespace octavo::cuda
