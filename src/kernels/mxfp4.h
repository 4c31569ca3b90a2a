// Matrices of dtype kMxfp4 as every backend keeps them: e2m1 values, 32 neighbours of a row sharing
// an e8m0 scale, in the order in which a warp of the CUDA kernels reads them.
//
// A matrix [rows, columns] is cut into tiles of 16 rows by 64 columns, zeros behind its ends; tiles
// of the same rows follow each other. A tile is 32 pieces of 16 bytes and 32 scales:
//   piece 4 * r + c (r < 8, c < 4): four words, of rows r and r + 8 in the tile's first 32 columns,
//     then of the same rows in its second 32. A word is columns 8 * c ... 8 * c + 7 of those 32:
//     the even ones in its low half, the odd ones in its high half, in order, their bits where few
//     operations bring them to where bfloat16 has them (SignBit);
//   scales of rows r and r + 8, first 32 columns, then second: byte 4 * r onwards.
// A tensor's shape is the matrix's, its row_stride means nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/tensor.h"

namespace octavo::mxfp4 {

inline constexpr int kBlock = 32;  // columns of one scale
inline constexpr int kTileRows = 16, kTileColumns = 64;
inline constexpr int kCodeBytes = kTileRows * kTileColumns / 2;  // of a tile, before its scales
inline constexpr int kTileBytes = kCodeBytes + kTileRows * kTileColumns / kBlock;
// By code: 1 sign bit, 2 of exponent, 1 of mantissa.
inline constexpr float kValues[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                      -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
inline constexpr int kMostScale = 128;  // that is 2: a bfloat16 factor on top of it overflows

inline constexpr int64_t TilesAcross(int64_t columns) {
  return (columns + kTileColumns - 1) / kTileColumns;
}
inline constexpr int64_t Bytes(int64_t rows, int64_t columns) {
  return (rows + kTileRows - 1) / kTileRows * TilesAcross(columns) * kTileBytes;
}

// The tile of a row and a column, from the matrix's first byte.
inline constexpr int64_t TileOffset(int64_t columns, int64_t row, int64_t column) {
  return (row / kTileRows * TilesAcross(columns) + column / kTileColumns) * kTileBytes;
}
// Within a tile: the word of columns 8 * (column / 8) and on, and the scale.
inline constexpr int WordOffset(int64_t row, int64_t column) {
  const int r = static_cast<int>(row % kTileRows), c = static_cast<int>(column % kTileColumns);
  return (r % 8 * 4 + c % kBlock / 8) * 16 + (c / kBlock * 2 + r / 8) * 4;
}
inline constexpr int ScaleOffset(int64_t row, int64_t column) {
  const int r = static_cast<int>(row % kTileRows), c = static_cast<int>(column % kTileColumns);
  return kCodeBytes + r % 8 * 4 + c / kBlock * 2 + r / 8;
}
// Within a word's halves, by column % 8 / 2: the sign's bit and the lowest of the other three.
// bfloat16 has the sign in bit 15 and the lowest exponent and highest mantissa bits in 8, 7 and 6.
inline constexpr int SignBit(int pair) { return pair == 0 ? 15 : 11 + pair; }
inline constexpr int MagnitudeBit(int pair) { return pair == 3 ? 9 : 6 - 3 * pair; }
inline constexpr uint32_t CodeInWord(int code, int64_t column) {
  const int pair = static_cast<int>(column % 8 / 2);
  return (static_cast<uint32_t>(code >> 3) << SignBit(pair) | static_cast<uint32_t>(code & 7)
                                                                  << MagnitudeBit(pair))
         << (column % 2 * 16);
}
// Columns 2 * pair and the next of a word's eight as bfloat16, the first in the low half, times
// 2^-126: exact, subnormal ones too.
inline constexpr uint32_t TinyPair(uint32_t word, int pair) {
  const int up = 6 - MagnitudeBit(pair);
  const uint32_t magnitudes = up >= 0 ? word << up : word >> -up;
  return (word << (15 - SignBit(pair)) & 0x80008000) | (magnitudes & 0x01C001C0);
}
inline constexpr int CodeOfWord(uint32_t word, int64_t column) {
  const int pair = static_cast<int>(column % 8 / 2);
  const uint32_t half = word >> (column % 2 * 16);
  return static_cast<int>((half >> SignBit(pair) & 1) << 3 | (half >> MagnitudeBit(pair) & 7));
}

}  // namespace octavo::mxfp4
