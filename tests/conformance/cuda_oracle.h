// Attention in double precision on the device, as plainly as can be: what the CUDA kernels are
// compared with where kernels/reference would take too long. cuda_attention.cpp compares the two.
#pragma once

#include <cstdint>

#include "octavo/attention.h"

namespace octavo::conformance {

struct OracleArgs {
  cuda::AttentionShape shape;
  KvLayer cache;
  cuda::BlockTable block_table;
  const int32_t* row_sequence;  // [rows] of the block table
  const int32_t* row_position;  // [rows] of the query in its sequence
  int rows;
  const void* q;               // [rows, heads, head_dim] bfloat16
  const uint8_t* fp8_queries;  // [rows], optional: those in q_fp8, divided by q_scale
  const void* q_fp8;
  const float* q_scale;
  float scale, soft_cap;
  const float* sinks;
  double* out;  // [rows, heads, head_dim]
  double* lse;  // [rows, heads]
};
void OracleAttention(const OracleArgs& args);

// Fills bfloat16 memory with normally distributed numbers, elements `first` and on of `seed`, each
// of which is always the same.
void FillNormal(void* to, int64_t count, uint64_t seed, int64_t first, float mean, float deviation);

}  // namespace octavo::conformance
