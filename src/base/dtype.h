// Element types of tensors, as files and kernels name them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace octavo {

enum class DType : uint8_t { kF32, kF16, kBF16, kF8E4M3, kF8E5M2, kI8, kU8, kI32, kI64, kBool };

size_t SizeOf(DType dtype);
const char* Name(DType dtype);  // "float32", "bfloat16", "fp8_e4m3", ...
std::optional<DType> DTypeFromSafetensors(std::string_view tag);  // "BF16", "F8_E4M3", ...

}  // namespace octavo
