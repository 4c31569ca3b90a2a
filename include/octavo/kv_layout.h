// How a layer's keys and values lie in a page: the same bytes for every backend.
//
// A page holds kPageSize tokens of all layers of a group. Each layer claims a stretch of it
// (multiples of 1 KiB, so every claim can be copied in bulk): per kv head, K is [kPageSize,
// head_dim] and V, transposed, [head_dim, kPageSize]; behind each, where its format has them, stand
// its dynamic scales, [kPageSize] float32. So all that attention reads of a head is one stretch.
//
// In 8-bit V, token n of each group of 16 stands at position 4*((n%8)/2) + 2*(n/8) + n%2, which is
// the order in which Hopper's tensor cores hold probabilities (docs/kv-cache.md derives it). 16-
// and 32-bit V keep natural order. K is never permuted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace octavo {

inline constexpr int kPageSize = 64;        // tokens
inline constexpr int64_t kPageUnit = 1024;  // bytes; block tables count in these
inline constexpr uint32_t kNoPage =
    0xFFFFFFFFu;  // block table entry of a page that is not there (behind a window)

enum class DType : uint8_t;  // base/dtype.h

enum class KvFormat : uint8_t {
  kF32,  // CPU only: verification
  kF16,
  kBF16,
  kFp8E4M3,           // static scale per tensor or per kv head
  kFp8E5M2,           // static scale
  kFp8PerTokenHead,   // e4m3, scale per token and kv head, stored in the page: the power of two at
                      // or above max(amax / 448, 1e-6)
  kInt8PerTokenHead,  // int8, scale = max(amax / 127, 1e-6), round to nearest even
};

const char* Name(KvFormat format);  // "bf16", "fp8_e4m3", "int8_per_token_head", ...
std::optional<KvFormat> KvFormatFromName(
    std::string_view name);            // also "fp8", "bfloat16", "float16", "float32"
int ElementSize(KvFormat format);      // bytes
bool HasTokenScales(KvFormat format);  // scales are dynamic and live in the page
DType StorageDType(KvFormat format);

// Position of token n (0 <= n < kPageSize) within a V row of `format`, and its inverse.
int VPosition(KvFormat format, int token);
int VToken(KvFormat format, int position);

// Byte offsets within one layer's claim of a page.
struct KvLayout {
  KvFormat k_format = KvFormat::kBF16;
  KvFormat v_format = KvFormat::kBF16;
  int kv_heads = 0;
  int head_dim = 0;

  int64_t KBytes() const {
    return int64_t{kPageSize} * head_dim * ElementSize(k_format);
  }  // of one head
  int64_t VBytes() const { return int64_t{kPageSize} * head_dim * ElementSize(v_format); }
  static int64_t ScaleBytes(KvFormat format) {
    return HasTokenScales(format) ? kPageSize * int64_t{sizeof(float)} : 0;
  }
  int64_t HeadBytes() const {
    return KBytes() + ScaleBytes(k_format) + VBytes() + ScaleBytes(v_format);
  }
  int64_t KOffset(int head) const { return head * HeadBytes(); }
  int64_t KScaleOffset(int head) const { return KOffset(head) + KBytes(); }
  int64_t VOffset(int head) const { return KScaleOffset(head) + ScaleBytes(k_format); }
  int64_t VScaleOffset(int head) const { return VOffset(head) + VBytes(); }
  int64_t UsedBytes() const { return kv_heads * HeadBytes(); }
  int64_t ClaimBytes() const { return (UsedBytes() + kPageUnit - 1) / kPageUnit * kPageUnit; }
};

// One layer's cache as kernels see it. A page's first byte is arena + block_table_entry *
// kPageUnit.
struct KvLayer {
  KvLayout layout;
  std::byte* arena = nullptr;
  int64_t claim_offset = 0;  // of this layer within a page, bytes
  const float* k_scale =
      nullptr;  // [kv_heads]; static formats, else unused. stored = round(x / scale)
  const float* v_scale = nullptr;
  uint64_t* saturated =
      nullptr;  // [2]: finite K and V elements whose |x / scale| rounds beyond the largest finite
                // value of an 8-bit format; added to atomically
  float* amax = nullptr;  // [2]: largest finite |x / scale| of K and V seen so far (dynamic: |x|)

  std::byte* Claim(uint32_t page) const { return arena + int64_t{page} * kPageUnit + claim_offset; }
};

}  // namespace octavo
