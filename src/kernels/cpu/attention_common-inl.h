// What both attention kernels are made of, per SIMD target: reading the stored formats, 2^x, the
// soft cap, the pairwise tree, and a head's part of a page.

#if defined(OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_
#undef OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_
#else
#define OCTAVO_KERNELS_CPU_ATTENTION_COMMON_INL_H_
#endif

#include <algorithm>
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
static_assert(kLanes >= 4 && kLanes <= 16,
              "the block rows and the padding of head_dim assume 4, 8 or 16 lanes");

// ---- reading formats

// A loader reads kVectors vectors of kElements elements a lane, kSize bytes, and multiplies such
// vectors. Bytes of zero read as zero. Those here read float32, exactly, up to a factor that the
// driver folds into the softmax (DecodeFactor); attention_pairs-inl.h has those of two elements.
struct Singles {
  static constexpr size_t kElements = 1;
  static constexpr size_t kVectors = 1;
  static constexpr int kTermsOfQ = 1;
  static HWY_INLINE VF MulAdd(VF x, VF y, VF sum) { return hn::MulAdd(x, y, sum); }
};

struct LoadF32 : Singles {
  static constexpr size_t kSize = 4;
  static HWY_INLINE VF Load(const uint8_t* p) {
    return hn::LoadU(DF(), reinterpret_cast<const float*>(p));
  }
};

struct LoadF16 : Singles {
  static constexpr size_t kSize = 2;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
  }
};

struct LoadBF16 : Singles {
  static constexpr size_t kSize = 2;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<hwy::bfloat16_t, DF> d16;
    return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::bfloat16_t*>(p)));
  }
};

// Codes of eight bits, sign extended.
template <class D16>
HWY_INLINE hn::Vec<D16> LoadCodes(D16 d16, const uint8_t* p) {
  const hn::Rebind<int8_t, D16> d8;
  return hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const int8_t*>(p)));
}

// e4m3 and e5m2 go by way of float16, whose subnormals cost nothing to widen. Bits16 makes its bits
// from codes.
template <class Format>
struct LoadF8 : Singles {
  static constexpr size_t kSize = 1;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<int16_t, DF> d16;
    const hn::Rebind<hwy::float16_t, DF> df16;
    return hn::PromoteTo(DF(), hn::BitCast(df16, Format::Bits16(d16, LoadCodes(d16, p))));
  }
};

// The code shifted into place is 2^-8 of the value. Reads NaN as 1.875: for pages without
// (HasF8E4M3NaN).
struct F8E4M3Finite {
  template <class D16>
  static HWY_INLINE hn::Vec<D16> Bits16(D16 d16, hn::Vec<D16> codes) {
    // After the shift bits 15 and 14 are the sign, of which 14 goes.
    return hn::And(hn::ShiftLeft<7>(codes), hn::Set(d16, static_cast<int16_t>(0xBFFF)));
  }
};

struct LoadF8E4M3 : LoadF8<LoadF8E4M3> {
  template <class D16>
  static HWY_INLINE hn::Vec<D16> Bits16(D16 d16, hn::Vec<D16> codes) {
    const auto bits = F8E4M3Finite::Bits16(d16, codes);
    // NaN has all of bits 13..7 set; only then does one more unit carry into bit 14, which
    // completes the exponent of a float16 NaN.
    const auto magnitude = hn::And(bits, hn::Set(d16, int16_t{0x3F80}));
    const auto carry = hn::Add(magnitude, hn::Set(d16, int16_t{0x0080}));
    return hn::OrAnd(bits, carry, hn::Set(d16, int16_t{0x4000}));
  }
};

struct LoadF8E5M2 : LoadF8<LoadF8E5M2> {
  template <class D16>
  static HWY_INLINE hn::Vec<D16> Bits16(D16, hn::Vec<D16> codes) {
    return hn::ShiftLeft<8>(codes);
  }
};

