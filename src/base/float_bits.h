// THE rounding definition: float <-> bfloat16, float16, fp8_e4m3, fp8_e5m2, in integer arithmetic,
// the same bits on every machine. Round to nearest, ties to even. The 8-bit formats saturate to the
// largest finite value (448, 57344) and keep NaN: bit-exact with CUDA's __nv_cvt_float_to_fp8(x,
// __NV_SATFINITE, ...). Infinity saturates too.
//
// Scalar and obvious; vector code is tested against it. Host only: device code uses the hardware's
// conversions, which the conformance test compares with these.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace octavo {

inline float BF16ToFloat(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// The smallest power of two that is not below x, which is positive, normal and below 2^127.
inline float PowerOfTwoAtLeast(float x) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x7FFFFF) & 0x7F800000);
}

inline uint16_t FloatToBF16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);  // keep NaN a NaN
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// A small float: 1 sign bit, `kExponentBits`, `kMantissaBits`, IEEE-like with subnormals.
// kHasInf: the top exponent is Inf/NaN (float16, e5m2); otherwise only the all-ones code is NaN
// (e4m3).
template <int kExponentBits, int kMantissaBits, bool kHasInf, bool kSaturate>
struct SmallFloat {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr uint32_t kMagnitudeMask = (1u << (kExponentBits + kMantissaBits)) - 1;
  static constexpr uint32_t kTopExponent = (1u << kExponentBits) - 1;
  static constexpr uint32_t kInf = kTopExponent << kMantissaBits;
  static constexpr uint32_t kNaN = kHasInf ? kInf | ((1u << kMantissaBits) - 1) : kMagnitudeMask;
  static constexpr uint32_t kMaxFinite = (kHasInf ? kInf : kNaN) - 1;

  static float Decode(uint32_t code) {
    const uint32_t magnitude = code & kMagnitudeMask;
    const float sign = (code >> (kExponentBits + kMantissaBits)) & 1 ? -1.0f : 1.0f;
    if (kHasInf ? magnitude > kInf : magnitude == kNaN) return std::copysign(NAN, sign);
    if (kHasInf && magnitude == kInf) return sign * INFINITY;
    const int exponent = static_cast<int>(magnitude >> kMantissaBits);
    const int mantissa = static_cast<int>(magnitude & ((1u << kMantissaBits) - 1));
    if (exponent == 0)
      return sign * std::ldexp(static_cast<float>(mantissa), 1 - kBias - kMantissaBits);
    return sign * std::ldexp(static_cast<float>(mantissa + (1 << kMantissaBits)),
                             exponent - kBias - kMantissaBits);
  }

  static uint32_t Encode(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 31) << (kExponentBits + kMantissaBits);
    if (x != x) return sign | kNaN;
    const uint32_t overflow = kSaturate ? kMaxFinite : kInf;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude >= 0x7F800000) return sign | overflow;
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    if (exponent < -kBias - kMantissaBits) return sign;  // below half of the smallest subnormal
    // Units of the last place of the result: 2^shift float units.
    const int shift = 23 - kMantissaBits + (exponent < 1 - kBias ? 1 - kBias - exponent : 0);
    const uint64_t significand = (magnitude & 0x7FFFFF) | 0x800000;
    const uint64_t half = uint64_t{1} << (shift - 1);
    uint64_t rounded = significand >> shift;
    const uint64_t rest = significand & ((uint64_t{1} << shift) - 1);
    if (rest > half || (rest == half && (rounded & 1))) ++rounded;
    // A subnormal that rounds up to 2^kMantissaBits is the smallest normal: the same arithmetic.
    const uint64_t biased = exponent < 1 - kBias ? 0 : static_cast<uint64_t>(exponent + kBias - 1);
    const uint64_t code = (biased << kMantissaBits) + rounded;
    return sign | (code > kMaxFinite ? overflow : static_cast<uint32_t>(code));
  }
};

using Float16 = SmallFloat<5, 10, true, false>;
using Fp8E4M3 = SmallFloat<4, 3, false, true>;
using Fp8E5M2 = SmallFloat<5, 2, true, true>;

inline constexpr float kFp8E4M3Max = 448.0f;
inline constexpr float kFp8E5M2Max = 57344.0f;

}  // namespace octavo
