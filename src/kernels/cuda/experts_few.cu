// Experts for few rows, in the manner of matmul_few.cuh: a block takes 16 outputs of one expert and
// all of its rows, so the weights of the experts that are used are read once, and no others.
#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_few.cuh"
#include "kernels/cuda/ops.h"

namespace octavo::cuda {
namespace {

__device__ int NthBit(uint64_t bits, int n) {
  for (; n > 0; --n) bits &= bits - 1;
  return __ffsll(static_cast<int64_t>(bits)) - 1;
}

// The pairs of one expert.
struct FewTile {
  int expert = -1, pairs = 0;
  uint64_t members = 0;  // of all pairs

  __device__ int Pair(int n) const { return NthBit(members, n); }
};

// The index-th expert of all pairs, in the order in which they come: found by every warp for
// itself, which is quicker than a kernel that sorts.
__device__ FewTile FindTile(const ExpertsParams& p, int index) {
  if (!p.ids) return {0, p.pairs, (uint64_t{1} << p.pairs) - 1};
  if (p.pairs == p.top_k) return {p.ids[index], 1, uint64_t{1} << index};  // one row
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int low = lane < p.pairs ? p.ids[lane] : -1;
  const int high = lane + 32 < p.pairs ? p.ids[lane + 32] : -1;
  // Lanes whose expert is wanted and stands in no lane before.
  const auto first_lanes = [&](int id, bool wanted) {
    const unsigned same = __match_any_sync(~0u, id);
    return __ballot_sync(~0u, wanted && (same & ((1u << lane) - 1)) == 0);
  };
  const unsigned low_first = first_lanes(low, low >= 0);
  int expert = -1;
  if (index < __popc(low_first)) {
    expert = __shfl_sync(~0u, low, NthBit(low_first, index));
  } else if (p.pairs > 32) {
    bool known = high < 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) known |= __shfl_sync(~0u, low, i) == high;
    const unsigned high_first = first_lanes(high, !known);
    index -= __popc(low_first);
    if (index >= __popc(high_first)) return {};
    expert = __shfl_sync(~0u, high, NthBit(high_first, index));
  } else {
    return {};
  }
  const uint64_t members =
      __ballot_sync(~0u, low == expert) | uint64_t{__ballot_sync(~0u, high == expert)} << 32;
  return {expert, __popcll(members), members};
}

template <class Weights>
__global__ __launch_bounds__(Weights::kWarps * 32, Weights::kBlocksOfTwo) void gate_up_kernel(
    const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<Weights::kWarps, 1> partials[2];
  const int first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool dense = p.ids == nullptr;
  // Which expert it is depends on them. In this order: down_kernel reads the ids before it waits.
  if (!dense) WaitForInputs();
  const FewTile tile = FindTile(p, static_cast<int>(blockIdx.y));
  if (tile.expert < 0) return;
  const auto x_row = [&](int) {
    return p.x + tile.Pair(min(lane / 4, tile.pairs - 1)) / p.top_k * p.x_stride + lane % 4 * 8;
  };
  const int64_t expert = tile.expert * p.weight_stride;
  Weights weights[] = {{p.gate + expert, first_out, p.intermediate, p.hidden},
                       {p.up + expert, first_out, p.intermediate, p.hidden}};
  float sums[2][1][4] = {};
  StreamFew<Weights::kAheadOfTwo, Weights::kEarlyXOfTwo, BFloat16>(
      weights, p.hidden, x_row,
      [&] {
        if (dense) OverlapAndWaitForInputs();
      },
      sums);
  partials[0].Put(sums[0]);
  partials[1].Put(sums[1]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * tile.pairs;
       i += Weights::kWarps * 32) {
    const int out = i % kFewOuts, pair = i / kFewOuts, column = first_out + out;
    if (column >= p.intermediate) continue;
    float gate = partials[0].Sum(out, pair), up = partials[1].Sum(out, pair);
    if (p.gate_bias) {
      gate += ToFloat(p.gate_bias[tile.expert * p.bias_stride + column]);
      up += ToFloat(p.up_bias[tile.expert * p.bias_stride + column]);
    }
    p.activated[tile.Pair(pair) * p.activated_stride + column] =
        FromFloat<BFloat16>(Activator(p.activation, p.limit)(gate, up));
  }
}

template <class Weights>
__global__ __launch_bounds__(Weights::kWarps * 32, Weights::kBlocks) void down_kernel(
    const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<Weights::kWarps, 1> partials;
  // The ids are older than the kernel before, which has waited for them.
  const FewTile tile = FindTile(p, static_cast<int>(blockIdx.y));
  if (tile.expert < 0) return;
  const int first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto row = [&](int) {
    return p.activated + tile.Pair(min(lane / 4, tile.pairs - 1)) * p.activated_stride +
           lane % 4 * 8;
  };
  Weights weights[] = {
      {p.down + tile.expert * p.weight_stride, first_out, p.hidden, p.intermediate}};
  float sums[1][1][4] = {};
  constexpr bool kEarlyX = false;  // with kBlocks there are no registers for it
  StreamFew<Weights::kAhead, kEarlyX, BFloat16>(
      weights, p.intermediate, row, [] { OverlapAndWaitForInputs(); }, sums);
  partials.Put(sums[0]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * tile.pairs;
       i += Weights::kWarps * 32) {
    const int out = i % kFewOuts, column = first_out + out;
    if (column >= p.hidden) continue;
    float value = partials.Sum(out, i / kFewOuts);
    if (p.down_bias) value += ToFloat(p.down_bias[tile.expert * p.bias_stride + column]);
    const int pair = tile.Pair(i / kFewOuts);
    p.results[int64_t{pair} * p.hidden + column] = value * p.pair_weights[pair];
  }
}

unsigned Blocks(int outs) { return static_cast<unsigned>((outs + kFewOuts - 1) / kFewOuts); }

template <class Weights>
void Run(const ExpertsParams& params, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(std::min(params.pairs, params.experts));
  Launch(gate_up_kernel<Weights>, dim3(Blocks(params.intermediate), tiles), Weights::kWarps * 32, 0,
         stream, params);
  Launch(down_kernel<Weights>, dim3(Blocks(params.hidden), tiles), Weights::kWarps * 32, 0, stream,
         params);
}

}  // namespace

