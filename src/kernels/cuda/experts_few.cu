// Experts for few rows, in the manner of matmul_few.cuh: a block takes 16 outputs of one tile of
// pairs, so the weights of the experts that are used are read once per tile, and no others.
#include <algorithm>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_few.cuh"
#include "kernels/cuda/ops.h"

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

// The pairs of one expert that a block works on.
struct FewTile {
  int expert = -1, pairs = 0;
  uint64_t members = 0;  // of the first 64 pairs; or
  const int32_t* sorted = nullptr;

  __device__ int Pair(int n) const {
    if (sorted) return sorted[n];
    uint64_t left = members;
    for (; n > 0; --n) left &= left - 1;
    return __ffsll(static_cast<int64_t>(left)) - 1;
  }
};

// The index-th expert of up to 64 pairs, in ascending order: found by every warp for itself, which
// is quicker than a kernel that sorts.
__device__ FewTile FindTile(const ExpertsParams& p, int index) {
  if (!p.ids) return {0, p.pairs, (uint64_t{1} << p.pairs) - 1};
  constexpr unsigned kNone = 0x7FFFFFFF;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned low = lane < p.pairs ? static_cast<unsigned>(p.ids[lane]) : kNone;
  const unsigned high = lane + 32 < p.pairs ? static_cast<unsigned>(p.ids[lane + 32]) : kNone;
  unsigned expert = 0, least = 0;
  for (int i = 0; i <= index; ++i) {
    expert = __reduce_min_sync(~0u, min(low >= least ? low : kNone, high >= least ? high : kNone));
    if (expert == kNone) return {};
    least = expert + 1;
  }
  const uint64_t members =
      __ballot_sync(~0u, low == expert) | uint64_t{__ballot_sync(~0u, high == expert)} << 32;
  return {static_cast<int>(expert), __popcll(members), members};
}

template <int kTiles>
__device__ FewTile TileOfBlock(const ExpertsParams& p) {
  const int index = static_cast<int>(blockIdx.y);
  if constexpr (kTiles == kFewExpertPairs / 8) return FindTile(p, index);
  if (index >= *p.tile_count) return {};
  const ExpertTile tile = p.tiles[index];
  return {tile.expert, tile.end - tile.begin, 0, p.sorted + tile.begin};
}

template <class X, int kTiles>
__global__ __launch_bounds__(kFewWarps * 32, kTiles == 1 ? 2 : 1) void gate_up_kernel(
    const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<kTiles> partials[2];
  const int first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const LaneRows at = RowsOfLane(first_out, p.intermediate, p.hidden);
  const bool dense = p.ids == nullptr;
  if (!dense) WaitForInputs();  // the tile depends on them
  const FewTile tile = TileOfBlock<kTiles>(p);
  if (tile.expert < 0) return;
  const auto x_row = [&](int n) -> const X* {
    const int pair = 8 * n + lane / 4;
    return pair < tile.pairs
               ? static_cast<const X*>(p.x) + tile.Pair(pair) / p.top_k * p.x_stride + lane % 4 * 8
               : nullptr;
  };
  float sums[2][kTiles][4] = {};
  StreamFew<kFewAheadOfTwo, 2, X, kTiles>(
      {p.gate + tile.expert * p.weight_stride + at.low,
       p.up + tile.expert * p.weight_stride + at.low},
      at.high_offset, p.hidden, x_row,
      [&] {
        if (dense) WaitForInputs();
      },
      sums);
  partials[0].Put(sums[0]);
  partials[1].Put(sums[1]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * tile.pairs; i += kFewWarps * 32) {
    const int out = i % kFewOuts, pair = i / kFewOuts, column = first_out + out;
    if (column >= p.intermediate) continue;
    float gate = partials[0].Sum(out, pair), up = partials[1].Sum(out, pair);
    if (p.gate_bias) {
      gate += ToFloat(p.gate_bias[tile.expert * p.bias_stride + column]);
      up += ToFloat(p.up_bias[tile.expert * p.bias_stride + column]);
    }
    p.activated[tile.Pair(pair) * p.activated_stride + column] =
        FromFloat<BFloat16>(Activated(p.activation, p.limit, gate, up));
  }
}

