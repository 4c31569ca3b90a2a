#include "kernels/cuda/combine.h"

#include "kernels/cuda/combine.cuh"
#include "kernels/cuda/cuda_check.h"

namespace octavo::cuda {
namespace {

constexpr int kWarps = 8;

template <int kDim>
__global__ void __launch_bounds__(32 * kWarps, 2)
    combine_kernel(CombineOutput output, const CombineItem* items, const ListRange* which,
                   int blocks_per_item) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = which->count * blocks_per_item;
  items += which->first;
  for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
    const CombineItem item = items[block / blocks_per_item];
    const int row = block % blocks_per_item * kWarps + warp, rows = item.q_tokens * item.pack;
    if (row >= rows) continue;
    const int head = item.head + row % item.pack;
    const int64_t at = int64_t{item.q_row + row / item.pack} * output.heads + head;
    CombineState<kDim, 1> state;
    CombinePartials<kDim, 1, kDim == 256 ? 4 : 8>(output.partials, item, row, rows, 0, 1, lane,
                                                  state);
    float base = state.max[0];
    if (kSides<kDim> == 2) base = fmaxf(base, __shfl_xor_sync(~0u, base, 16));
    if (base == -INFINITY) base = 0;
    const float weight = Exp2(state.max[0] - base);
    const auto all_sides = [&](float x) {
      x *= weight;
      return kSides<kDim> == 2 ? x + __shfl_xor_sync(~0u, x, 16) : x;
    };
    const RowEnd end =
        EndRow(all_sides(state.sum[0]), base, output.sinks ? output.sinks + head : nullptr,
               output.v_scale ? output.v_scale + head / output.group : nullptr);
    for (float4& x : state.out[0])
      x = end.factor * float4{all_sides(x.x), all_sides(x.y), all_sides(x.z), all_sides(x.w)};
    StoreCombinedRow<kDim>(output.out, at, lane, state.out[0]);
    if (output.lse && lane == 0) output.lse[at] = end.lse;
  }
}

}  // namespace

void LaunchCombine(int head_dim, const CombineOutput& output, const CombineItem* items,
                   const ListRange* which, int rows, int blocks, cudaStream_t stream) {
  const auto kernel = head_dim == 64    ? combine_kernel<64>
                      : head_dim == 128 ? combine_kernel<128>
                                        : combine_kernel<256>;
  kernel<<<blocks, 32 * kWarps, 0, stream>>>(output, items, which, (rows + kWarps - 1) / kWarps);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace octavo::cuda
