// Vectors of float32 from and to memory of any element type, and the functions the hardware lacks.
// Included once per SIMD target, inside no namespace (Highway's scheme).
//
// Exp, Tanh: within 2 ulp of the true value over the whole range (vector_math_test), NaN stays NaN.
#if defined(OCTAVO_KERNELS_CPU_VECTOR_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef OCTAVO_KERNELS_CPU_VECTOR_MATH_INL_H_
#undef OCTAVO_KERNELS_CPU_VECTOR_MATH_INL_H_
#else
#define OCTAVO_KERNELS_CPU_VECTOR_MATH_INL_H_
#endif

#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "kernels/cpu/element.h"

#ifndef OCTAVO_UNROLL
// Loops over accumulators must vanish, or the accumulators live in memory.
#define OCTAVO_UNROLL _Pragma("GCC unroll 16")
#endif

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using V = hn::Vec<FloatTag>;
constexpr size_t kLanes = HWY_LANES(float);

HWY_INLINE V Set(float x) { return hn::Set(FloatTag(), x); }
HWY_INLINE V Zero() { return hn::Zero(FloatTag()); }

HWY_INLINE V Load(const float* p) { return hn::LoadU(FloatTag(), p); }

HWY_INLINE V Load(const BF16* p) {
  const hn::Rebind<uint16_t, FloatTag> d16;
  const hn::Rebind<uint32_t, FloatTag> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

HWY_INLINE V Load(const BF16Pair* p) { return Load(reinterpret_cast<const float*>(p)); }

HWY_INLINE V Load(const F16* p) {
  const hn::Rebind<uint16_t, FloatTag> d16;
  const hn::Rebind<hwy::float16_t, FloatTag> df16;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::PromoteTo(FloatTag(), hn::BitCast(df16, bits));
}

// The first n lanes, 0 < n < kLanes; the others are zero. Reads nothing behind them.
template <class T>
HWY_INLINE V LoadN(const T* p, size_t n) {
  HWY_ALIGN T lanes[kLanes] = {};
  memcpy(lanes, p, n * sizeof(T));
  return Load(lanes);
}

HWY_INLINE void Store(V v, float* p) { hn::StoreU(v, FloatTag(), p); }

// base/float_bits.h FloatToBF16: to nearest even, NaN stays NaN.
HWY_INLINE void Store(V v, BF16* p) {
  const hn::Rebind<uint16_t, FloatTag> d16;
  const hn::Rebind<uint32_t, FloatTag> d32;
  const hn::Rebind<int32_t, FloatTag> di32;
  const auto bits = hn::BitCast(d32, v);
  const auto high = hn::ShiftRight<16>(bits);
  const auto odd = hn::And(high, hn::Set(d32, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7FFF))));
  const auto quiet = hn::Or(high, hn::Set(d32, 0x40));
  const auto chosen = hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(v)), quiet, rounded);
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, chosen)), d16, reinterpret_cast<uint16_t*>(p));
}

template <class T>
HWY_INLINE void StoreN(V v, T* p, size_t n) {
  HWY_ALIGN T lanes[kLanes];
  Store(v, lanes);
  memcpy(p, lanes, n * sizeof(T));
}

HWY_INLINE V Select(hn::Mask<FloatTag> mask, V yes, V no) { return hn::IfThenElse(mask, yes, no); }

// NaN in x survives, which it does not in the hardware's min and max.
HWY_INLINE V ClampAbove(V x, V limit) { return Select(hn::Gt(x, limit), limit, x); }
HWY_INLINE V ClampBelow(V x, V limit) { return Select(hn::Lt(x, limit), limit, x); }

HWY_INLINE V Exp(V x) {
  const hn::Rebind<int32_t, FloatTag> di;
  // Beyond these the result is infinity or 0; n below stays within two representable powers of two.
  x = ClampBelow(ClampAbove(x, Set(100.0f)), Set(-110.0f));
  const V n = hn::Round(hn::Mul(x, Set(1.44269504088896341f)));
  const V r =
      hn::NegMulAdd(n, Set(-1.904654323e-9f), hn::NegMulAdd(n, Set(0.693147182464599609f), x));
  // (exp(r) - 1 - r) / r^2 interpolated at the Chebyshev nodes of |r| <= ln(2)/2: relative error of
  // exp 8e-9.
  V p = hn::MulAdd(Set(1.3926177501010365e-3f), r, Set(8.36317418011074e-3f));
  p = hn::MulAdd(p, r, Set(4.1666554653757494e-2f));
  p = hn::MulAdd(p, r, Set(1.6666577018959405e-1f));
  p = hn::MulAdd(p, r, Set(0.5f));
  p = hn::Add(hn::MulAdd(hn::Mul(r, r), p, r), Set(1.0f));
  // 2^n in two factors, so that subnormal results are rounded once and n = 128 is not infinity too
  // early.
  const auto exponent = hn::ConvertTo(di, n);
  const auto half = hn::ShiftRight<1>(exponent);
  const auto bias = hn::Set(di, 127);
  const V scale1 = hn::BitCast(FloatTag(), hn::ShiftLeft<23>(hn::Add(half, bias)));
  const V scale2 =
      hn::BitCast(FloatTag(), hn::ShiftLeft<23>(hn::Add(hn::Sub(exponent, half), bias)));
  return hn::Mul(hn::Mul(p, scale1), scale2);
}

