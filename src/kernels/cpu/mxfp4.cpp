#include "kernels/cpu/mxfp4.h"

#include <array>
#include <cmath>

#include "base/error.h"
#include "base/float_bits.h"
#include "kernels/mxfp4.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/mxfp4.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#ifndef OCTAVO_KERNELS_CPU_MXFP4_ONCE
#define OCTAVO_KERNELS_CPU_MXFP4_ONCE
namespace octavo::cpu {

// The bytes of the 16 values at a scale as bfloat16.
struct Mxfp4Values {
  alignas(16) uint8_t low[16], high[16];
};
inline const Mxfp4Values& Mxfp4ValuesAt(uint8_t scale) {
  static const auto table = [] {
    std::array<Mxfp4Values, mxfp4::kMostScale + 1> all;
    for (int s = 0; s <= mxfp4::kMostScale; ++s) {
      for (int code = 0; code < 16; ++code) {
        const uint16_t bits = FloatToBF16(std::ldexp(mxfp4::kValues[code], s - 127));
        all[s].low[code] = static_cast<uint8_t>(bits);
        all[s].high[code] = static_cast<uint8_t>(bits >> 8);
      }
    }
    return all;
  }();
  return table[scale];
}

}  // namespace octavo::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
// A block of 16 bytes is four words of a row; two rows at once where vectors hold them.
constexpr int kRows = HWY_HAVE_SCALABLE || HWY_MAX_BYTES < 32 ? 1 : 2;
using Block = hn::Full128<uint8_t>;
using Bytes = hn::FixedTag<uint8_t, 16 * kRows>;
using Halves = hn::FixedTag<uint16_t, 8 * kRows>;
using Words = hn::FixedTag<uint32_t, 4 * kRows>;

// kRows blocks, `distance` apart. Templates, so that only one branch need make sense.
template <class Tag>
HWY_INLINE hn::Vec<Tag> LoadBlocks(Tag d, const uint8_t* first, const uint8_t* second) {
  if constexpr (kRows == 2)
    return hn::Combine(d, hn::Load(hn::Half<Tag>(), second), hn::Load(hn::Half<Tag>(), first));
  else
    return hn::Load(d, first);
}
template <class Tag>
HWY_INLINE void StoreBlocks(Tag d, hn::Vec<Tag> blocks, uint16_t* out, int64_t distance) {
  if constexpr (kRows == 2) {
    const hn::Half<Tag> half;
    hn::StoreU(hn::LowerHalf(half, blocks), half, reinterpret_cast<uint8_t*>(out));
    hn::StoreU(hn::UpperHalf(half, blocks), half, reinterpret_cast<uint8_t*>(out + distance));
  } else {
    hn::StoreU(blocks, d, reinterpret_cast<uint8_t*>(out));
  }
}

// Bits of a mask, from kRight higher.
template <int kRight>
HWY_INLINE hn::Vec<Halves> Field(hn::Vec<Halves> words, uint16_t mask) {
  if constexpr (kRight > 0) words = hn::ShiftRight<kRight>(words);
  if constexpr (kRight < 0) words = hn::ShiftLeft<-kRight>(words);
  return hn::And(words, hn::Set(Halves(), mask));
}

// In each half of a word, the codes of pairs kLow and kHigh of its columns, a byte each.
template <int kLow, int kHigh>
HWY_INLINE hn::Vec<Words> Codes(hn::Vec<Halves> words) {
  const auto low = hn::Or(Field<mxfp4::MagnitudeBit(kLow)>(words, 0x0007),
                          Field<mxfp4::SignBit(kLow) - 3>(words, 0x0008)),
             high = hn::Or(Field<mxfp4::MagnitudeBit(kHigh) - 8>(words, 0x0700),
                           Field<mxfp4::SignBit(kHigh) - 11>(words, 0x0800));
  return hn::BitCast(Words(), hn::Or(low, high));
}

