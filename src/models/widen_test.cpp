#include "models/widen.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/float_bits.h"
#include "kernels/backend.h"
#include "kernels/mxfp4.h"

namespace octavo {
namespace {

TEST(Widen, Fp8TimesItsScale) {
  ThreadPool threads(2);
  std::vector<uint8_t> codes(512);
  for (int i = 0; i < 512; ++i) codes[i] = static_cast<uint8_t>(i);
  const Tensor from(codes.data(), DType::kF8E4M3, {2, 256});
  std::vector<uint16_t> out(512);
  const Tensor to(out.data(), DType::kBF16, {2, 256});

  const float channel[] = {0.0123f, 3.5f};
  const uint16_t channel_bf16[] = {FloatToBF16(0.0123f), FloatToBF16(3.5f)};
  const uint16_t tensor_f16 = static_cast<uint16_t>(Float16::Encode(0.25f));
  const Tensor scales[] = {Tensor(channel, DType::kF32, {2, 1}),
                           Tensor(channel_bf16, DType::kBF16, {2}),
                           Tensor(&tensor_f16, DType::kF16, {1})};
  for (const Tensor& scale : scales) {
    WidenFp8(from, scale, to, threads);
    for (int i = 0; i < 512; ++i) {
      const float s = scale.dtype == DType::kF32    ? channel[i / 256]
                      : scale.dtype == DType::kBF16 ? BF16ToFloat(channel_bf16[i / 256])
                                                    : 0.25f;
      const float value = Fp8E4M3::Decode(codes[i]);
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(BF16ToFloat(out[i])));
      } else {
        EXPECT_EQ(out[i], FloatToBF16(value * s)) << ShapeString(scale) << ' ' << i;
      }
    }
  }
}

// The reference's reading of a matrix: what it multiplies one-hot rows with.
std::vector<float> Values(const Tensor& matrix) {
  const int64_t rows = matrix.rows(), columns = matrix.columns();
  std::vector<float> one_hot(columns * columns), values(columns * rows), transposed(rows * columns);
  for (int64_t c = 0; c < columns; ++c) one_hot[c * columns + c] = 1;
  MakeReferenceBackend()->MatMul({.x = Tensor(one_hot.data(), DType::kF32, {columns, columns}),
                                  .weight = matrix,
                                  .bias = {},
                                  .out = Tensor(values.data(), DType::kF32, {columns, rows})});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) transposed[r * columns + c] = values[c * rows + r];
  }
  return transposed;
}

constexpr double kFp4[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0., -0.5, -1, -1.5, -2, -3, -4, -6};

TEST(Widen, Mxfp4AllCodesAndScales) {
  for (int scale = 0; scale <= kMostMxfp4Scale; ++scale) {
    // Two rows of 32: the low half of each byte is the even element.
    std::vector<uint8_t> blocks(32), out(mxfp4::Bytes(2, 32));
    for (int i = 0; i < 32; ++i) blocks[i] = static_cast<uint8_t>((i % 16) | ((15 - i % 16) << 4));
    const uint8_t scales[2] = {static_cast<uint8_t>(scale), 127};
    const Tensor from(blocks.data(), DType::kU8, {2, 1, 16}), by(scales, DType::kU8, {2, 1});
    uint16_t widened[64];
    WidenMxfp4(from, by, 0, 1, Tensor(widened, DType::kBF16, {2, 32}));
    const Tensor packed(out.data(), DType::kMxfp4, {2, 32});
    const bool fits = scale <= mxfp4::kMostScale;
    if (fits) PackMxfp4(from, by, 0, 1, packed);
    const std::vector<float> values = fits ? Values(packed) : std::vector<float>();
    for (int i = 0; i < 64; ++i) {
      const int code = i % 2 == 0 ? (i / 2) % 16 : 15 - (i / 2) % 16;
      const double expected = std::ldexp(kFp4[code], i < 32 ? scale - 127 : 0);
      EXPECT_EQ(static_cast<double>(BF16ToFloat(widened[i])), expected) << scale << ' ' << i;
      if (fits) {
        EXPECT_EQ(static_cast<double>(values[i]), expected) << scale << ' ' << i;
      }
    }
  }
}

// What the GPU makes of a word, before it multiplies.
TEST(Widen, Mxfp4TinyPairs) {
  std::mt19937 random(2);
  for (int i = 0; i < 1000; ++i) {
    int codes[8];
    uint32_t word = 0;
    for (int c = 0; c < 8; ++c) {
      codes[c] = static_cast<int>(random() % 16);
      word |= mxfp4::CodeInWord(codes[c], c);
    }
    for (int c = 0; c < 8; ++c) {
      ASSERT_EQ(mxfp4::CodeOfWord(word, c), codes[c]);
      const auto tiny = static_cast<uint16_t>(mxfp4::TinyPair(word, c / 2) >> (c % 2 * 16));
      ASSERT_EQ(std::ldexp(static_cast<double>(BF16ToFloat(tiny)), 126), kFp4[codes[c]]) << c;
    }
  }
}

TEST(Widen, Mxfp4RowsApart) {
  // 42 rows of five blocks; take every other one from row 1: two tiles by three, the last of either
  // not full.
  constexpr int kRows = 42, kTaken = 21, kColumns = 160, kBlocks = kColumns / 32;
  std::mt19937 random(1);
  std::vector<uint8_t> blocks(kRows * kColumns / 2), scales(kRows * kBlocks);
  for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(random());
  for (uint8_t& scale : scales) scale = static_cast<uint8_t>(120 + random() % 9);
  std::vector<uint8_t> out(mxfp4::Bytes(kTaken, kColumns) + 16, 0);
  std::fill(out.end() - 16, out.end(), uint8_t{0xA5});
  const Tensor packed(out.data(), DType::kMxfp4, {kTaken, kColumns});
  PackMxfp4(Tensor(blocks.data(), DType::kU8, {kRows, kBlocks, 16}),
            Tensor(scales.data(), DType::kU8, {kRows, kBlocks}), 1, 2, packed);
  EXPECT_EQ(std::count(out.end() - 16, out.end(), 0xA5), 16);
  const std::vector<float> values = Values(packed);
  for (int r = 0; r < kTaken; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      const int row = 2 * r + 1, byte = blocks[(row * kColumns + c) / 2];
      const double value = kFp4[c % 2 == 0 ? byte & 15 : byte >> 4];
      ASSERT_EQ(values[r * kColumns + c], std::ldexp(value, scales[row * kBlocks + c / 32] - 127))
          << r << ' ' << c;
    }
  }
}

template <class T>
void ExpectTransposed(DType dtype) {
  constexpr int kIn = 70, kColumns = 90;  // not multiples of the tile
  std::vector<T> from(kIn * kColumns), out(kIn * kColumns / 2);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<T>(i);
  TransposeColumns(Tensor(from.data(), dtype, {kIn, kColumns}), 1, 2,
                   Tensor(out.data(), dtype, {kColumns / 2, kIn}));
  for (int r = 0; r < kColumns / 2; ++r) {
    for (int c = 0; c < kIn; ++c) ASSERT_EQ(out[r * kIn + c], from[c * kColumns + 2 * r + 1]);
  }
}

TEST(Widen, TransposeEveryOtherColumn) {
  ExpectTransposed<uint16_t>(DType::kBF16);
  ExpectTransposed<uint32_t>(DType::kF32);
}

}  // namespace
}  // namespace octavo