// Whether any of `bytes` codes, a multiple of four vectors, is a NaN. A tenth of the cost of
// looking in the loader.
inline bool HasF8E4M3NaN(const uint8_t* p, size_t bytes) {
  const hn::Repartition<uint8_t, DF> d8;
  constexpr size_t kVector = 4 * kLanes;
  const auto magnitude_bits = hn::Set(d8, uint8_t{0x7F});
  auto a = hn::Zero(d8), b = a, c = a, d = a;  // four, for one would wait for itself
  for (size_t i = 0; i < bytes; i += 4 * kVector) {
    a = hn::Max(a, hn::And(hn::LoadU(d8, p + i), magnitude_bits));
    b = hn::Max(b, hn::And(hn::LoadU(d8, p + i + kVector), magnitude_bits));
    c = hn::Max(c, hn::And(hn::LoadU(d8, p + i + 2 * kVector), magnitude_bits));
    d = hn::Max(d, hn::And(hn::LoadU(d8, p + i + 3 * kVector), magnitude_bits));
  }
  const auto largest = hn::Max(hn::Max(a, b), hn::Max(c, d));
  return !hn::AllFalse(d8, hn::Eq(largest, magnitude_bits));
}

struct LoadI8 : Singles {
  static constexpr size_t kSize = 1;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<int8_t, DF> d8;
    const auto i32 = hn::PromoteTo(DI(), hn::LoadU(d8, reinterpret_cast<const int8_t*>(p)));
    return hn::ConvertTo(DF(), i32);
  }
};

template <class Loader>
struct Loaded {
  VF x[Loader::kVectors];
};
template <class Loader>
HWY_INLINE Loaded<Loader> LoadWhole(const Loader& loader, const uint8_t* p) {
  if constexpr (Loader::kVectors == 1) {
    return {loader.Load(p)};
  } else {
    return loader.Load(p);
  }
}
// The first `count` lanes, then zeros; reads nothing behind them.
template <class Loader>
HWY_INLINE Loaded<Loader> LoadTail(const Loader& loader, const uint8_t* p, size_t count) {
  HWY_ALIGN uint8_t padded[Loader::kVectors * kLanes * Loader::kSize] = {};
  std::memcpy(padded, p, count * Loader::kSize);
  return LoadWhole(loader, padded);
}

// The entry of a table, one per storage type, that `Table::template kEntry<Loader>` stands for.
template <template <class> class Entry>
auto ByStorage(DType storage) {
  switch (storage) {
    case DType::kF32:
      return Entry<LoadF32>::kValue;
    case DType::kF16:
      return Entry<LoadF16>::kValue;
    case DType::kBF16:
      return Entry<LoadBF16>::kValue;
    case DType::kF8E4M3:
      return Entry<LoadF8E4M3>::kValue;
    case DType::kF8E5M2:
      return Entry<LoadF8E5M2>::kValue;
    default:
      return Entry<LoadI8>::kValue;
  }
}

// ---- functions

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
  // Adding this rounds x to an integer n and leaves n + 127 in the low bits: shifted up, they are
  // the float 2^n.
  const VF magic = hn::Set(d, 0x1.8p23f + 127.0f);
  const VF shifted = hn::Add(x, magic);
  const VF power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(DI(), shifted)));
  return {hn::Sub(x, hn::Sub(shifted, magic)), power};
}

// 2^x for x <= 0, within 1 ulp; 2^0 is exactly 1. Below 2^-126, and for -inf, exactly 0. NaN stays
// NaN.
HWY_INLINE VF Exp2(VF x) {
  const DF d;
  const Exp2Parts parts = SplitExp2(x);
  const VF p = hn::MulAdd(Exp2Slope(parts.f), parts.f, hn::Set(d, 1.0f));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, parts.power));
}

// cap * log2(e) * tanh(s / cap), so that the result is ready for Exp2. Relative accuracy also near
// zero: tanh|x| = -e / (e + 2) with e = exp(-2|x|) - 1, whose small values come from the polynomial
// alone.
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

// The value to subtract from scores of maximum m: m, or 0 where nothing has been seen (-inf - -inf
// would be NaN).
HWY_INLINE VF Subtrahend(VF m) {
  const DF d;
  return hn::IfThenZeroElse(hn::Eq(m, hn::Set(d, -std::numeric_limits<float>::infinity())), m);
}

// ---- the tree

