#include "base/float_bits.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#if __has_include(<cuda_fp8.h>)
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define OCTAVO_HAVE_CUDA_FP8 1
#endif

namespace octavo {
namespace {

// The nearest code by search over all finite codes, ties to the even code: obvious and slow.
template <class F>
uint32_t NearestCode(float x) {
  const uint32_t sign = std::signbit(x) ? F::kMagnitudeMask + 1 : 0;
  const double magnitude = std::min<double>(std::fabs(x), F::Decode(F::kMaxFinite));
  uint32_t best = 0;
  for (uint32_t code = 1; code <= F::kMaxFinite; ++code) {
    const double there = std::fabs(F::Decode(code) - magnitude),
                 here = std::fabs(F::Decode(best) - magnitude);
    if (there < here || (there == here && code % 2 == 0)) best = code;
  }
  return sign | best;
}

template <class F>
class Fp8Test : public ::testing::Test {};
using Formats = ::testing::Types<Fp8E4M3, Fp8E5M2>;
TYPED_TEST_SUITE(Fp8Test, Formats);

TYPED_TEST(Fp8Test, EveryCodeSurvivesARoundTrip) {
  for (uint32_t code = 0; code < 256; ++code) {
    const float x = TypeParam::Decode(code);
    if (std::isnan(x)) {
      EXPECT_EQ(TypeParam::Encode(x) & 0x7F, TypeParam::kNaN) << code;
    } else if (std::isinf(x)) {
      EXPECT_EQ(TypeParam::Encode(x) & 0x7F, TypeParam::kMaxFinite) << code;
    } else {
      EXPECT_EQ(TypeParam::Encode(x), code);
    }
  }
}

TYPED_TEST(Fp8Test, EveryBF16ValueRoundsToTheNearestCode) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = BF16ToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(TypeParam::Decode(TypeParam::Encode(x))));
    } else {
      ASSERT_EQ(TypeParam::Encode(x), NearestCode<TypeParam>(x)) << x;
    }
  }
}

// Midpoints between neighbours and the floats next to them are where rounding goes wrong.
TYPED_TEST(Fp8Test, MidpointsTieToEven) {
  for (uint32_t code = 0; code < TypeParam::kMaxFinite; ++code) {
    const float middle = (TypeParam::Decode(code) + TypeParam::Decode(code + 1)) / 2;
    EXPECT_EQ(TypeParam::Encode(middle), code + code % 2);
    EXPECT_EQ(TypeParam::Encode(std::nextafter(middle, 0.0f)), code);
    EXPECT_EQ(TypeParam::Encode(std::nextafter(middle, 1e9f)), code + 1);
    EXPECT_EQ(TypeParam::Encode(-middle), 0x80 | (code + code % 2));
  }
}

// Both formats as the OCP's paper on 8-bit floats defines them, spelled out: mantissas of E4M3's
// exponent 15 but the last are numbers, E5M2's exponent 31 is infinity and NaN.
TEST(FloatBitsTest, EveryCodeOfEightBitsIsWhatThePaperSays) {
  for (int code = 0; code < 256; ++code) {
    const double sign = code < 128 ? 1 : -1;
    const auto expect = [&](float found, double magnitude) {
      if (std::isnan(magnitude)) {
        EXPECT_TRUE(std::isnan(found)) << code;
        return;
      }
      EXPECT_EQ(found, static_cast<float>(sign * magnitude)) << code;
      EXPECT_EQ(std::signbit(found), code >= 128) << code;  // zeros too
    };
    const int e4 = code / 8 % 16, m3 = code % 8;
    expect(Fp8E4M3::Decode(code), e4 == 15 && m3 == 7 ? NAN
                                  : e4 == 0           ? std::ldexp(m3 / 8.0, -6)
                                                      : std::ldexp(1 + m3 / 8.0, e4 - 7));
    const int e5 = code / 4 % 32, m2 = code % 4;
    expect(Fp8E5M2::Decode(code), e5 == 31 && m2 > 0 ? NAN
                                  : e5 == 31         ? INFINITY
                                  : e5 == 0          ? std::ldexp(m2 / 4.0, -14)
                                                     : std::ldexp(1 + m2 / 4.0, e5 - 15));
  }
}

TEST(FloatBitsTest, KnownValues) {
  EXPECT_EQ(Fp8E4M3::Decode(0x7E), 448.0f);
  EXPECT_EQ(Fp8E5M2::Decode(0x7B), 57344.0f);
  EXPECT_EQ(Fp8E4M3::Decode(0x01), 0x1p-9f);
  EXPECT_EQ(Fp8E4M3::Encode(1e9f), 0x7Eu);
  EXPECT_EQ(Fp8E4M3::Encode(-INFINITY), 0xFEu);
  EXPECT_EQ(FloatToBF16(1.0f), 0x3F80);
  EXPECT_EQ(Float16::Decode(0x3C00), 1.0f);
  EXPECT_EQ(Float16::Encode(65520.0f), 0x7C00u);
  EXPECT_EQ(Float16::Encode(65519.0f), 0x7BFFu);
}

TEST(FloatBitsTest, HalfAndBF16RoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float half = Float16::Decode(bits), brain = BF16ToFloat(static_cast<uint16_t>(bits));
    if (!std::isnan(half)) {
      EXPECT_EQ(Float16::Encode(half), bits);
    }
    if (!std::isnan(brain)) {
      EXPECT_EQ(FloatToBF16(brain), bits);
    }
  }
}

#ifdef OCTAVO_HAVE_CUDA_FP8
TEST(FloatBitsTest, MatchesCudaOnDenseSamples) {
  std::mt19937 random(1);
  for (int i = 0; i < 4'000'000; ++i) {
    // Half the samples over all bit patterns, half where e4m3 lives.
    uint32_t bits = random();
    if (i % 2) bits = (bits & 0x80FFFFFF) | ((115 + random() % 24) << 23);
    const float x = std::bit_cast<float>(bits);
    const auto e4m3 = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    const auto e5m2 = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
    if (std::isnan(x)) {  // CUDA drops the sign of NaN
      EXPECT_EQ(Fp8E4M3::Encode(x) & 0x7F, e4m3 & 0x7F);
      EXPECT_EQ(Fp8E5M2::Encode(x) & 0x7F, e5m2 & 0x7F);
      continue;
    }
    ASSERT_EQ(Fp8E4M3::Encode(x), e4m3) << x;
    ASSERT_EQ(Fp8E5M2::Encode(x), e5m2) << x;
  }
}
#endif

}  // namespace
}  // namespace octavo
