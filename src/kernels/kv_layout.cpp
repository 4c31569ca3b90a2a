#include "octavo/kv_layout.h"

#include "base/dtype.h"

#include <iterator>

namespace octavo {
namespace {

struct Row {
  KvFormat format;
  const char* name;
  DType storage;
  bool token_scales;
};

constexpr Row kRows[] = {
    {KvFormat::kF32, "fp32", DType::kF32, false},
    {KvFormat::kF16, "fp16", DType::kF16, false},
    {KvFormat::kBF16, "bf16", DType::kBF16, false},
    {KvFormat::kFp8E4M3, "fp8_e4m3", DType::kF8E4M3, false},
    {KvFormat::kFp8E5M2, "fp8_e5m2", DType::kF8E5M2, false},
    {KvFormat::kFp8PerTokenHead, "fp8_per_token_head", DType::kF8E4M3, true},
    {KvFormat::kInt8PerTokenHead, "int8_per_token_head", DType::kI8, true},
};
static_assert(std::size(kRows) == static_cast<size_t>(KvFormat::kInt8PerTokenHead) + 1);

const Row& RowOf(KvFormat format) { return kRows[static_cast<size_t>(format)]; }

}  // namespace

const char* Name(KvFormat format) { return RowOf(format).name; }
DType StorageDType(KvFormat format) { return RowOf(format).storage; }
int ElementSize(KvFormat format) { return static_cast<int>(SizeOf(StorageDType(format))); }
bool HasTokenScales(KvFormat format) { return RowOf(format).token_scales; }

std::optional<KvFormat> KvFormatFromName(std::string_view name) {
  if (name == "fp8") return KvFormat::kFp8E4M3;
  for (const Row& row : kRows) {
    if (name == row.name) return row.format;
    if (ElementSize(row.format) > 1 && name == Name(row.storage))
      return row.format;  // "bfloat16", ...
  }
  return std::nullopt;
}

int VPosition(KvFormat format, int token) {
  if (ElementSize(format) > 1) return token;
  const int n = token % 16;
  return token - n + 4 * ((n % 8) / 2) + 2 * (n / 8) + n % 2;
}

int VToken(KvFormat format, int position) {
  if (ElementSize(format) > 1) return position;
  const int p = position % 16;
  return position - p + 8 * ((p % 4) / 2) + 2 * (p / 4) + p % 2;
}

}  // namespace octavo
