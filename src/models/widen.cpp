#include "models/widen.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/float_bits.h"
#include "kernels/mxfp4.h"

namespace octavo {
namespace {

std::array<float, 256> Fp8Values() {
  std::array<float, 256> values;
  for (int code = 0; code < 256; ++code) values[code] = Fp8E4M3::Decode(code);
  return values;
}

// A file's four bytes, two neighbouring columns each, as an MXFP4 word.
uint32_t Mxfp4Word(const uint8_t* from) {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 4> words;
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 256; ++byte)
        words[i][byte] =
            mxfp4::CodeInWord(byte & 15, 2 * i) | mxfp4::CodeInWord(byte >> 4, 2 * i + 1);
    }
    return words;
  }();
  return table[0][from[0]] | table[1][from[1]] | table[2][from[2]] | table[3][from[3]];
}

// put(row and column of out, 16 bytes of codes, scale) for each block of the rows that out takes.
template <class Put>
void ForEachMxfp4Block(const Tensor& blocks, const Tensor& scales, int64_t first_row,
                       int64_t row_step, const Tensor& out, const Put& put) {
  const int64_t columns = out.columns();
  OCTAVO_CHECK(columns % mxfp4::kBlock == 0 && scales.columns() == columns / mxfp4::kBlock &&
                   blocks.size() == scales.size() * mxfp4::kBlock / 2,
               ShapeString(blocks), ShapeString(scales), ShapeString(out));
  OCTAVO_CHECK(first_row + (out.rows() - 1) * row_step < scales.rows(), ShapeString(scales),
               ShapeString(out));
  for (int64_t r = 0; r < out.rows(); ++r) {
    const int64_t row = first_row + r * row_step;
    const uint8_t* codes = static_cast<const uint8_t*>(blocks.data) + row * columns / 2;
    const uint8_t* scale = scales.Row<uint8_t>(row);
    for (int64_t c = 0; c < columns; c += mxfp4::kBlock, codes += mxfp4::kBlock / 2)
      put(r, c, codes, *scale++);
  }
}

template <class T>
void TransposeTyped(const Tensor& in, int64_t first_column, int64_t column_step,
                    const Tensor& out) {
  constexpr int64_t kTile = 32;  // rows and columns of a tile stay in the first-level cache
  const int64_t rows = out.rows(), columns = out.columns();
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
      for (int64_t r = r0; r < std::min(rows, r0 + kTile); ++r) {
        T* to = out.Row<T>(r);
        for (int64_t c = c0; c < std::min(columns, c0 + kTile); ++c) {
          to[c] = in.Row<T>(c)[first_column + r * column_step];
        }
      }
    }
  }
}

}  // namespace

float ScaleAt(const Tensor& scales, int64_t index) {
  switch (scales.dtype) {
    case DType::kF32:
      return static_cast<const float*>(scales.data)[index];
    case DType::kBF16:
      return BF16ToFloat(static_cast<const uint16_t*>(scales.data)[index]);
    case DType::kF16:
      return Float16::Decode(static_cast<const uint16_t*>(scales.data)[index]);
    default:
      OCTAVO_CHECK(false, ShapeString(scales));
      return 0;
  }
}

void WidenFp8(const Tensor& codes, const Tensor& scales, const Tensor& out, ThreadPool& threads) {
  OCTAVO_CHECK(
      codes.dtype == DType::kF8E4M3 && out.dtype == DType::kBF16 && codes.size() == out.size(),
      ShapeString(codes), ShapeString(out));
  OCTAVO_CHECK(scales.size() == 1 || scales.size() == codes.rows(), ShapeString(scales),
               ShapeString(codes));
  static const std::array<float, 256> kValues = Fp8Values();
  threads.ForEach(codes.rows(), [&](int64_t row, int) {
    const float scale = ScaleAt(scales, scales.size() == 1 ? 0 : row);
    const uint8_t* from = codes.Row<uint8_t>(row);
    uint16_t* to = out.Row<uint16_t>(row);
    for (int64_t i = 0; i < codes.columns(); ++i) to[i] = FloatToBF16(kValues[from[i]] * scale);
  });
}

void PackMxfp4(const Tensor& blocks, const Tensor& scales, int64_t first_row, int64_t row_step,
               const Tensor& out) {
  OCTAVO_CHECK(out.dtype == DType::kMxfp4, ShapeString(out));
  const auto put = [&](int64_t r, int64_t c, const uint8_t* codes, uint8_t scale) {
    uint8_t* tile = static_cast<uint8_t*>(out.data) + mxfp4::TileOffset(out.columns(), r, c);
    tile[mxfp4::ScaleOffset(r, c)] = scale;
    for (int i = 0; i < mxfp4::kBlock; i += 8, codes += 4) {
      const uint32_t word = Mxfp4Word(codes);
      std::memcpy(tile + mxfp4::WordOffset(r, c + i), &word, sizeof(word));
    }
  };
  ForEachMxfp4Block(blocks, scales, first_row, row_step, out, put);
}

void WidenMxfp4(const Tensor& blocks, const Tensor& scales, int64_t first_row, int64_t row_step,
                const Tensor& out) {
  OCTAVO_CHECK(out.dtype == DType::kBF16, ShapeString(out));
  const auto put = [&](int64_t r, int64_t c, const uint8_t* codes, uint8_t scale) {
    uint16_t* to = out.Row<uint16_t>(r) + c;
    const float factor = std::ldexp(1.0f, scale - 127);
    for (int i = 0; i < mxfp4::kBlock; i += 2, ++codes) {
      to[i] = FloatToBF16(mxfp4::kValues[*codes & 15] * factor);
      to[i + 1] = FloatToBF16(mxfp4::kValues[*codes >> 4] * factor);
    }
  };
  ForEachMxfp4Block(blocks, scales, first_row, row_step, out, put);
}

void TransposeColumns(const Tensor& in, int64_t first_column, int64_t column_step,
                      const Tensor& out) {
  OCTAVO_CHECK(in.dtype == out.dtype && in.rows() == out.columns(), ShapeString(in),
               ShapeString(out));
  OCTAVO_CHECK(first_column + (out.rows() - 1) * column_step < in.columns(), ShapeString(in),
               ShapeString(out));
  switch (SizeOf(in.dtype)) {
    case 1:
      return TransposeTyped<uint8_t>(in, first_column, column_step, out);
    case 2:
      return TransposeTyped<uint16_t>(in, first_column, column_step, out);
    case 4:
      return TransposeTyped<uint32_t>(in, first_column, column_step, out);
    default:
      OCTAVO_CHECK(false, ShapeString(in));
  }
}

}  // namespace octavo
