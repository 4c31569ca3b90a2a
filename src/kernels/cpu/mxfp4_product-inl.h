// Products with MXFP4 weights (kernels/mxfp4.h) decoded in registers. Included once per SIMD
// target, inside no namespace (Highway's scheme).
#if defined(OCTAVO_KERNELS_CPU_MXFP4_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef OCTAVO_KERNELS_CPU_MXFP4_PRODUCT_INL_H_
#undef OCTAVO_KERNELS_CPU_MXFP4_PRODUCT_INL_H_
#else
#define OCTAVO_KERNELS_CPU_MXFP4_PRODUCT_INL_H_
#endif

#include <array>
#include <cmath>
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"
#include "kernels/mxfp4.h"

#ifndef OCTAVO_KERNELS_CPU_MXFP4_PRODUCT_ONCE
#define OCTAVO_KERNELS_CPU_MXFP4_PRODUCT_ONCE
namespace octavo::cpu {

// By scale, 2^(scale - 127).
inline const float* Mxfp4Scales() {
  static const auto table = [] {
    std::array<float, mxfp4::kMostScale + 1> all;
    for (int s = 0; s <= mxfp4::kMostScale; ++s) all[s] = std::ldexp(1.0f, s - 127);
    return all;
  }();
  return table.data();
}

}  // namespace octavo::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

// A word is eight columns: vectors of eight or 16 floats hold one or two, and a lookup finds the
// eight magnitudes in one of them.
constexpr bool kMxfp4Fits =
    HWY_TARGET != HWY_SCALAR && !HWY_HAVE_SCALABLE && (kLanes == 8 || kLanes == 16);
// Rows of x in one pass: the accumulators of two outputs for each are half of AVX2's registers.
constexpr int64_t kMxfp4Rows = kMxfp4Fits ? 4 : 0;

using WordTag = hn::Rebind<uint32_t, FloatTag>;
using WordVector = hn::Vec<WordTag>;

// By lane: the column's magnitude to the lowest bits of a word, its sign to the highest.
struct Mxfp4Shifts {
  WordVector magnitude, sign;
  V values;  // of the magnitudes, as often as lanes hold them

  HWY_INLINE Mxfp4Shifts() {
    HWY_ALIGN uint32_t right[kLanes], left[kLanes];
    HWY_ALIGN float value[kLanes];
    for (size_t i = 0; i < kLanes; ++i) {
      const int column = static_cast<int>(i % 8), half = 16 * (column % 2);
      right[i] = static_cast<uint32_t>(mxfp4::MagnitudeBit(column / 2) + half);
      left[i] = static_cast<uint32_t>(31 - (mxfp4::SignBit(column / 2) + half));
      value[i] = mxfp4::kValues[column];
    }
    magnitude = hn::Load(WordTag(), right);
    sign = hn::Load(WordTag(), left);
    values = hn::Load(FloatTag(), value);
  }
};

HWY_INLINE WordVector Mxfp4Word(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, sizeof(word));
  return hn::Set(WordTag(), word);
}

// kLanes weights. `values`: the magnitudes times the block's scale.
HWY_INLINE V Mxfp4Weights(WordVector words, const Mxfp4Shifts& shifts, V values) {
  auto index = hn::Shr(words, shifts.magnitude);
  // Highway asserts what the instructions do anyway: only the lowest bits count.
  if constexpr (HWY_IS_DEBUG_BUILD) index = hn::And(index, hn::Set(WordTag(), 7));
  const auto magnitude = hn::TableLookupLanes(values, hn::IndicesFromVec(FloatTag(), index));
  const auto sign = hn::And(hn::Shl(words, shifts.sign), hn::Set(WordTag(), 0x80000000u));
  return hn::Xor(magnitude, hn::BitCast(FloatTag(), sign));
}