HWY_INLINE V Tanh(V x) {
  const V a = hn::Abs(x);
  // (tanh(a)/a - 1)/a^2 as a polynomial in a^2, Chebyshev nodes of a <= 0.625: relative error of
  // tanh 5e-10.
  const V z = hn::Mul(a, a);
  V p = hn::MulAdd(Set(2.292744816178142e-3f), z, Set(-8.343945515839153e-3f));
  p = hn::MulAdd(p, z, Set(2.176891865102821e-2f));
  p = hn::MulAdd(p, z, Set(-5.3959259577204544e-2f));
  p = hn::MulAdd(p, z, Set(1.333330355691574e-1f));
  p = hn::MulAdd(p, z, Set(-3.333333317214036e-1f));
  const V small = hn::MulAdd(hn::Mul(p, z), a, a);
  const V one = Set(1.0f);
  const V large = hn::Sub(one, hn::Div(Set(2.0f), hn::Add(Exp(hn::Add(a, a)), one)));
  return hn::CopySign(Select(hn::Lt(a, Set(0.625f)), small, large), x);
}

// x * sigmoid(s)
HWY_INLINE V MulSigmoid(V x, V s) { return hn::Div(x, hn::Add(Set(1.0f), Exp(hn::Neg(s)))); }

// Not a loop: the compiler would see a memset, and the accumulators would live in memory.
template <size_t... kIndex>
HWY_INLINE void Clear(V* acc, std::index_sequence<kIndex...>) {
  ((acc[kIndex] = Zero()), ...);
}

// Lane pairs at distance 1, 2, 4, ... of a and b: [a0+a1, b0+b1, a2+a3, b2+b3, ...] for distance 1.
// After all levels, kLanes accumulators have become one vector of their sums, in order, each a tree
// of adjacent pairs.
template <size_t kDistance>
HWY_INLINE V AddPairs(V a, V b) {
  const FloatTag d;
  if constexpr (kDistance == 1) {
    return hn::Add(hn::OddEven(b, a), hn::Shuffle2301(hn::OddEven(a, b)));
  } else if constexpr (kDistance == 2) {
    const hn::Repartition<double, FloatTag> dd;
    const auto a2 = hn::BitCast(dd, a), b2 = hn::BitCast(dd, b);
    return hn::Add(hn::BitCast(d, hn::OddEven(b2, a2)),
                   hn::Shuffle1032(hn::BitCast(d, hn::OddEven(a2, b2))));
  } else if constexpr (kDistance == 4) {
    return hn::Add(hn::OddEvenBlocks(b, a), hn::SwapAdjacentBlocks(hn::OddEvenBlocks(a, b)));
  } else {
    static_assert(kDistance == 8 && kLanes == 16);
    return hn::Add(hn::ConcatUpperLower(d, b, a), hn::ConcatLowerUpper(d, b, a));
  }
}

// sums[i] = the lanes of acc[i] added. kCount a power of two; kLanes floats are written.
template <size_t kDistance, size_t kCount>
HWY_INLINE void ReduceLanes(const V* acc, float* sums) {
  if constexpr (kDistance == kLanes) {
    Store(acc[0], sums);
  } else if constexpr (kCount == 1) {
    const V pairs = AddPairs<kDistance>(acc[0], acc[0]);
    ReduceLanes<kDistance * 2, 1>(&pairs, sums);
  } else {
    V half[kCount / 2];
    OCTAVO_UNROLL for (size_t i = 0; i < kCount / 2; ++i) {
      half[i] = AddPairs<kDistance>(acc[2 * i], acc[2 * i + 1]);
    }
    ReduceLanes<kDistance * 2, kCount / 2>(half, sums);
  }
}

// Any kCount, as powers of two. Writes up to kLanes - 1 floats behind sums[kCount - 1].
template <size_t kCount>
HWY_INLINE void ReduceAll(const V* acc, float* sums) {
  if constexpr (kCount > 0) {
    constexpr size_t kPart = kCount >= kLanes ? kLanes
                             : kCount >= 8    ? 8
                             : kCount >= 4    ? 4
                             : kCount >= 2    ? 2
                                              : 1;
    ReduceLanes<1, kPart>(acc, sums);
    ReduceAll<kCount - kPart>(acc + kPart, sums + kPart);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
