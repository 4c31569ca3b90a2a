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
using Bytes = hn::Full128<uint8_t>;
using Halves = hn::Full128<uint16_t>;
using Words = hn::Full128<uint32_t>;

HWY_INLINE void PutSixteen(hn::Vec<Bytes> codes, const Mxfp4Values& values, uint16_t* out) {
  const Bytes d;
  const auto low = hn::TableLookupBytes(hn::Load(d, values.low), codes);
  const auto high = hn::TableLookupBytes(hn::Load(d, values.high), codes);
  auto* bytes = reinterpret_cast<uint8_t*>(out);
  hn::StoreU(hn::InterleaveLower(d, low, high), d, bytes);
  hn::StoreU(hn::InterleaveUpper(d, low, high), d, bytes + 16);
}

// The codes of columns 2 * kPair and 2 * kPair + 1 of each word, in the lowest bits of its halves.
template <int kPair>
HWY_INLINE hn::Vec<Halves> Codes(hn::Vec<Halves> words) {
  const Halves d;
  return hn::Or(hn::And(hn::ShiftRight<mxfp4::kSignBits[kPair] - 3>(words), hn::Set(d, 8)),
                hn::And(hn::ShiftRight<mxfp4::kMagnitudeBits[kPair]>(words), hn::Set(d, 7)));
}

// Four words, 32 columns.
HWY_INLINE void PutBlock(hn::Vec<Words> words, uint8_t scale, uint16_t* out) {
  const Bytes d;
  const Halves halves;
  const auto w = hn::BitCast(halves, words);
  // Of each word, columns 0 2 1 3 and 4 6 5 7; then put in order.
  const auto first = hn::BitCast(Words(), hn::Or(Codes<0>(w), hn::ShiftLeft<8>(Codes<1>(w)))),
             second = hn::BitCast(Words(), hn::Or(Codes<2>(w), hn::ShiftLeft<8>(Codes<3>(w))));
  alignas(16) constexpr uint8_t kOrder[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  const auto put = [&](hn::Vec<Words> codes, uint16_t* to) {
    PutSixteen(hn::TableLookupBytes(hn::BitCast(d, codes), hn::Load(d, kOrder)),
               Mxfp4ValuesAt(scale), to);
  };
  put(hn::InterleaveLower(Words(), first, second), out);
  put(hn::InterleaveUpper(Words(), first, second), out + 16);
}

void WidenTiles(const uint8_t* tile, int64_t tiles, uint16_t* out, int64_t stride) {
  for (int64_t t = 0; t < tiles; ++t, tile += mxfp4::kTileBytes, out += mxfp4::kTileColumns) {
    for (int r = 0; r < 8; ++r) {
      hn::Vec<Words> first_low, first_high, second_low, second_high;
      hn::LoadInterleaved4(Words(), reinterpret_cast<const uint32_t*>(tile + 64 * r), first_low,
                           first_high, second_low, second_high);
      const uint8_t* scales = tile + mxfp4::kCodeBytes + 4 * r;
      uint16_t *low = out + r * stride, *high = low + 8 * stride;
      PutBlock(first_low, scales[0], low);
      PutBlock(first_high, scales[1], high);
      PutBlock(second_low, scales[2], low + mxfp4::kBlock);
      PutBlock(second_high, scales[3], high + mxfp4::kBlock);
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