// Tiles along one panel of `columns`, kRows rows of x, tile rows first_pair ... + kPairs and those
// 8 further; x is zero from `columns` to the next multiple of 16. Into (first panel) or onto
// `sums`, of which there are `outs` from the tiles' first row on.
template <size_t kRows, size_t kPairs>
HWY_NOINLINE void AddMxfp4Pairs(const float* HWY_RESTRICT x, int64_t x_stride,
                                const uint8_t* HWY_RESTRICT tiles, int64_t columns,
                                int64_t first_pair, bool first, float* HWY_RESTRICT sums,
                                int64_t sums_stride, int64_t outs) {
  constexpr size_t kOuts = 2 * kPairs;
  constexpr int64_t kWords = kLanes / 8;  // of a vector
  constexpr int64_t kPrefetch = 4 * mxfp4::kTileBytes;
  const Mxfp4Shifts shifts;
  const float* by_scale = Mxfp4Scales();
  V acc[kRows * kOuts];
  Clear(acc, std::make_index_sequence<kRows * kOuts>());
  const uint8_t* codes = tiles + 64 * first_pair;
  const uint8_t* scales = tiles + mxfp4::kCodeBytes + 4 * first_pair;
  for (int64_t begin = 0; begin < columns; begin += mxfp4::kBlock) {
    OCTAVO_UNROLL for (size_t p = 0; p < kPairs; ++p) {
      hwy::Prefetch(codes + kPrefetch + 64 * p);
      OCTAVO_UNROLL for (size_t h = 0; h < 2; ++h) {
        const V values = hn::Mul(shifts.values, Set(by_scale[scales[4 * p + h]]));
        OCTAVO_UNROLL for (int64_t c = 0; c < 4; c += kWords) {
          const uint8_t* word = codes + 64 * p + 16 * c + 4 * h;
          auto words = Mxfp4Word(word);
          if constexpr (kWords == 2)
            words = hn::ConcatUpperLower(WordTag(), Mxfp4Word(word + 16), words);
          const V weights = Mxfp4Weights(words, shifts, values);
          OCTAVO_UNROLL for (size_t row = 0; row < kRows; ++row) {
            V& sum = acc[row * kOuts + 2 * p + h];
            sum = hn::MulAdd(Load(x + row * x_stride + begin + 8 * c), weights, sum);
          }
        }
      }
    }
    const bool second = begin % mxfp4::kTileColumns != 0;
    codes += second ? mxfp4::kTileBytes - 8 : 8;
    scales += second ? mxfp4::kTileBytes - 2 : 2;
  }
  HWY_ALIGN float tile[kRows * kOuts + kLanes];
  ReduceAll<kRows * kOuts>(acc, tile);
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t i = 0; i < kOuts; ++i) {
      const int64_t o = first_pair + static_cast<int64_t>(i / 2 + i % 2 * 8);
      if (o >= outs) continue;
      float& to = sums[row * sums_stride + o];
      to = first ? tile[row * kOuts + i] : to + tile[row * kOuts + i];
    }
  }
}

template <size_t kRows>
HWY_INLINE void AddMxfp4Rows(const float* x, int64_t x_stride, const uint8_t* tiles,
                             int64_t columns, bool first, float* sums, int64_t sums_stride,
                             int64_t outs) {
  constexpr size_t kPairs = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  for (int64_t pair = 0; pair < 8; pair += kPairs)
    AddMxfp4Pairs<kRows, kPairs>(x, x_stride, tiles, columns, pair, first, sums, sums_stride, outs);
}

// 16 outputs along one panel, `rows` up to kMxfp4Rows.
HWY_INLINE void AddMxfp4(int64_t rows, const float* x, int64_t x_stride, const uint8_t* tiles,
                         int64_t columns, bool first, float* sums, int64_t sums_stride,
                         int64_t outs) {
  if constexpr (kMxfp4Fits) {
    switch (rows) {
      case 1:
        return AddMxfp4Rows<1>(x, x_stride, tiles, columns, first, sums, sums_stride, outs);
      case 2:
        return AddMxfp4Rows<2>(x, x_stride, tiles, columns, first, sums, sums_stride, outs);
      case 3:
        return AddMxfp4Rows<3>(x, x_stride, tiles, columns, first, sums, sums_stride, outs);
      default:
        return AddMxfp4Rows<4>(x, x_stride, tiles, columns, first, sums, sums_stride, outs);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#endif  // OCTAVO_KERNELS_CPU_MXFP4_PRODUCT_INL_H_
