// The parts of Experts (experts.cu): pairs of a row and one of its experts, sorted by expert, are
// cut into tiles of one expert each; then gate and up, then down, by one of two pairs of kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/backend.h"
#include "kernels/cuda/vector8.cuh"

namespace octavo::cuda {

// Pairs [begin, end) of the sorted ones, all of one expert.
struct ExpertTile {
  int32_t expert, begin, end;
};

struct ExpertsParams {
  const BFloat16 *gate, *up, *down;                 // of expert 0
  const BFloat16 *gate_bias, *up_bias, *down_bias;  // or null
  int64_t weight_stride, bias_stride;               // from expert to expert, elements
  const ExpertTile* tiles;
  const int32_t* tile_count;
  const int32_t* sorted;  // [pairs] row * top_k + k
  const BFloat16* x;      // few rows: [rows, hidden]; many: [pairs, hidden], in sorted order
  int64_t x_stride;
  int pairs, experts, hidden, intermediate, top_k;
  Activation activation;
  float limit;
  BFloat16* activated;        // [pairs, intermediate], in sorted order
  const float* pair_weights;  // [pairs], by row and k
  float* results;             // [pairs, hidden], by row and k, weighted

  // A bound for the number of tiles, which only the device knows.
  int MostTiles(int tile_pairs) const { return std::min(pairs, experts + pairs / tile_pairs); }
};

// Pairs of a tile.
inline constexpr int kFewExpertPairs = 8, kSomeExpertPairs = 32, kManyExpertPairs = 128;

// Streams an expert's weights once per tile. kPairs: kFewExpertPairs or kSomeExpertPairs.
template <int kPairs>
void RunFewExperts(const ExpertsParams& params, cudaStream_t stream);
// Tensor-core products of tiles of kManyExpertPairs.
void RunManyExperts(const ExpertsParams& params, cudaStream_t stream);

}  // namespace octavo::cuda
