// CUDA_CHECK(cudaCall(...)): throws std::runtime_error naming the call and CUDA's reason.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace octavo::cuda {

inline void CudaCheck(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

}  // namespace octavo::cuda

#define CUDA_CHECK(call) ::octavo::cuda::CudaCheck((call), #call)