void RunFewExperts(const ExpertsParams& params, cudaStream_t stream) {
  params.mxfp4 ? Run<Mxfp4Few>(params, stream) : Run<BFloat16Few>(params, stream);
}

bool GatedProject(const Tensor& x, const Projection& gate, const Projection& up,
                  const GatedActivationArgs& args, cudaStream_t stream) {
  const int rows = static_cast<int>(x.rows());
  const bool bfloat16_biases =
      !gate.bias || (gate.bias.dtype == DType::kBF16 && up.bias.dtype == DType::kBF16);
  if (rows > kFewExpertRows || x.dtype != DType::kBF16 || args.out.dtype != DType::kBF16 ||
      !bfloat16_biases)
    return false;
  OCTAVO_CHECK(x.columns() % 8 == 0 && args.out.rows() == x.rows(), ShapeString(x),
               ShapeString(args.out));
  for (const Projection* p : {&gate, &up}) {
    OCTAVO_CHECK(p->weight.dtype == DType::kBF16 && p->weight.contiguous() &&
                     p->weight.columns() == x.columns() && p->weight.rows() == args.out.columns() &&
                     (!p->bias || p->bias.size() == args.out.columns()),
                 ShapeString(p->weight), ShapeString(args.out));
  }
  ExpertsParams params;
  params.gate = gate.weight.Row<std::byte>(0);
  params.up = up.weight.Row<std::byte>(0);
  params.gate_bias = static_cast<const BFloat16*>(gate.bias.data);
  params.up_bias = static_cast<const BFloat16*>(up.bias.data);
  params.x = x.Row<BFloat16>(0);
  params.x_stride = x.row_stride;
  params.pairs = rows;
  params.hidden = static_cast<int>(x.columns());
  params.intermediate = static_cast<int>(gate.weight.rows());
  params.top_k = 1;
  params.activation = args.activation;
  params.limit = args.limit;
  params.activated = args.out.Row<BFloat16>(0);
  params.activated_stride = args.out.row_stride;
  Launch(gate_up_kernel<BFloat16Few>, Blocks(params.intermediate), BFloat16Few::kWarps * 32, 0,
         stream, params);
  return true;
}

}  // namespace octavo::cuda
