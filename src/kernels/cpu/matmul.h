// Matrix products on the CPU (Highway): one kernel for every number of rows.
//
// A result is a dot product: one vector accumulator along each panel of kPanel columns, lanes added
// as a tree of adjacent pairs, panels added in order, then the bias. Where the CPU multiplies pairs
// of bfloat16 and both sides are such, a lane adds both products of a pair. None of this depends on
// the tile, the block or the thread, so a row's bits do not depend on what else is in the call.
#pragma once

#include "base/tensor.h"
#include "base/thread_pool.h"
#include "kernels/backend.h"
#include "kernels/cpu/scratch.h"

namespace octavo::cpu {

// Rows in the form in which the kernel reads x: widened to float32, or `pairs` of bfloat16 that
// take the place of one; `stride` floats apart, zero behind the last column.
struct FloatRows {
  float* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
  bool pairs = false;  // for bfloat16 weights of an even row_stride

  FloatRows Rows(int64_t begin, int64_t end) const {
    return {data + begin * stride, stride, end - begin, pairs};
  }
};

int64_t FloatRowStride(int64_t columns);  // columns, rounded up to a multiple of the longest vector

// out[i] = x[ids[i]], or x[i] without ids.
void WidenRows(const Tensor& x, const int32_t* ids, const FloatRows& out);

// out[r, o - begin] = x[r] . weight[o] + bias[o] for o in [begin, end). out: float32 or bfloat16,
// rows of its own stride; with `accumulate`, out += that. `sums` holds MatMulSums(rows, end -
// begin) floats. One thread.
struct MatMulBlockArgs {
  FloatRows x;
  Tensor weight, bias;
  int64_t begin = 0, end = 0;
  Tensor out;
  float* sums = nullptr;
  bool accumulate = false;
};
// MXFP4 weights: `begin` a multiple of mxfp4::kTileRows, and Mxfp4Rows() not 0.
inline constexpr int64_t MatMulSums(int64_t rows, int64_t outs) { return rows * outs; }
void MatMulBlock(const MatMulBlockArgs& args);
// How many rows of x one pass over MXFP4 weights serves; more are better off with widened weights
// (mxfp4.h). 0: no vectors for it.
int64_t Mxfp4Rows();

// How a product of [rows, in] with [outs, in] is cut into work items for `threads`.
struct MatMulGrid {
  int64_t block_rows = 0, block_outs = 0;
  int64_t row_blocks = 0, out_blocks = 0;
  int64_t items() const { return row_blocks * out_blocks; }
};
MatMulGrid PlanMatMul(int64_t rows, int64_t outs, int64_t columns, int threads);

// Whether a product repays waking the pool, which takes 4 us: one thread does some 100
// multiply-adds a ns, and reads some 15 bf16 weights a ns from memory; from 15 us on.
inline constexpr bool WorthThreads(int64_t rows, int64_t outs, int64_t columns) {
  return outs * columns * (7 + rows) >= 1'500'000;
}

struct MatMulScratch {
  Scratch x, sums;
};
void MatMul(const MatMulArgs& args, ThreadPool& pool, MatMulScratch& scratch);

}  // namespace octavo::cpu
