// The parts of Experts (experts.cu): gate and up, then down, of pairs of a row and one of its
// experts, by one of two pairs of kernels. For many rows pairs are sorted by expert and cut into
// tiles first.
#pragma once

#include <cuda_runtime.h>

#include "kernels/backend.h"
#include "kernels/cuda/vector8.cuh"

namespace octavo::cuda {

// Pairs [begin, end) of the sorted ones, all of one expert.
struct ExpertTile {
  int32_t expert, begin, end;
};

struct ExpertsParams {
  const std::byte *gate = nullptr, *up = nullptr, *down = nullptr;                // of expert 0
  bool mxfp4 = false;                                                             // else bfloat16
  const BFloat16 *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // or null
  int64_t weight_stride = 0, bias_stride = 0;  // from expert to expert: bytes, elements
  const int32_t* ids = nullptr;                // [pairs], by row and k; null: one expert for all
  const ExpertTile* tiles = nullptr;
  const int32_t* tile_count = nullptr;
  const int32_t* sorted = nullptr;  // [pairs] row * top_k + k
  int tile_pairs = 0;
  // few rows: [rows, hidden]; many: [pairs, hidden], sorted, for MXFP4 weights in MmaColumn's order
  const BFloat16* x = nullptr;
  int64_t x_stride = 0;
  int pairs = 0, experts = 0, hidden = 0, intermediate = 0, top_k = 1;
  Activation activation{};
  float limit = 0;
  BFloat16* activated = nullptr;  // [pairs, intermediate]; few rows: by row and k; many: sorted
  int64_t activated_stride = 0;
  const float* pair_weights = nullptr;  // [pairs], by row and k
  float* results = nullptr;             // [pairs, hidden], by row and k, weighted
};

// Few rows: at most so many rows and pairs. Needs no tiles; the weights' stream is the bound.
inline constexpr int kFewExpertRows = 8, kFewExpertPairs = 64;
void RunFewExperts(const ExpertsParams& params, cudaStream_t stream);

// Tensor-core products of tiles of at most params.tile_pairs, which is kWideExpertTile or, where
// weights are MXFP4, kNarrowExpertTile.
inline constexpr int kWideExpertTile = 128, kNarrowExpertTile = 32;
void RunManyBFloat16Experts(const ExpertsParams& params, cudaStream_t stream);
void RunManyMxfp4Experts(const ExpertsParams& params, cudaStream_t stream);

}  // namespace octavo::cuda
