// What both attention kernels are made of, per SIMD target: reading the stored formats, 2^x, the soft cap, the pairwise
// tree, and a head's part of a page.

#if defined(OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_
#undef OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_
#else
#define OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/attention_kernels.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;
inline constexpr size_t kLanes = hn::MaxLanes(DF());
static_assert(kLanes >= 4 && kLanes <= 16, "the block rows and the padding of head_dim assume 4, 8 or 16 lanes");

// ------------------------------------------------------------------------------------------------ reading formats

// A loader reads kLanes elements as float32, exactly, up to a factor that the driver folds into the softmax
// (DecodeFactor). Bytes of zero read as zero.
struct LoadF32 {
  static constexpr size_t kSize = 4;
  static HWY_INLINE VF Load(const uint8_t* p) { return hn::LoadU(DF(), reinterpret_cast<const float*>(p)); }
};

struct LoadF16 {
  static constexpr size_t kSize = 2;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
  }
};

struct LoadBF16 {
  static constexpr size_t kSize = 2;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<hwy::bfloat16_t, DF> d16;
    return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::bfloat16_t*>(p)));
  }
};

// By way of float16, whose subnormals cost nothing to widen: the code shifted into place is 2^-8 of the value.
struct LoadF8E4M3 {
  static constexpr size_t kSize = 1;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<int8_t, DF> d8;
    const hn::Rebind<int16_t, DF> d16;
    const hn::Rebind<hwy::float16_t, DF> df16;
    // The sign is extended and shifted: bits 15 and 14 are the sign, of which 14 goes.
    const auto extended = hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const int8_t*>(p)));
    auto bits = hn::And(hn::ShiftLeft<7>(extended), hn::Set(d16, static_cast<int16_t>(0xBFFF)));
    // The code of NaN has all of bits 13..7 set; only then does one more unit carry into bit 14, which completes the
    // exponent of a float16 NaN.
    const auto magnitude = hn::And(bits, hn::Set(d16, int16_t{0x3F80}));
    const auto carry = hn::Add(magnitude, hn::Set(d16, int16_t{0x0080}));
    bits = hn::Or(bits, hn::And(carry, hn::Set(d16, int16_t{0x4000})));
    return hn::PromoteTo(DF(), hn::BitCast(df16, bits));
  }
};

struct LoadF8E5M2 {
  static constexpr size_t kSize = 1;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<uint8_t, DF> d8;
    const hn::Rebind<uint16_t, DF> d16;
    const hn::Rebind<hwy::float16_t, DF> df16;
    const auto bits = hn::ShiftLeft<8>(hn::PromoteTo(d16, hn::LoadU(d8, p)));
    return hn::PromoteTo(DF(), hn::BitCast(df16, bits));
  }
};

struct LoadI8 {
  static constexpr size_t kSize = 1;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<int8_t, DF> d8;
    const auto i32 = hn::PromoteTo(DI(), hn::LoadU(d8, reinterpret_cast<const int8_t*>(p)));
    return hn::ConvertTo(DF(), i32);
  }
};

// The first `count` < kLanes elements, then zeros; reads nothing behind them.
template <class Loader>
HWY_INLINE VF LoadTail(const uint8_t* p, size_t count) {
  HWY_ALIGN uint8_t padded[kLanes * Loader::kSize] = {};
  std::memcpy(padded, p, count * Loader::kSize);
  return Loader::Load(padded);
}

// The entry of a table, one per storage type, that `Table::template kEntry<Loader>` stands for.
template <template <class> class Entry>
auto ByStorage(DType storage) {
  switch (storage) {
    case DType::kF32: return Entry<LoadF32>::kValue;
    case DType::kF16: return Entry<LoadF16>::kValue;
    case DType::kBF16: return Entry<LoadBF16>::kValue;
    case DType::kF8E4M3: return Entry<LoadF8E4M3>::kValue;
    case DType::kF8E5M2: return Entry<LoadF8E5M2>::kValue;
    default: return Entry<LoadI8>::kValue;
  }
}

// ---------------------------------------------------------------------------------------------------- functions

// (2^f - 1) / f for |f| <= 0.5, within 1e-8 of it: Chebyshev interpolation, degree 5.
HWY_INLINE VF Exp2Slope(VF f) {
  const DF d;
  VF p = hn::MulAdd(hn::Set(d, 0x1.44138ap-13f), f, hn::Set(d, 0x1.5f0890p-10f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b2a54p-7f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6af6cp-5f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbe0p-3f));
  return hn::MulAdd(p, f, hn::Set(d, 0x1.62e430p-1f));
}

// x = n + f with |f| <= 0.5, and 2^n, for -126 <= x <= 0.
struct Exp2Parts {
  VF f, power;
};
HWY_INLINE Exp2Parts SplitExp2(VF x) {
  const DF d;
  // Adding this rounds x to an integer n and leaves n + 127 in the low bits: shifted up, they are the float 2^n.
  const VF magic = hn::Set(d, 0x1.8p23f + 127.0f);
  const VF shifted = hn::Add(x, magic);
  const VF power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(DI(), shifted)));
  return {hn::Sub(x, hn::Sub(shifted, magic)), power};
}

