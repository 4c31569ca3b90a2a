// Tensor maps, by which TMA finds boxes of a tensor.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "octavo/kv_layout.h"

namespace octavo::cuda {

// Bytes in up to four dimensions, `strides` (in bytes) apart from the second on; the box's rows,
// which are the swizzle, are 64 or 128 bytes. Throws std::runtime_error where the driver refuses.
CUtensorMap MakeTensorMap(const void* base, int rank, const cuuint64_t* dims,
                          const cuuint64_t* strides, const cuuint32_t* box);

// The same of words of four bytes, as they lie: not swizzled, rows of any multiple of 16 bytes.
CUtensorMap MakeWordTensorMap(const void* base, int rank, const cuuint64_t* dims,
                              const cuuint64_t* strides, const cuuint32_t* box);

// Queries [tokens, heads, row_bytes] in boxes of 64 rows: `pack` heads of each token.
CUtensorMap MakeQueryMap(const void* q, int row_bytes, int heads, int tokens, int pack);

// K and V of a layer whose claim of page 0 would be at `claim`. Coordinates: within a row, row, kv
// head, page; kNoPage, as any coordinate outside, reads as zeros. More than 2^31 pages, and TMA
// faults on kNoPage.
struct PageMaps {
  CUtensorMap k, v;
};
PageMaps MakePageMaps(const KvLayout& layout, const std::byte* claim, int64_t page_stride,
                      int64_t pages);

}  // namespace octavo::cuda
