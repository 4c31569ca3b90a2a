// Adds up the partial results of prefill blocks: a launch of its own, a warp for each row. (Decode
// does it inside its own launch.)
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/work.h"

namespace octavo::cuda {

struct CombineOutput {
  Partials partials;
  int heads = 0, group = 0;
  const float* v_scale = nullptr;  // [kv_heads], optional
  const float* sinks = nullptr;    // [heads], optional
  void* out = nullptr;             // [tokens, heads, head_dim] bfloat16
  float* lse = nullptr;            // [tokens, heads], optional
};

// `items` and which of them are device memory; no item has more than `rows` rows.
void LaunchCombine(int head_dim, const CombineOutput& output, const CombineItem* items,
                   const ListRange* which, int rows, int blocks, cudaStream_t stream);

}  // namespace octavo::cuda
