// Tensor maps, by which TMA finds boxes of a tensor.
#pragma once

#include <cuda.h>

namespace octavo::cuda {

// Bytes in up to four dimensions, `strides` (in bytes) apart from the second on; the box's rows,
// which are the swizzle, are 64 or 128 bytes. Throws std::runtime_error where the driver refuses.
CUtensorMap MakeTensorMap(const void* base, int rank, const cuuint64_t* dims,
                          const cuuint64_t* strides, const cuuint32_t* box);

// The same of words of four bytes, as they lie: not swizzled, rows of any multiple of 16 bytes.
CUtensorMap MakeWordTensorMap(const void* base, int rank, const cuuint64_t* dims,
                              const cuuint64_t* strides, const cuuint32_t* box);

}  // namespace octavo::cuda
