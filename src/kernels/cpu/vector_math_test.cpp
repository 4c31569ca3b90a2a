// The vector functions against the C library in double, and the conversions against
// base/float_bits.h, per SIMD target.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "base/float_bits.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/vector_math_test.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr size_t kStep = kLanes;

// n is a multiple of the vector length.
void ExpOf(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; i += kStep) Store(Exp(Load(x + i)), out + i);
}
void TanhOf(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; i += kStep) Store(Tanh(Load(x + i)), out + i);
}
void ToBF16(const float* x, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; i += kStep) Store(Load(x + i), reinterpret_cast<BF16*>(out + i));
}
void FromBF16(const uint16_t* x, size_t n, float* out) {
  for (size_t i = 0; i < n; i += kStep) Store(Load(reinterpret_cast<const BF16*>(x + i)), out + i);
}
void FromF16(const uint16_t* x, size_t n, float* out) {
  for (size_t i = 0; i < n; i += kStep) Store(Load(reinterpret_cast<const F16*>(x + i)), out + i);
}
// The first n, and `pattern` left alone behind them.
void CopyN(const float* x, size_t n, float* out) { StoreN(LoadN(x, n), out, n); }
size_t LanesOf() { return kStep; }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "kernels/simd_targets.h"

namespace octavo::cpu {
namespace {

HWY_EXPORT(ExpOf);
HWY_EXPORT(TanhOf);
HWY_EXPORT(ToBF16);
HWY_EXPORT(FromBF16);
HWY_EXPORT(FromF16);
HWY_EXPORT(CopyN);
HWY_EXPORT(LanesOf);

// Every 997th float from -limit to limit, and zeros to a multiple of 16.
std::vector<float> Sweep(float limit) {
  std::vector<float> x;
  for (uint32_t bits = 0; bits <= std::bit_cast<uint32_t>(limit); bits += 997) {
    x.push_back(std::bit_cast<float>(bits));
    x.push_back(-std::bit_cast<float>(bits));
  }
  x.resize((x.size() + 15) / 16 * 16);
  return x;
}

// Units in the last place of float32 at `want`.
double Ulps(float got, double want) {
  const int exponent = std::max(std::ilogb(want), -126);
  return std::abs(got - want) / std::ldexp(1.0, exponent - 23);
}

class VectorMathTest : public testing::Test {
 protected:
  template <class F>
  void ForTargets(const F& f) {
    for (const SimdTarget& target : SimdTargets()) {
      SCOPED_TRACE(target.name);
      const UseSimdTarget use(target);
      f();
    }
  }
};

// The mock targets do reach the dispatch: otherwise every test here tests one target several times.
TEST_F(VectorMathTest, TargetsAreReached) {
  ForTargets([] {
    const std::string name = hwy::TargetName(hwy::SupportedTargets());
    const size_t lanes = name == "AVX2" ? 8 : name == "NEON" ? 4 : 16;
    EXPECT_EQ(HWY_DYNAMIC_DISPATCH(LanesOf)(), lanes) << name;
  });
}

TEST_F(VectorMathTest, Exp) {
  std::vector<float> x = Sweep(88.72f);
  std::vector<float> y(x.size());
  ForTargets([&] {
    HWY_DYNAMIC_DISPATCH(ExpOf)(x.data(), x.size(), y.data());
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i)
      worst = std::max(worst, Ulps(y[i], std::exp(double{x[i]})));
    EXPECT_LT(worst, 1.5);
    RecordProperty("worst_ulps", std::to_string(worst));
  });
}

TEST_F(VectorMathTest, Tanh) {
  std::vector<float> x = Sweep(20.0f);
  std::vector<float> y(x.size());
  ForTargets([&] {
    HWY_DYNAMIC_DISPATCH(TanhOf)(x.data(), x.size(), y.data());
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      if (x[i] != 0) worst = std::max(worst, Ulps(y[i], std::tanh(double{x[i]})));
    }
    EXPECT_LT(worst, 2.0);
    RecordProperty("worst_ulps", std::to_string(worst));
  });
}

TEST_F(VectorMathTest, SpecialValues) {
  const std::vector<float> x = {0.0f,    -0.0f,   INFINITY, -INFINITY, NAN,    88.73f,
                                -103.0f, -104.1f, 1e30f,    -1e30f,    100.5f, -150.0f,
                                1e-40f,  -1e-40f, 9.5f,     -9.5f};
  std::vector<float> e(16), t(16);
  ForTargets([&] {
    HWY_DYNAMIC_DISPATCH(ExpOf)(x.data(), 16, e.data());
    HWY_DYNAMIC_DISPATCH(TanhOf)(x.data(), 16, t.data());
    for (size_t i = 0; i < 16; ++i) {
      if (std::isnan(x[i])) {
        EXPECT_TRUE(std::isnan(e[i]) && std::isnan(t[i]));
        continue;
      }
      const float want = static_cast<float>(std::exp(double{x[i]}));
      if (std::isinf(want)) {
        EXPECT_EQ(e[i], want) << x[i];
      } else {
        EXPECT_NEAR(e[i], want, std::max(want * 2e-7f, 1.5e-45f)) << x[i];
      }
      EXPECT_EQ(std::signbit(t[i]), std::signbit(x[i]));
      EXPECT_NEAR(t[i], std::tanh(double{x[i]}), 2e-7) << x[i];
    }
    EXPECT_EQ(e[0], 1.0f);
    EXPECT_EQ(e[3], 0.0f);
    EXPECT_EQ(t[2], 1.0f);
  });
}

TEST_F(VectorMathTest, Conversions) {
  std::vector<uint16_t> codes(65536), back(65536);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(65536), half(65536), x;
  for (uint32_t bits = 0; bits < 0xFFFF0000u; bits += 0x3FFF)
    x.push_back(std::bit_cast<float>(bits));
  for (uint32_t high = 0; high < 0x10000; high += 5) {  // ties and their neighbours
    for (uint32_t low : {0x7FFFu, 0x8000u, 0x8001u})
      x.push_back(std::bit_cast<float>(high << 16 | low));
  }
  x.resize((x.size() + 15) / 16 * 16);
  std::vector<uint16_t> narrow(x.size());
  ForTargets([&] {
    HWY_DYNAMIC_DISPATCH(FromBF16)(codes.data(), codes.size(), wide.data());
    HWY_DYNAMIC_DISPATCH(FromF16)(codes.data(), codes.size(), half.data());
    HWY_DYNAMIC_DISPATCH(ToBF16)(x.data(), x.size(), narrow.data());
    for (size_t i = 0; i < codes.size(); ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(wide[i]), uint32_t{codes[i]} << 16);
      const float want = Float16::Decode(codes[i]);
      ASSERT_TRUE(half[i] == want || (std::isnan(half[i]) && std::isnan(want))) << codes[i];
    }
    for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(narrow[i], FloatToBF16(x[i])) << x[i];
  });
}

TEST_F(VectorMathTest, PartialVectors) {
  ForTargets([] {
    const size_t lanes = HWY_DYNAMIC_DISPATCH(LanesOf)();
    for (size_t n = 1; n < lanes; ++n) {
      const std::vector<float> x(n, 3.0f);  // exactly n: a sanitizer sees a longer read
      std::vector<float> y(lanes, -1.0f);
      HWY_DYNAMIC_DISPATCH(CopyN)(x.data(), n, y.data());
      for (size_t i = 0; i < lanes; ++i) EXPECT_EQ(y[i], i < n ? 3.0f : -1.0f);
    }
  });
}

}  // namespace
}  // namespace octavo::cpu
#endif  // HWY_ONCE
