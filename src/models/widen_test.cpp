#include "models/widen.h"

#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "base/float_bits.h"

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

TEST(Widen, Mxfp4AllCodesAndScales) {
  const double values[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0., -0.5, -1, -1.5, -2, -3, -4, -6};
  for (int scale = 0; scale < 256; ++scale) {
    // Two rows of 32: the low half of each byte is the even element.
    std::vector<uint8_t> blocks(32);
    for (int i = 0; i < 32; ++i) blocks[i] = static_cast<uint8_t>((i % 16) | ((15 - i % 16) << 4));
    const uint8_t scales[2] = {static_cast<uint8_t>(scale), 127};
    std::vector<uint16_t> out(64);
    const bool finite = WidenMxfp4(Tensor(blocks.data(), DType::kU8, {2, 1, 16}),
                                   Tensor(scales, DType::kU8, {2, 1}), 0, 1,
                                   Tensor(out.data(), DType::kBF16, {2, 32}));
    EXPECT_EQ(finite, scale < 253) << scale;  // 6 * 2^126 is no finite BF16, and 255 is NaN
    for (int i = 0; i < 64; ++i) {
      if (i < 32 && scale >= 253) continue;
      const int code = i % 2 == 0 ? (i / 2) % 16 : 15 - (i / 2) % 16;
      const double expected = std::ldexp(values[code], i < 32 ? scale - 127 : 0);
      EXPECT_EQ(static_cast<double>(BF16ToFloat(out[i])), expected) << scale << ' ' << i;
      EXPECT_EQ(std::signbit(BF16ToFloat(out[i])), std::signbit(expected)) << scale << ' ' << i;
    }
  }
}

TEST(Widen, Mxfp4RowsApart) {
  // Four rows of two blocks; take rows 1 and 3.
  std::vector<uint8_t> blocks(4 * 2 * 16), scales(4 * 2, 127);
  for (int row = 0; row < 4; ++row) std::fill_n(blocks.begin() + row * 32, 32, row * 0x11);
  scales[1 * 2 + 1] = 128;
  std::vector<uint16_t> out(2 * 64);
  ASSERT_TRUE(WidenMxfp4(Tensor(blocks.data(), DType::kU8, {4, 2, 16}),
                         Tensor(scales.data(), DType::kU8, {4, 2}), 1, 2,
                         Tensor(out.data(), DType::kBF16, {2, 64})));
  EXPECT_EQ(BF16ToFloat(out[0]), 0.5f);
  EXPECT_EQ(BF16ToFloat(out[32]), 1.0f);
  EXPECT_EQ(BF16ToFloat(out[64]), 1.5f);
  EXPECT_EQ(BF16ToFloat(out[127]), 1.5f);
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