// 2^x for x <= 0, within 1 ulp; 2^0 is exactly 1. Below 2^-126, and for -inf, exactly 0. NaN stays NaN.
HWY_INLINE VF Exp2(VF x) {
  const DF d;
  const Exp2Parts parts = SplitExp2(x);
  const VF p = hn::MulAdd(Exp2Slope(parts.f), parts.f, hn::Set(d, 1.0f));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, parts.power));
}

// cap * log2(e) * tanh(s / cap), so that the result is ready for Exp2. Relative accuracy also near zero:
// tanh|x| = -e / (e + 2) with e = exp(-2|x|) - 1, whose small values come from the polynomial alone.
HWY_INLINE VF SoftCap(VF s, VF inverse_cap, VF cap_log2e) {
  const DF d;
  const VF x = hn::Mul(s, inverse_cap);
  const VF y = hn::Mul(hn::Abs(x), hn::Set(d, -2.0f * 1.44269504f));
  const VF floor = hn::Set(d, -64.0f);  // tanh is 1 there
  const Exp2Parts parts = SplitExp2(hn::IfThenElse(hn::Lt(y, floor), floor, y));
  const VF slope = hn::Mul(Exp2Slope(parts.f), parts.f);
  const VF e = hn::MulAdd(slope, parts.power, hn::Sub(parts.power, hn::Set(d, 1.0f)));
  const VF tanh = hn::Div(e, hn::Add(e, hn::Set(d, 2.0f)));  // -tanh|x|
  return hn::Mul(hn::CopySign(tanh, x), cap_log2e);
}

// The value to subtract from scores of maximum m: m, or 0 where nothing has been seen (-inf - -inf would be NaN).
HWY_INLINE VF Subtrahend(VF m) {
  const DF d;
  return hn::IfThenZeroElse(hn::Eq(m, hn::Set(d, -std::numeric_limits<float>::infinity())), m);
}

// ------------------------------------------------------------------------------------------------------ the tree

// Sums of adjacent lanes, a's then b's. Applied to inputs pairwise, log2(kLanes) times, it leaves in lane i the sum of
// input i, added by a tree of adjacent pairs.
HWY_INLINE VF PairSum(VF a, VF b) {
  const DF d;
  return hn::Add(hn::ConcatEven(d, b, a), hn::ConcatOdd(d, b, a));
}

// The sum of one vector's lanes by the same tree.
HWY_INLINE float TreeSum(VF v) {
  for (size_t width = kLanes; width > 1; width /= 2) v = PairSum(v, v);
  return hn::GetLane(v);
}

inline constexpr int CeilLog2(size_t n) { return n <= 1 ? 0 : 1 + CeilLog2((n + 1) / 2); }
inline constexpr int kLaneBits = CeilLog2(kLanes);

// ------------------------------------------------------------------------------------------------------- one page

// One head's part of one page. Positions are V's stored order; order[s] is the token there.
class PageReader {
 public:
  explicit PageReader(const AttentionBlock& block)
      : block_(block),
        layout_(block.args->cache.layout),
        pages_(block.args->batch->block_table.Row<uint32_t>(block.sequence)) {
    for (float& factor : score_factor) factor = block.score_factor;
  }

  void Open(int page) {
    const std::byte* claim = block_.args->cache.Claim(pages_[page]);
    k = reinterpret_cast<const uint8_t*>(claim + layout_.KOffset(block_.kv_head));
    v = reinterpret_cast<const uint8_t*>(claim + layout_.VOffset(block_.kv_head));
    first_token = page * kPageSize;
    const int last_row = block_.position(block_.rows - 1);
    masked = first_token + kPageSize - 1 > block_.first_position || first_token <= last_row - block_.window;
    if (HasTokenScales(layout_.k_format)) {
      const auto* scales = reinterpret_cast<const float*>(claim + layout_.KScaleOffset(block_.kv_head));
      for (int s = 0; s < kPageSize; ++s) score_factor[s] = scales[block_.order[s]] * block_.score_factor;
    }
    if (HasTokenScales(layout_.v_format)) {
      const auto* scales = reinterpret_cast<const float*>(claim + layout_.VScaleOffset(block_.kv_head));
      for (int s = 0; s < kPageSize; ++s) value_factor[s] = scales[block_.order[s]];
    }
  }

  bool scales_values() const { return HasTokenScales(layout_.v_format); }

  const uint8_t* k = nullptr;
  const uint8_t* v = nullptr;
  int first_token = 0;
  bool masked = false;                      // some row does not see some token
  HWY_ALIGN float score_factor[kPageSize];  // of q k^T
  HWY_ALIGN float value_factor[kPageSize];  // V's token scales, if it has them

 private:
  const AttentionBlock& block_;
  const KvLayout& layout_;
  const uint32_t* pages_;
};

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
