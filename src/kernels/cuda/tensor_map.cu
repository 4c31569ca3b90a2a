#include "kernels/cuda/tensor_map.h"

#include <stdexcept>
#include <string>

#include "kernels/cuda/prefill.h"

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

void SetPrefillMemory(const KvLayer& cache, const void* q, int q_element_size, int tokens,
                      int heads, int pack, PrefillParams* params) {
  const KvLayout& layout = cache.layout;
  const auto unsigned64 = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const auto row_box = [](int64_t bytes) {
    return static_cast<cuuint32_t>(bytes < 128 ? bytes : 128);
  };

  const int64_t q_row = int64_t{layout.head_dim} * q_element_size;
  const cuuint64_t q_dims[] = {unsigned64(q_row), unsigned64(heads), unsigned64(tokens)};
  const cuuint64_t q_strides[] = {unsigned64(q_row), unsigned64(q_row * heads)};
  const cuuint32_t q_box[] = {row_box(q_row), static_cast<cuuint32_t>(pack),
                              static_cast<cuuint32_t>(64 / pack)};
  params->q = MakeTensorMap(q, 3, q_dims, q_strides, q_box);

  // Any 1 KiB of a 2 TiB arena may begin a page. (More than 2^31 units, and TMA faults on kNoPage.)
  const cuuint64_t units = uint64_t{1} << 31;
  const cuuint64_t head_stride = unsigned64(layout.KBytes() + layout.VBytes());
  const std::byte* claim = cache.arena + cache.claim_offset;
  const int64_t k_row = layout.KBytes() / kPageSize, v_row = layout.VBytes() / layout.head_dim;
  const cuuint64_t k_dims[] = {unsigned64(k_row), kPageSize, unsigned64(layout.kv_heads), units};
  const cuuint64_t k_strides[] = {unsigned64(k_row), head_stride, kPageUnit};
  const cuuint32_t k_box[] = {row_box(k_row), kPageSize, 1, 1};
  params->k = MakeTensorMap(claim + layout.KOffset(0), 4, k_dims, k_strides, k_box);
  const cuuint64_t v_dims[] = {unsigned64(v_row), unsigned64(layout.head_dim),
                               unsigned64(layout.kv_heads), units};
  const cuuint64_t v_strides[] = {unsigned64(v_row), head_stride, kPageUnit};
  const cuuint32_t v_box[] = {row_box(v_row), static_cast<cuuint32_t>(layout.head_dim), 1, 1};
  params->v = MakeTensorMap(claim + layout.VOffset(0), 4, v_dims, v_strides, v_box);

  params->claim = claim;
  params->v_bytes = layout.KBytes();
  params->head_bytes = layout.KBytes() + layout.VBytes();
  params->k_format = layout.k_format;
  params->v_format = layout.v_format;
  const auto is_static = [](KvFormat format) {
    return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
  };
  params->k_scale = is_static(layout.k_format) ? cache.k_scale : nullptr;
  params->v_scale = is_static(layout.v_format) ? cache.v_scale : nullptr;
  params->k_token_scales = HasTokenScales(layout.k_format) ? layout.KScaleOffset(0) : -1;
  params->v_token_scales = HasTokenScales(layout.v_format) ? layout.VScaleOffset(0) : -1;
}

}  // namespace octavo::cuda
