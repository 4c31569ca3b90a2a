// Launches whose start overlaps the end of the kernel before: programmatic dependent launch.
//
// A kernel launched so begins with WaitForInputs(), before which it may read only what no kernel
// writes (weights) and write nothing; after it, everything before in the stream is complete. Then
// it lets the next one start, which waits in its turn.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kernels/cuda/cuda_check.h"

namespace octavo::cuda {

__device__ __forceinline__ void WaitForInputs() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

struct EarlyLaunch {
  EarlyLaunch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, bool early = true) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = early;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  EarlyLaunch(const EarlyLaunch&) = delete;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
};

template <class... Parameters, class... Arguments>
void Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  const EarlyLaunch launch(grid, block, shared_bytes, stream);
  CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel,
                                Parameters(std::forward<Arguments>(arguments))...));
}

}  // namespace octavo::cuda
