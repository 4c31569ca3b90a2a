// Values: one head of a tile of consecutive tokens by a block, through shared memory, so that rows
// of V are written 16 bytes at a time where the tokens fill them.
#pragma once

#include "kernels/cuda/append.cuh"

namespace octavo::cuda {

// Consecutive tokens of a tile that stand in one 16-byte vector of a row of V.
struct Piece {
  int64_t slot;  // of the first
  int32_t token, count;
  bool clears;  // nothing behind it in its page is written by this launch, and slot 0 is
};

// By one warp. Tokens of a page are consecutive rows of the call.
template <int kPerVector>
__device__ __forceinline__ void FindPieces(const AppendParams& p, int tile_begin, Piece* pieces,
                                           int* count) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int tokens = min(p.tile, p.tokens - tile_begin);
  uint64_t starts = 0, stops = 0;
  int64_t slot[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = lane + 32 * half;
    const bool inside = token < tokens;
    slot[half] = inside ? p.slots[tile_begin + token] : -1;
    const int64_t before = inside && token > 0 ? p.slots[tile_begin + token - 1] : -2;
    const bool start =
        slot[half] >= 0 && (slot[half] != before + 1 || slot[half] % kPerVector == 0);
    starts |= uint64_t{__ballot_sync(0xFFFFFFFF, start)} << (32 * half);
    stops |= uint64_t{__ballot_sync(0xFFFFFFFF, start || slot[half] < 0)} << (32 * half);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = lane + 32 * half;
    if ((starts >> token & 1) == 0) continue;
    const uint64_t behind = token == 63 ? 0 : stops >> (token + 1);
    const int length = behind != 0 ? __ffsll(static_cast<long long>(behind)) : 64 - token;
    const int64_t last_slot = slot[half] + length - 1;
    const int last = tile_begin + token + length - 1;
    const int place = static_cast<int>(last_slot % kPageSize);
    const bool ends = last + 1 >= p.tokens || p.slots[last + 1] != last_slot + 1;
    const bool clears = ends && place < kPageSize - 1 && last >= place &&
                        p.slots[last - place] == last_slot - place;
    pieces[__popcll(starts & ((uint64_t{1} << token) - 1))] = {slot[half], token, length, clears};
  }
  if (lane == 0) *count = __popcll(starts);
}

// Where a token's codes begin in shared memory: vectors of tokens are 32 bytes apart from a
// multiple of the banks, so that neighbouring pieces are read without conflicts.
template <int kHeadDim, bool k16Bit>
__device__ __forceinline__ int StagedOffset(int token) {
  return token * (kHeadDim << k16Bit) + (k16Bit ? token / 8 * 16 : token / 16 * 32);
}

// Writes one word's dimensions of a piece: four of 8-bit values, two of 16-bit.
template <int kHeadDim, bool k16Bit>
__device__ __forceinline__ void StorePiece(const Piece& piece, const std::byte* staged, int word,
                                           std::byte* v) {
  constexpr int kPerVector = k16Bit ? 8 : 16, kDims = k16Bit ? 2 : 4;
  constexpr int kRowBytes = kPageSize << k16Bit;
  const int first = static_cast<int>(piece.slot % kPerVector);
  const int vector = static_cast<int>(piece.slot % kPageSize) / kPerVector;
  std::byte* to = v + int64_t{word} * kDims * kRowBytes + vector * 16;
  auto read = [&](int n) {  // the codes of the vector's token n
    const int token = piece.token + n - first;
    return *reinterpret_cast<const uint32_t*>(staged + StagedOffset<kHeadDim, k16Bit>(token) +
                                              4 * word);
  };
  if (first == 0 && (piece.count == kPerVector || piece.clears)) {
    uint32_t codes[kPerVector];
#pragma unroll
    for (int n = 0; n < kPerVector; ++n) codes[n] = n < piece.count ? read(n) : 0;
    uint32_t rows[kDims][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (k16Bit) {
        rows[0][j] = __byte_perm(codes[2 * j], codes[2 * j + 1], 0x5410);
        rows[1][j] = __byte_perm(codes[2 * j], codes[2 * j + 1], 0x7632);
      } else {
        // Positions 4j ... 4j + 3 are tokens 2j, 2j + 1, 2j + 8, 2j + 9 (VPosition).
        const uint32_t a = codes[2 * j], b = codes[2 * j + 1];
        const uint32_t c = codes[2 * j + 8], d = codes[2 * j + 9];
        const uint32_t ab01 = __byte_perm(a, b, 0x5140), ab23 = __byte_perm(a, b, 0x7362);
        const uint32_t cd01 = __byte_perm(c, d, 0x5140), cd23 = __byte_perm(c, d, 0x7362);
        rows[0][j] = __byte_perm(ab01, cd01, 0x5410);
        rows[1][j] = __byte_perm(ab01, cd01, 0x7632);
        rows[2][j] = __byte_perm(ab23, cd23, 0x5410);
        rows[3][j] = __byte_perm(ab23, cd23, 0x7632);
      }
    }
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      *reinterpret_cast<uint4*>(to + d * kRowBytes) =
          make_uint4(rows[d][0], rows[d][1], rows[d][2], rows[d][3]);
    }
  } else {
    const int end = piece.clears ? kPerVector : first + piece.count;
    for (int n = first; n < end; ++n) {
      const uint32_t codes = n < first + piece.count ? read(n) : 0;
      const int position = k16Bit ? 2 * n : 4 * (n % 8 / 2) + 2 * (n / 8) + n % 2;
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        std::byte* element = to + d * kRowBytes + position;
        if constexpr (k16Bit) {
          *reinterpret_cast<uint16_t*>(element) = static_cast<uint16_t>(codes >> (16 * d));
        } else {
          *reinterpret_cast<uint8_t*>(element) = static_cast<uint8_t>(codes >> (8 * d));
        }
      }
    }
  }
  if (!piece.clears) return;
  for (int rest = vector + 1; rest < kPageSize / kPerVector; ++rest) {
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      *reinterpret_cast<uint4*>(to + d * kRowBytes + (rest - vector) * 16) = make_uint4(0, 0, 0, 0);
    }
  }
}

