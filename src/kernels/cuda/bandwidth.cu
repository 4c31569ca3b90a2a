#include "kernels/cuda/bandwidth.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cuda/cuda_check.h"

namespace octavo::cuda {
namespace {

__global__ __launch_bounds__(512) void read_kernel(const uint4* from, int64_t count, uint32_t* to) {
  constexpr int kAhead = 8;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  uint32_t sum = 0;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + (kAhead - 1) * step < count; i += kAhead * step) {
    uint4 x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) x[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sum ^= x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
  }
  if (sum == 0x9E3779B9) *to = sum;  // keeps the reads
}

}  // namespace

double ReadBandwidth() {
  constexpr int64_t kBytes = int64_t{4} << 30;
  constexpr int kRuns = 9;
  void* memory = nullptr;
  CUDA_CHECK(cudaMalloc(&memory, kBytes));
  CUDA_CHECK(cudaMemset(memory, 0x5A, kBytes));
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> milliseconds(kRuns);
  for (float& time : milliseconds) {
    CUDA_CHECK(cudaEventRecord(begin));
    read_kernel<<<132 * 4, 512>>>(static_cast<const uint4*>(memory), kBytes / 16,
                                  static_cast<uint32_t*>(memory));
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    CUDA_CHECK(cudaEventElapsedTime(&time, begin, end));
  }
  cudaEventDestroy(end);
  cudaEventDestroy(begin);
  cudaFree(memory);
  std::nth_element(milliseconds.begin(), milliseconds.begin() + kRuns / 2, milliseconds.end());
  return static_cast<double>(kBytes) / (1e-3 * milliseconds[kRuns / 2]);
}

}  // namespace octavo::cuda
