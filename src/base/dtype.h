// Element types of tensors, as files and kernels name them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace octavo {

// kMxfp4: a matrix in the tiles of kernels/mxfp4.h, whose elements have no size of their own.
enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kF8E4M3,
  kF8E5M2,
  kI8,
  kU8,
  kI32,
  kI64,
  kBool,
  kMxfp4
};

size_t SizeOf(DType dtype);     // bytes; not of kMxfp4
const char* Name(DType dtype);  // "float32", "bfloat16", "fp8_e4m3", ...
std::optional<DType> DTypeFromSafetensors(std::string_view tag);  // "BF16", "F8_E4M3", ...

}  // namespace octavo
