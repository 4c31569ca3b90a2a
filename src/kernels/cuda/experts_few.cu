// Experts for few rows, in the manner of matmul_few.cuh: a block takes 16 outputs of one tile of
// pairs, so the weights of the experts that are used are read once per tile, and no others.
#include <algorithm>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_few.cuh"

namespace octavo::cuda {
namespace {

// Where in a matrix [outs, k] a lane's two rows begin; rows behind the last are clamped.
struct LaneRows {
  int64_t low, high_offset;  // elements
};
__device__ LaneRows RowsOfLane(int first_out, int outs, int k) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int low = min(first_out + lane / 4, outs - 1);
  const int high = min(first_out + lane / 4 + 8, outs - 1);
  return {int64_t{low} * k + lane % 4 * 8, int64_t{high - low} * k};
}

template <int kTiles>
__global__ __launch_bounds__(kFewWarps *
                             32) void gate_up_kernel(const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<kTiles> partials[2];
  WaitForInputs();
  if (static_cast<int>(blockIdx.y) >= *p.tile_count) return;
  const ExpertTile tile = p.tiles[blockIdx.y];
  const int first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const LaneRows at = RowsOfLane(first_out, p.intermediate, p.hidden);
  const auto x_row = [&](int n) -> const BFloat16* {
    const int pair = tile.begin + 8 * n + lane / 4;
    return pair < tile.end ? p.x + p.sorted[pair] / p.top_k * p.x_stride + lane % 4 * 8 : nullptr;
  };
#pragma unroll
  for (int matrix = 0; matrix < 2; ++matrix) {
    const BFloat16* weights =
        (matrix == 0 ? p.gate : p.up) + tile.expert * p.weight_stride + at.low;
    float sums[kTiles][4] = {};
    StreamFew<BFloat16, kTiles>(
        weights, at.high_offset, p.hidden, x_row, [] {}, sums);
    partials[matrix].Put(sums);
  }
  __syncthreads();
  const int pairs = tile.end - tile.begin;
  for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * pairs; i += kFewWarps * 32) {
    const int out = i % kFewOuts, pair = i / kFewOuts, column = first_out + out;
    if (column >= p.intermediate) continue;
    float gate = partials[0].Sum(out, pair), up = partials[1].Sum(out, pair);
    if (p.gate_bias) {
      gate += ToFloat(p.gate_bias[tile.expert * p.bias_stride + column]);
      up += ToFloat(p.up_bias[tile.expert * p.bias_stride + column]);
    }
    p.activated[int64_t{tile.begin + pair} * p.intermediate + column] =
        FromFloat<BFloat16>(Activated(p.activation, p.limit, gate, up));
  }
}

template <int kTiles>
__global__ __launch_bounds__(kFewWarps *
                             32) void down_kernel(const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<kTiles> partials;
  WaitForInputs();
  if (static_cast<int>(blockIdx.y) >= *p.tile_count) return;
  const ExpertTile tile = p.tiles[blockIdx.y];
  const int first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const LaneRows at = RowsOfLane(first_out, p.hidden, p.intermediate);
  const auto row = [&](int n) -> const BFloat16* {
    const int pair = tile.begin + 8 * n + lane / 4;
    return pair < tile.end ? p.activated + int64_t{pair} * p.intermediate + lane % 4 * 8 : nullptr;
  };
  float sums[kTiles][4] = {};
  StreamFew<BFloat16, kTiles>(
      p.down + tile.expert * p.weight_stride + at.low, at.high_offset, p.intermediate, row, [] {},
      sums);
  partials.Put(sums);
  __syncthreads();
  const int pairs = tile.end - tile.begin;
  for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * pairs; i += kFewWarps * 32) {
    const int out = i % kFewOuts, pair = i / kFewOuts, column = first_out + out;
    if (column >= p.hidden) continue;
    float value = partials.Sum(out, pair);
    if (p.down_bias) value += ToFloat(p.down_bias[tile.expert * p.bias_stride + column]);
    const int source = p.sorted[tile.begin + pair];
    p.results[int64_t{source} * p.hidden + column] = value * p.pair_weights[source];
  }
}

}  // namespace

template <int kPairs>
void RunFewExperts(const ExpertsParams& params, cudaStream_t stream) {
  const auto blocks = [&](int outs) {
    return dim3(static_cast<unsigned>((outs + kFewOuts - 1) / kFewOuts),
                static_cast<unsigned>(params.MostTiles(kPairs)));
  };
  Launch(gate_up_kernel<kPairs / 8>, blocks(params.intermediate), kFewWarps * 32, 0, stream,
         params);
  Launch(down_kernel<kPairs / 8>, blocks(params.hidden), kFewWarps * 32, 0, stream, params);
}
template void RunFewExperts<kFewExpertPairs>(const ExpertsParams&, cudaStream_t);
template void RunFewExperts<kSomeExpertPairs>(const ExpertsParams&, cudaStream_t);

}  // namespace octavo::cuda