// 16 columns of kRows rows.
HWY_INLINE void PutSixteen(hn::Vec<Words> mixed, hn::Vec<Bytes> low_table,
                           hn::Vec<Bytes> high_table, uint16_t* out, int64_t stride) {
  const Bytes d;
  alignas(16) constexpr uint8_t kOrder[16] = {1, 3, 4, 6, 0, 2, 5, 7, 9, 11, 12, 14, 8, 10, 13, 15};
  const auto codes = hn::TableLookupBytes(hn::BitCast(d, mixed), hn::LoadDup128(d, kOrder));
  const auto low = hn::TableLookupBytes(low_table, codes);
  const auto high = hn::TableLookupBytes(high_table, codes);
  StoreBlocks(d, hn::InterleaveLower(d, low, high), out, stride);
  StoreBlocks(d, hn::InterleaveUpper(d, low, high), out + 8, stride);
}

// 32 columns of kRows rows, whose scales are four bytes apart.
HWY_INLINE void PutBlocks(hn::Vec<Words> words, const uint8_t* scales, uint16_t* out,
                          int64_t stride) {
  const Mxfp4Values& first = Mxfp4ValuesAt(scales[0]);
  const Mxfp4Values& second = Mxfp4ValuesAt(scales[kRows == 2 ? 4 : 0]);
  const auto low = LoadBlocks(Bytes(), first.low, second.low);
  const auto high = LoadBlocks(Bytes(), first.high, second.high);
  const auto halves = hn::BitCast(Halves(), words);
  const auto even = Codes<2, 0>(halves), odd = Codes<1, 3>(halves);
  PutSixteen(hn::InterleaveLower(Words(), even, odd), low, high, out, stride);
  PutSixteen(hn::InterleaveUpper(Words(), even, odd), low, high, out + 16, stride);
}

void WidenTiles(const uint8_t* tile, int64_t tiles, uint16_t* out, int64_t stride) {
  for (int64_t t = 0; t < tiles; ++t, tile += mxfp4::kTileBytes, out += mxfp4::kTileColumns) {
    for (int r = 0; r < 8; r += kRows) {
      hn::Vec<Words> first_low, first_high, second_low, second_high;
      hn::LoadInterleaved4(Words(), reinterpret_cast<const uint32_t*>(tile + 64 * r), first_low,
                           first_high, second_low, second_high);
      const uint8_t* scales = tile + mxfp4::kCodeBytes + 4 * r;
      uint16_t *low = out + r * stride, *high = low + 8 * stride;
      PutBlocks(first_low, scales, low, stride);
      PutBlocks(first_high, scales + 1, high, stride);
      PutBlocks(second_low, scales + 2, low + mxfp4::kBlock, stride);
      PutBlocks(second_high, scales + 3, high + mxfp4::kBlock, stride);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {
namespace {

HWY_EXPORT(WidenTiles);

int64_t Stride(int64_t columns) { return mxfp4::TilesAcross(columns) * mxfp4::kTileColumns; }

}  // namespace

int64_t Mxfp4WidenedSize(int64_t rows, int64_t columns) {
  return (rows + mxfp4::kTileRows - 1) / mxfp4::kTileRows * mxfp4::kTileRows * Stride(columns);
}

Tensor WidenMxfp4(const Tensor& weight, int64_t begin, int64_t end, uint16_t* memory) {
  const int64_t columns = weight.columns(), stride = Stride(columns);
  OCTAVO_CHECK(weight.dtype == DType::kMxfp4 && begin % mxfp4::kTileRows == 0, ShapeString(weight),
               begin);
  for (int64_t row = begin; row < end; row += mxfp4::kTileRows) {
    const auto* tiles =
        static_cast<const uint8_t*>(weight.data) + mxfp4::TileOffset(columns, row, 0);
    HWY_DYNAMIC_DISPATCH(WidenTiles)
    (tiles, mxfp4::TilesAcross(columns), memory + (row - begin) * stride, stride);
  }
  Tensor widened(memory, DType::kBF16, {end - begin, columns});
  widened.row_stride = stride;
  return widened;
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
