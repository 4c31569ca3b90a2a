// Weights that must change type or order before a kernel can read them: float-8 with scales to
// BF16, MXFP4 blocks to tiles, and gpt_oss's [in, 2 * out] stacks to [out, in]. Pure functions over
// memory that the caller has checked and allocated.
#pragma once

#include "base/tensor.h"
#include "base/thread_pool.h"

namespace octavo {

// Element `index` of a float32, bfloat16 or float16 tensor.
float ScaleAt(const Tensor& scales, int64_t index);

// out[r, c] = bf16(codes[r, c] * scale[r]). codes: [rows, columns] fp8_e4m3; scales: one, or one
// per row; out: bfloat16.
void WidenFp8(const Tensor& codes, const Tensor& scales, const Tensor& out, ThreadPool& threads);

// MXFP4 rows first_row, first_row + row_step, ... of one matrix to the rows of out [rows, columns].
// blocks: [matrix rows, columns / 32, 16] uint8, the low half of a byte is the even element;
// scales: [matrix rows, columns / 32] uint8, a power of two with bias 127. Pack: to MXFP4 in tiles
// (kernels/mxfp4.h) whose padding is zero already, of scales up to mxfp4::kMostScale. Widen: to
// bfloat16, exactly, of scales up to kMostMxfp4Scale.
inline constexpr int kMostMxfp4Scale = 252;  // 6 * 2^125 is still finite; 255 is NaN
void PackMxfp4(const Tensor& blocks, const Tensor& scales, int64_t first_row, int64_t row_step,
               const Tensor& out);
void WidenMxfp4(const Tensor& blocks, const Tensor& scales, int64_t first_row, int64_t row_step,
                const Tensor& out);

// out[r, c] = in[c, first_column + r * column_step], of one 1-, 2- or 4-byte dtype. in: [columns of
// out, ...].
void TransposeColumns(const Tensor& in, int64_t first_column, int64_t column_step,
                      const Tensor& out);

}  // namespace octavo
