#include "kernels/cuda/tensor_map.h"

#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode EncodeFunction() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || !function)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled (needs CUDA 12)");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

CUtensorMap Make(CUtensorMapDataType type, CUtensorMapSwizzle swizzle, const void* base, int rank,
                 const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box) {
  CUtensorMap map;
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      EncodeFunction()(&map, type, rank, const_cast<void*>(base), dims, strides, box, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(result));
  }
  return map;
}

cuuint64_t Unsigned(int64_t n) { return static_cast<cuuint64_t>(n); }
cuuint32_t RowBox(int64_t bytes) { return static_cast<cuuint32_t>(bytes < 128 ? bytes : 128); }

}  // namespace

CUtensorMap MakeTensorMap(const void* base, int rank, const cuuint64_t* dims,
                          const cuuint64_t* strides, const cuuint32_t* box) {
  return Make(CU_TENSOR_MAP_DATA_TYPE_UINT8,
              box[0] == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, base, rank,
              dims, strides, box);
}

CUtensorMap MakeWordTensorMap(const void* base, int rank, const cuuint64_t* dims,
                              const cuuint64_t* strides, const cuuint32_t* box) {
  return Make(CU_TENSOR_MAP_DATA_TYPE_UINT32, CU_TENSOR_MAP_SWIZZLE_NONE, base, rank, dims, strides,
              box);
}

CUtensorMap MakeQueryMap(const void* q, int row_bytes, int heads, int tokens, int pack) {
  const cuuint64_t row = Unsigned(row_bytes);
  const cuuint64_t dims[] = {row, Unsigned(heads), Unsigned(tokens)};
  const cuuint64_t strides[] = {row, row * Unsigned(heads)};
  const cuuint32_t box[] = {RowBox(row_bytes), static_cast<cuuint32_t>(pack),
                            static_cast<cuuint32_t>(64 / pack)};
  return MakeTensorMap(q, 3, dims, strides, box);
}

PageMaps MakePageMaps(const KvLayout& layout, const std::byte* claim, int64_t page_stride,
                      int64_t pages) {
  const cuuint64_t head_stride = Unsigned(layout.HeadBytes());
  const int64_t k_row = layout.KBytes() / kPageSize, v_row = layout.VBytes() / layout.head_dim;
  const cuuint64_t k_dims[] = {Unsigned(k_row), kPageSize, Unsigned(layout.kv_heads),
                               Unsigned(pages)};
  const cuuint64_t k_strides[] = {Unsigned(k_row), head_stride, Unsigned(page_stride)};
  const cuuint32_t k_box[] = {RowBox(k_row), kPageSize, 1, 1};
  const cuuint64_t v_dims[] = {Unsigned(v_row), Unsigned(layout.head_dim),
                               Unsigned(layout.kv_heads), Unsigned(pages)};
  const cuuint64_t v_strides[] = {Unsigned(v_row), head_stride, Unsigned(page_stride)};
  const cuuint32_t v_box[] = {RowBox(v_row), static_cast<cuuint32_t>(layout.head_dim), 1, 1};
  return {MakeTensorMap(claim + layout.KOffset(0), 4, k_dims, k_strides, k_box),
          MakeTensorMap(claim + layout.VOffset(0), 4, v_dims, v_strides, v_box)};
}

}  // namespace octavo::cuda
