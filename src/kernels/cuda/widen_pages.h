// Widening: what prefill in 16-bit math does with pages that are not the tensor cores' 16-bit type.
// A kernel of its own writes them, in that type and with a token's own scale multiplied in, to a
// buffer of the plan, once for all the blocks of queries that read them. Static scales stay out.
#pragma once

#include <cuda_runtime.h>

#include <optional>

#include "kernels/cuda/work.h"
#include "octavo/attention.h"
#include "octavo/kv_layout.h"

namespace octavo::cuda {

// The type in which 16-bit prefill reads such pages: that of the operand that has 16 bits already,
// float16 where neither has, which holds all 8-bit formats exactly. None for two different 16-bit
// types.
std::optional<KvFormat> PrefillFormat(KvFormat k, KvFormat v);

struct WidenParams {
  KvLayer cache;
  BlockTable block_table;
  const WidenItem* items = nullptr;
  const PrefillRound* round = nullptr;  // which of them
  KvFormat format = KvFormat::kF16;
  std::byte* out =
      nullptr;  // [round.widened_pages] K [kPageSize, head_dim], V [head_dim, kPageSize]
};
// Pages that are not there become zeros. head_dim 64, 128 or 256.
void WidenPages(const WidenParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace octavo::cuda