template <int kTiles>
__global__ __launch_bounds__(kFewWarps *
                             32) void down_kernel(const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<kTiles> partials;
  // Tiles are older than the kernel before, which has waited for them.
  const FewTile tile = TileOfBlock<kTiles>(p);
  if (tile.expert < 0) return;
  const int first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const LaneRows at = RowsOfLane(first_out, p.hidden, p.intermediate);
  const auto row = [&](int n) -> const BFloat16* {
    const int pair = 8 * n + lane / 4;
    return pair < tile.pairs ? p.activated + tile.Pair(pair) * p.activated_stride + lane % 4 * 8
                             : nullptr;
  };
  float sums[1][kTiles][4] = {};
  StreamFew<kFewAhead, 1, BFloat16, kTiles>(
      {p.down + tile.expert * p.weight_stride + at.low}, at.high_offset, p.intermediate, row,
      [] { WaitForInputs(); }, sums);
  partials.Put(sums[0]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * tile.pairs; i += kFewWarps * 32) {
    const int out = i % kFewOuts, column = first_out + out;
    if (column >= p.hidden) continue;
    float value = partials.Sum(out, i / kFewOuts);
    if (p.down_bias) value += ToFloat(p.down_bias[tile.expert * p.bias_stride + column]);
    const int pair = tile.Pair(i / kFewOuts);
    p.results[int64_t{pair} * p.hidden + column] = value * p.pair_weights[pair];
  }
}

template <int kTiles>
void RunGateUp(const ExpertsParams& params, dim3 grid, cudaStream_t stream) {
  const auto kernel = params.x_type == DType::kF32 ? gate_up_kernel<float, kTiles>
                                                   : gate_up_kernel<BFloat16, kTiles>;
  Launch(kernel, grid, kFewWarps * 32, 0, stream, params);
}

}  // namespace

template <int kPairs>
void RunFewExperts(const ExpertsParams& params, cudaStream_t stream) {
  const auto blocks = [&](int outs) {
    return dim3(static_cast<unsigned>((outs + kFewOuts - 1) / kFewOuts),
                static_cast<unsigned>(params.MostTiles(kPairs)));
  };
  RunGateUp<kPairs / 8>(params, blocks(params.intermediate), stream);
  Launch(down_kernel<kPairs / 8>, blocks(params.hidden), kFewWarps * 32, 0, stream, params);
}
template void RunFewExperts<kFewExpertPairs>(const ExpertsParams&, cudaStream_t);
template void RunFewExperts<kSomeExpertPairs>(const ExpertsParams&, cudaStream_t);

bool GatedProject(const Tensor& x, const Projection& gate, const Projection& up,
                  const GatedActivationArgs& args, cudaStream_t stream) {
  const int rows = static_cast<int>(x.rows());
  const bool bfloat16_biases =
      !gate.bias || (gate.bias.dtype == DType::kBF16 && up.bias.dtype == DType::kBF16);
  if (rows > kFewExpertPairs || !bfloat16_biases || args.out.dtype != DType::kBF16) return false;
  ExpertsParams params;
  params.gate = gate.weight.Row<BFloat16>(0);
  params.up = up.weight.Row<BFloat16>(0);
  params.gate_bias = static_cast<const BFloat16*>(gate.bias.data);
  params.up_bias = static_cast<const BFloat16*>(up.bias.data);
  params.x = x.data;
  params.x_type = x.dtype;
  params.x_stride = x.row_stride;
  params.pairs = rows;
  params.hidden = static_cast<int>(x.columns());
  params.intermediate = static_cast<int>(gate.weight.rows());
  params.top_k = 1;
  params.activation = args.activation;
  params.limit = args.limit;
  params.activated = args.out.Row<BFloat16>(0);
  params.activated_stride = args.out.row_stride;
  RunGateUp<kFewExpertPairs / 8>(
      params, dim3(static_cast<unsigned>((params.intermediate + kFewOuts - 1) / kFewOuts)), stream);
  return true;
}

}  // namespace octavo::cuda
