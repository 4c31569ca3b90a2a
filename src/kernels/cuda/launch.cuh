// Launches whose start overlaps the end of the kernel before: programmatic dependent launch.
//
// A kernel launched so begins with WaitForInputs(), before which it may read only what no kernel
// writes (weights) and write nothing; after it, everything before in the stream is complete. Then
// it lets the next one start, which waits in its turn.
//
// Kernels that stream weights, or stand between such, let the next one start before they wait
// themselves: mostly it is small and then ready when its inputs are. Norms and append do not, for
// behind them the next weights would take the bus from those that are waited for (a step of
// Llama-3.1-8B: 5.84 ms, 5.77 with the former, 6.2 with both). Decode does it when it has asked for
// its last page. What comes behind one of the former starts while the last but one may still run:
// only behind a WaitForInputs() may a kernel read, before it waits, what the last but one wrote.
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

inline cudaLaunchAttribute EarlyLaunch() {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}

template <class... Parameters, class... Arguments>
void Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute early = EarlyLaunch();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  CUDA_CHECK(
      cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

}  // namespace octavo::cuda