inline constexpr int CeilLog2(size_t n) { return n <= 1 ? 0 : 1 + CeilLog2((n + 1) / 2); }
inline constexpr int kLaneBits = CeilLog2(kLanes);

// One level of transposing and adding. If at level k input n meets input n + 2^k, then after
// kLaneBits levels lane i holds the sum of input i, added by a binary tree. Inside a block of four
// lanes the tree adds lanes two apart first, then the two sums: so interleaving, the cheapest of
// shuffles, does it. Then neighbouring blocks, then halves.
template <int kLevel>
HWY_INLINE VF PairSum(VF a, VF b) {
  const DF d;
  if constexpr (kLevel == 0) {
    return hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  } else if constexpr (kLevel == 1) {
    const hn::Repartition<uint64_t, DF> d64;
    const auto a64 = hn::BitCast(d64, a), b64 = hn::BitCast(d64, b);
    return hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, a64, b64)),
                   hn::BitCast(d, hn::InterleaveUpper(d64, a64, b64)));
  } else if constexpr (kLevel + 1 == kLaneBits) {
    return hn::Add(hn::ConcatUpperLower(d, b, a), hn::ConcatLowerUpper(d, b, a));
  } else {
    return hn::Add(hn::OddEvenBlocks(b, a), hn::SwapAdjacentBlocks(hn::OddEvenBlocks(a, b)));
  }
}

// The class of lanes that the tree meets as its n-th leaf: the two lowest bits change places.
constexpr size_t LeafClass(size_t n) { return (n & ~size_t{3}) | (n & 1) << 1 | (n >> 1 & 1); }

// The sum of one vector's lanes by the same tree, in every lane.
template <int kLevel = 0>
HWY_INLINE VF TreeSum(VF v) {
  if constexpr (kLevel == kLaneBits) {
    return v;
  } else {
    return TreeSum<kLevel + 1>(PairSum<kLevel>(v, v));
  }
}

// ---- one page

// Asks for a stretch of memory evenly over `steps` of work, so that the requests do not queue up
// behind each other and the memory has always something to do. Pages are scattered and the
// hardware's own prefetchers do not cross from one to the next.
class Prefetcher {
 public:
  Prefetcher() = default;
  Prefetcher(const std::byte* p, int64_t bytes, int64_t steps)
      : p_(p), asked_(p), end_(p + bytes), step_((bytes + steps - 1) / steps) {}
  HWY_INLINE void Step(int64_t steps = 1) {
    asked_ += steps * step_;
    for (; p_ < asked_ && p_ < end_; p_ += kLine) __builtin_prefetch(p_, 0, 2);  // into L2
  }

 private:
  static constexpr int64_t kLine = 64;
  const std::byte *p_ = nullptr, *asked_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

// One head's part of one page. Positions are V's stored order; order[s] is the token there.
class PageReader {
 public:
  explicit PageReader(const AttentionBlock& block)
      : scales_keys(HasTokenScales(block.args->cache.layout.k_format)),
        scales_values(HasTokenScales(block.args->cache.layout.v_format)),
        block_(block),
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
    masked = first_token + kPageSize - 1 > block_.first_position ||
             first_token <= last_row - block_.window;
    if (scales_keys) {
      const auto* scales =
          reinterpret_cast<const float*>(claim + layout_.KScaleOffset(block_.kv_head));
      for (int s = 0; s < kPageSize; ++s)
        score_factor[s] = scales[block_.order[s]] * block_.score_factor;
    }
    if (scales_values) {
      const auto* scales =
          reinterpret_cast<const float*>(claim + layout_.VScaleOffset(block_.kv_head));
      for (int s = 0; s < kPageSize; ++s) value_factor[s] = scales[block_.order[s]];
    }
  }

  // All of the head's part of the page that will be read after this one; nothing behind the last.
  Prefetcher Next(int page, int64_t steps) const {
    if (page + 1 >= block_.page_end) return {};
    const std::byte* claim = block_.args->cache.Claim(pages_[page + 1]);
    return Prefetcher(claim + layout_.KOffset(block_.kv_head), layout_.HeadBytes(), steps);
  }

  const bool scales_keys, scales_values;  // by token
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
