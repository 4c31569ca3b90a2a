#include "kernels/cuda/combine.h"

#include "kernels/cuda/combine.cuh"
#include "kernels/cuda/cuda_check.h"

namespace octavo::cuda {
namespace {

constexpr int kWarps = 8;

template <int kDim>
__global__ void __launch_bounds__(32 * kWarps, 2)
    combine_kernel(CombineOutput output, const CombineItem* items, const int32_t* count,
                   int blocks_per_item) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = *count * blocks_per_item;
  for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
    const CombineItem item = items[block / blocks_per_item];
    const int row = block % blocks_per_item * kWarps + warp, rows = item.q_tokens * item.pack;
    if (row >= rows) continue;
    float4 sum[1][(kDim + 127) / 128];
    CombineRows<kDim, 1>(output, item, row, rows, 0, 1, lane, sum);
    StoreCombinedRow<kDim>(output, item, row, lane, sum[0]);
  }
}

}  // namespace

void LaunchCombine(int head_dim, const CombineOutput& output, const CombineItem* items,
                   const int32_t* count, int rows, int blocks, cudaStream_t stream) {
  const auto kernel = head_dim == 64    ? combine_kernel<64>
                      : head_dim == 128 ? combine_kernel<128>
                                        : combine_kernel<256>;
  kernel<<<blocks, 32 * kWarps, 0, stream>>>(output, items, count, (rows + kWarps - 1) / kWarps);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace octavo::cuda