// The values of one head of a tile, by one block.
template <int kHeadDim, class Input, bool k16Bit>
__device__ __forceinline__ void AppendValues(const AppendParams& p, int tile_begin, int head,
                                             std::byte* staged) {
  constexpr int kLanes = kHeadDim / 16;
  constexpr int kAtOnce = kAppendThreads / kLanes;  // tokens
  constexpr int kWords = (kHeadDim << k16Bit) / 4, kInterleave = k16Bit ? 8 : 4;
  __shared__ Piece pieces[kMaxAppendTile];
  __shared__ int piece_count;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes;
  const int tokens = min(p.tile, p.tokens - tile_begin);
  auto load = [&](int token) {
    if (token >= tokens) return Raw<Input>{};
    const auto* from = static_cast<const Input*>(p.v) + (tile_begin + token) * p.v_stride +
                       head * kHeadDim + lane * 8;
    return Load<Input>(from, from + kHeadDim / 2);
  };
  const float static_scale = IsStaticFp8(p.v_format) ? p.v_scale[head] : 1.0f;

  const Reporter reporter(p, 1);
  Statistics statistics;
  if (thread < 32) {
    FindPieces<k16Bit ? 8 : 16>(p, tile_begin, pieces, &piece_count);
  } else if (thread == 32 && p.slots[tile_begin] >= 0) {
    PrefetchLine(Claim(p, p.slots[tile_begin]));
  }
  WaitForInputs();
  Raw<Input> next = load(thread / kLanes), after = load(thread / kLanes + kAtOnce);
#pragma unroll 1
  for (int first = 0; first < tokens; first += kAtOnce) {
    const int token = first + thread / kLanes;
    float x[16];
    Widen(next, x);
    next = after;
    after = load(token + 2 * kAtOnce);
    const int64_t slot = token < tokens ? p.slots[tile_begin + token] : -1;
    if (slot < 0) {  // padding is not looked at
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = 0;
    }
    float scale = static_scale;
    const Codes codes = Quantize<kLanes>(p.v_format, x, &scale, statistics);
    if (slot < 0) continue;
    std::byte* to = staged + StagedOffset<kHeadDim, k16Bit>(token) + (lane * 8 << k16Bit);
    StoreCodes(codes, k16Bit, to, to + (kHeadDim / 2 << k16Bit));
    if (lane == 0 && IsDynamic(p.v_format)) {
      std::byte* stored = Claim(p, slot) + head * p.head_bytes;
      reinterpret_cast<float*>(stored + p.v_scales)[slot % kPageSize] = scale;
    }
  }
  reporter.Report(statistics);
  __syncthreads();

  const int items = (piece_count + kInterleave - 1) / kInterleave * kInterleave * kWords;
  for (int item = thread; item < items; item += kAppendThreads) {
    const int index = item / (kInterleave * kWords) * kInterleave + item % kInterleave;
    if (index >= piece_count) continue;
    const Piece piece = pieces[index];
    const int word = item / kInterleave % kWords;
    std::byte* stored = Claim(p, piece.slot) + head * p.head_bytes;
    StorePiece<kHeadDim, k16Bit>(piece, staged, word, stored + p.v_offset);
    if (!piece.clears) continue;
    const int unwritten = static_cast<int>(piece.slot % kPageSize) + piece.count;
    for (int place = unwritten + word; place < kPageSize; place += kWords) {
      if (IsDynamic(p.k_format)) reinterpret_cast<float*>(stored + p.k_scales)[place] = 0;
      if (IsDynamic(p.v_format)) reinterpret_cast<float*>(stored + p.v_scales)[place] = 0;
    }
  }
}

}  // namespace octavo::cuda
