// Launches whose start overlaps the end of the kernel before: programmatic dependent launch.
//
// A kernel launched so begins with WaitForInputs(), before which it may read only what no kernel
// writes (weights) and write nothing; after it, everything before in the stream is complete. Then
// it lets the next one start, which waits in its turn.
//
// Kernels that stream weights, or stand between such, let the next one start before they wait
// themselves: mostly it is small and then ready when its inputs are. Append gains nothing by it.
// Decode does it when it has asked for its last page. What comes behind one of the former starts
// while the last but one may still run: only behind a WaitForInputs() may a kernel read, before it
// waits, what the last but one wrote. (Append reads angles early: after them a step gathers rows.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kernels/cuda/cuda_check.h"

namespace octavo::cuda {

__device__ __forceinline__ void WaitForPriorKernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void WaitForInputs() {
  WaitForPriorKernels();
  LetNextKernelStart();
}

// The same the other way round.
__device__ __forceinline__ void OverlapAndWaitForInputs() {
  LetNextKernelStart();
  WaitForPriorKernels();
}

// Of the current device, which is asked once.
inline int Multiprocessors() {
  static const int multiprocessors = [] {
    int device = 0, count = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }();
  return multiprocessors;
}

inline cudaLaunchAttribute EarlyLaunch() {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}

// What is on its way to registers lies in L1, of which attention leaves a multiprocessor 28 KB. It
// stays so until the multiprocessor is idle and a kernel asks for more: where kernels overlap all
// through a step, never, unless they say so (Llama-3.1-8B at 8k tokens: 7.3 ms instead of 6.2).
// Not for kernels with much shared memory of their own, of which fewer blocks would fit.
inline constexpr size_t kMostSharedBytesBesideL1 = 8192;
inline cudaLaunchAttribute MostlyL1() {
  cudaLaunchAttribute carveout{};
  carveout.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  carveout.val.sharedMemCarveout = 25;  // percent
  return carveout;
}

template <class... Parameters, class... Arguments>
void Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[] = {EarlyLaunch(), MostlyL1()};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shared_bytes <= kMostSharedBytesBesideL1 ? 2 : 1;
  CUDA_CHECK(
      cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

}  // namespace octavo::cuda
