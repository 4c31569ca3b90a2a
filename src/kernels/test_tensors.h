// What the tests of ops share: random tensors, outputs with guard bytes around every row, and
// comparisons.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/float_bits.h"
#include "base/tensor.h"

namespace octavo {

// A matrix of its own memory: rows `stride` apart, 64 bytes and the gaps between the rows filled
// with a pattern that no op may touch.
class TestTensor {
 public:
  TestTensor() = default;
  TestTensor(DType dtype, int64_t rows, int64_t columns, int64_t padding = 0)
      : bytes_(kGuard * 2 + static_cast<size_t>(rows * (columns + padding)) * SizeOf(dtype),
               kPattern) {
    tensor_ = Tensor(bytes_.data() + kGuard, dtype, {rows, columns});
    tensor_.row_stride = columns + padding;
  }
  TestTensor(const TestTensor& other) { *this = other; }
  TestTensor& operator=(const TestTensor& other) {
    bytes_ = other.bytes_;
    tensor_ = other.tensor_;
    if (tensor_) tensor_.data = bytes_.data() + kGuard;
    return *this;
  }

  const Tensor& tensor() const { return tensor_; }
  operator const Tensor&() const { return tensor_; }

  double Get(int64_t row, int64_t column) const {
    switch (tensor_.dtype) {
      case DType::kF32:
        return tensor_.Row<float>(row)[column];
      case DType::kBF16:
        return BF16ToFloat(tensor_.Row<uint16_t>(row)[column]);
      case DType::kF16:
        return Float16::Decode(tensor_.Row<uint16_t>(row)[column]);
      default:
        return tensor_.Row<int32_t>(row)[column];
    }
  }

  void Put(int64_t row, int64_t column, double value) {
    const float x = static_cast<float>(value);
    switch (tensor_.dtype) {
      case DType::kF32:
        tensor_.Row<float>(row)[column] = x;
        break;
      case DType::kBF16:
        tensor_.Row<uint16_t>(row)[column] = FloatToBF16(x);
        break;
      case DType::kF16:
        tensor_.Row<uint16_t>(row)[column] = static_cast<uint16_t>(Float16::Encode(x));
        break;
      default:
        tensor_.Row<int32_t>(row)[column] = static_cast<int32_t>(value);
    }
  }

  TestTensor& Fill(std::mt19937& random, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t r = 0; r < tensor_.rows(); ++r) {
      for (int64_t c = 0; c < tensor_.columns(); ++c) Put(r, c, normal(random));
    }
    return *this;
  }

  // Everything outside the rows still holds the pattern.
  bool GuardsIntact() const {
    std::vector<std::byte> copy = bytes_;
    for (int64_t r = 0; r < tensor_.rows(); ++r) {
      std::memset(copy.data() + kGuard + r * tensor_.row_stride * SizeOf(tensor_.dtype),
                  int(kPattern), RowBytes());
    }
    for (std::byte b : copy) {
      if (b != kPattern) return false;
    }
    return true;
  }

  bool SameRow(int64_t row, const TestTensor& other, int64_t other_row) const {
    return std::memcmp(RowData(row), other.RowData(other_row), RowBytes()) == 0;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr std::byte kPattern{0xA5};

  size_t RowBytes() const { return tensor_.columns() * SizeOf(tensor_.dtype); }
  const std::byte* RowData(int64_t row) const {
    return bytes_.data() + kGuard + row * tensor_.row_stride * SizeOf(tensor_.dtype);
  }

  std::vector<std::byte> bytes_;
  Tensor tensor_;
};

// Normalised mean squared error; NaN and infinities must agree exactly.
inline double Nmse(const TestTensor& got, const TestTensor& want) {
  double error = 0, norm = 0;
  for (int64_t r = 0; r < want.tensor().rows(); ++r) {
    for (int64_t c = 0; c < want.tensor().columns(); ++c) {
      const double g = got.Get(r, c), w = want.Get(r, c);
      if (!std::isfinite(w) || !std::isfinite(g)) {
        if (!(g == w || (std::isnan(g) && std::isnan(w)))) return INFINITY;
        continue;
      }
      error += (g - w) * (g - w);
      norm += w * w;
    }
  }
  return norm > 0 ? error / norm : error;
}

// The largest |got - want| in units of want's bfloat16 step, where want is not tiny beside its
// tensor.
inline double WorstBF16Steps(const TestTensor& got, const TestTensor& want) {
  double worst = 0, norm = 0;
  for (int64_t r = 0; r < want.tensor().rows(); ++r) {
    for (int64_t c = 0; c < want.tensor().columns(); ++c) {
      if (std::isfinite(want.Get(r, c))) norm += want.Get(r, c) * want.Get(r, c);
    }
  }
  const double rms =
      std::sqrt(norm / static_cast<double>(std::max<int64_t>(want.tensor().size(), 1)));
  for (int64_t r = 0; r < want.tensor().rows(); ++r) {
    for (int64_t c = 0; c < want.tensor().columns(); ++c) {
      const double w = want.Get(r, c);
      if (!std::isfinite(w)) continue;
      // Beneath 1e-3 of the rms, float32's own error counts: cancellation.
      const double step = std::ldexp(1.0, std::ilogb(std::max(std::abs(w), 1e-3 * rms)) - 7);
      if (step > 0) worst = std::max(worst, std::abs(got.Get(r, c) - w) / step);
    }
  }
  return worst;
}

// float32 results: relative error 1e-6 in the 2-norm. bfloat16 results: one rounding apart at most,
// most not at all.
inline void ExpectMatches(const TestTensor& got, const TestTensor& want, const std::string& what) {
  EXPECT_TRUE(got.GuardsIntact()) << what;
  const double nmse = Nmse(got, want);
  if (want.tensor().dtype == DType::kBF16) {
    EXPECT_LT(nmse, 1e-6) << what;
    EXPECT_LE(WorstBF16Steps(got, want), 1.0) << what;
  } else {
    EXPECT_LT(nmse, 1e-12) << what;
  }
}

}  // namespace octavo
