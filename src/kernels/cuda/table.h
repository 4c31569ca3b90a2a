// The table of attention kernels: everything that this library can run stands in it, one row each,
// and whoever dispatches, tests or measures walks it.
#pragma once

#include <optional>
#include <span>

#include "octavo/attention.h"

namespace octavo::cuda {

enum class Phase : uint8_t { kDecode, kPrefill };

struct KernelEntry {
  Phase phase;
  int head_dim;
  std::optional<KvFormat> k, v;  // as the kernel reads them; none: any without a row of its own
  AttentionMath math;
  bool soft_cap;         // whether calls may give one
  const void* function;  // takes DecodeParams (decode.h) or PrefillParams (prefill.h)
  int rows;              // of an item, at most
  int tile_tokens;       // of a KV tile; splits are multiples of it
  int threads;           // of a block, of which each multiprocessor holds one
  int shared_bytes;      // dynamic shared memory of a block
};

std::span<const KernelEntry> KernelTable();

// The row for a cache of these formats, the more special one first; null if there is none. Decode
// computes with 16 bits whatever `math` says; prefill in 16 bits reads PrefillFormat
// (widen_pages.h).
const KernelEntry* FindKernel(Phase phase, int head_dim, KvFormat k, KvFormat v, AttentionMath math,
                              bool soft_cap);

}  // namespace octavo::cuda
