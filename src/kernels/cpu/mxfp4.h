// MXFP4 weights on the CPU.
#pragma once

#include "base/tensor.h"

namespace octavo::cpu {

// Rows [begin, end) of an MXFP4 matrix as bfloat16, exact; begin: of a tile (kernels/mxfp4.h). Into
// memory of Mxfp4WidenedSize(end - begin, columns) elements.
Tensor WidenMxfp4(const Tensor& weight, int64_t begin, int64_t end, uint16_t* memory);
int64_t Mxfp4WidenedSize(int64_t rows, int64_t columns);

}  // namespace octavo::cpu
