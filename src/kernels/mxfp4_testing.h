// Random MXFP4 matrices for tests and benchmarks.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/mxfp4.h"

namespace octavo::mxfp4 {

// All codes alike, scales of four neighbouring powers of two, so that values have a deviation of
// about `deviation`. The rows' and columns' padding is zero, as in any such matrix.
inline std::vector<uint8_t> RandomMatrix(int64_t rows, int64_t columns, double deviation,
                                         std::mt19937& random) {
  std::vector<uint8_t> bytes(Bytes(rows, columns));
  const int scale = 127 + static_cast<int>(std::lround(std::log2(deviation / 2.9)));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += 8) {
      uint8_t* tile = bytes.data() + TileOffset(columns, r, c);
      const uint32_t word = static_cast<uint32_t>(random());
      std::memcpy(tile + WordOffset(r, c), &word, sizeof(word));
      tile[ScaleOffset(r, c)] = static_cast<uint8_t>(scale - 2 + (r + c / kBlock * 3) % 4);
    }
  }
  return bytes;
}

}  // namespace octavo::mxfp4
