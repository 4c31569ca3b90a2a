// Decode: up to kDecodeRows query rows per item against the pages it names, at the speed of the
// memory bus. Each block of a persistent grid works on its own items, then on shared ones; the last
// block to finish a part of a cut sequence adds up the parts. docs/kernels/decode.md has the
// arithmetic behind the shapes.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/plan.h"
#include "kernels/cuda/table.h"
#include "kernels/cuda/work.h"
#include "octavo/kv_layout.h"

namespace octavo::cuda {

// row / group of an item's rows is row * GroupInverse(group) >> 8.
constexpr int GroupInverse(int group) { return (256 + group - 1) / group; }
static_assert([] {
  bool same = true;
  for (int group = 1; group <= kDecodeRows; ++group) {
    for (int row = 0; row < kDecodeRows; ++row)
      same &= row * GroupInverse(group) >> 8 == row / group;
  }
  return same;
}());

struct DecodeParams {
  const WorkItem* items = nullptr;
  const ItemLink* links = nullptr;  // [items]
  const PlanCounts* counts = nullptr;
  const CombineItem* combines = nullptr;
  int32_t* arrivals = nullptr;  // [combines] zero before and after every launch, as are
  int32_t* counters = nullptr;  // [2]
  Partials partials;
  const uint32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  const std::byte* claims = nullptr;  // arena + claim_offset
  KvFormat k_format{}, v_format{};
  const float* k_scale = nullptr;  // [kv_heads], optional
  const float* v_scale = nullptr;
  int heads = 0, group = 0;
  int group_inverse = 0;
  int window = 0;
  float scale = 0, soft_cap = 0;
  const float* sinks = nullptr;         // [heads], optional
  const void* q = nullptr;              // [tokens, heads, head_dim] bfloat16
  void* out = nullptr;                  // [tokens, heads, head_dim] bfloat16
  float* lse = nullptr;                 // [tokens, heads], optional
  const std::byte* prefetch = nullptr;  // optional: to L2 when all pages have been asked for
  int64_t prefetch_bytes = 0;
};

std::vector<KernelEntry> DecodeKernels64();
std::vector<KernelEntry> DecodeKernels128();
std::vector<KernelEntry> DecodeKernels256();

}  // namespace octavo::cuda
