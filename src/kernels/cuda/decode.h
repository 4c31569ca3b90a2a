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

// x / group, for as many rows or heads as there may be, is x * GroupInverse(group) >> 31.
constexpr uint32_t GroupInverse(int group) {
  return static_cast<uint32_t>(((int64_t{1} << 31) + group - 1) / group);
}
constexpr int DivideByGroup(int x, uint32_t group_inverse) {
  return static_cast<int>(uint64_t{group_inverse} * static_cast<uint32_t>(x) >> 31);
}
static_assert([] {
  bool same = true;
  for (int group = 1; group <= kDecodeRows; ++group) {
    for (const int x : {0, 1, group - 1, group, kDecodeRows - 1, 1 << 16, (1 << 16) * group})
      same &= DivideByGroup(x, GroupInverse(group)) == x / group;
  }
  return same;
}());

struct DecodeParams {
  const WorkItem* items = nullptr;
  const ItemLink* links = nullptr;  // [items]
  const PlanCounts* counts = nullptr;
  int32_t* arrivals = nullptr;  // [cut heads] zero before and after every launch, as are
  int32_t* counters = nullptr;  // [2]
  Partials partials;
  const uint32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  const std::byte* claims = nullptr;  // arena + claim_offset
  KvFormat k_format{}, v_format{};
  const float* k_scale = nullptr;  // [kv_heads], optional
  const float* v_scale = nullptr;
  int heads = 0, group = 0;
  uint32_t group_inverse = 0;
  int window = 0;
  // Makes scores the arguments of exp2, or of the tanh of a soft cap.
  float scale = 0;
  float soft_cap = 0;
  const float* sinks = nullptr;  // [heads], optional
  const void* q = nullptr;       // [tokens, heads, head_dim] bfloat16
  void* out = nullptr;           // [tokens, heads, head_dim] bfloat16
  float* lse = nullptr;          // [tokens, heads], optional
};

std::vector<KernelEntry> DecodeKernels64();
std::vector<KernelEntry> DecodeKernels128();
std::vector<KernelEntry> DecodeKernels256();

}  // namespace octavo::cuda
