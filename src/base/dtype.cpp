#include "base/dtype.h"

#include <iterator>

#include "base/error.h"

namespace octavo {
namespace {

struct Row {
  DType dtype;
  size_t size;
  const char* name;
  const char* tag;  // null: in no file
};

constexpr Row kRows[] = {
    {DType::kF32, 4, "float32", "F32"},
    {DType::kF16, 2, "float16", "F16"},
    {DType::kBF16, 2, "bfloat16", "BF16"},
    {DType::kF8E4M3, 1, "fp8_e4m3", "F8_E4M3"},
    {DType::kF8E5M2, 1, "fp8_e5m2", "F8_E5M2"},
    {DType::kI8, 1, "int8", "I8"},
    {DType::kU8, 1, "uint8", "U8"},
    {DType::kI32, 4, "int32", "I32"},
    {DType::kI64, 8, "int64", "I64"},
    {DType::kBool, 1, "bool", "BOOL"},
    {DType::kMxfp4, 0, "mxfp4", nullptr},
};
static_assert(std::size(kRows) == static_cast<size_t>(DType::kMxfp4) + 1);

}  // namespace

size_t SizeOf(DType dtype) {
  const size_t size = kRows[static_cast<size_t>(dtype)].size;
  OCTAVO_CHECK(size > 0, Name(dtype));
  return size;
}
const char* Name(DType dtype) { return kRows[static_cast<size_t>(dtype)].name; }

std::optional<DType> DTypeFromSafetensors(std::string_view tag) {
  for (const Row& row : kRows) {
    if (row.tag && tag == row.tag) return row.dtype;
  }
  return std::nullopt;
}

}  // namespace octavo
