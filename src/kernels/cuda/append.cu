// Append: one launch. Blocks are dealt out by tiles of consecutive tokens. Of a tile, each of the
// first kv_heads blocks stores the values of one head: quantised into shared memory token by token,
// then out again as rows of V, 16 bytes at a time where the tokens fill them. The tile's other
// blocks rotate queries and keys: a warp takes some heads of one token, so that cosines and norm
// weights are read once.
//
// 8k tokens of 32 + 8 heads of 128 from bfloat16 into FP8: 101 MB in, 84 MB out, 50 million
// elements; at 4.6 TB/s that leaves some 20 instructions per element.
#include <cuda_bf16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/quantize.cuh"
#include "octavo/attention.h"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxTile = 64;  // tokens

struct Params {
  int tokens, heads, kv_heads;
  const void *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  const __nv_bfloat16 *q_norm, *k_norm;
  float norm_eps, norm_offset;
  const float* cos_sin;
  int rotary_dim;
  const int64_t* slots;

  KvFormat k_format, v_format;
  std::byte* arena;  // the layer's claim in page 0
  int64_t head_bytes, v_offset, k_scales, v_scales;
  const float *k_scale, *v_scale;
  unsigned long long* saturated;
  float* amax;

  __nv_bfloat16* q_out;
  const uint8_t* fp8_queries;
  uint8_t* q_fp8;
  float* q_scale;

  int tile;    // tokens, up to kMaxTile
  int shares;  // warps that share a token's queries and keys
};

__device__ __forceinline__ std::byte* Claim(const Params& p, int64_t slot) {
  return p.arena + slot / kPageSize * kPageUnit;
}

// Two runs of eight elements of a head, as they lie in memory.
template <class Input>
struct Raw;
template <>
struct Raw<__nv_bfloat16> {
  uint4 run[2];
};
template <>
struct Raw<float> {
  uint4 run[4];
};

template <class Input>
__device__ __forceinline__ Raw<Input> Load(const Input* first, const Input* second) {
  Raw<Input> raw;
  if constexpr (sizeof(Input) == 2) {
    raw.run[0] = LoadStreaming(first);
    raw.run[1] = LoadStreaming(second);
  } else {
    raw.run[0] = LoadStreaming(first);
    raw.run[1] = LoadStreaming(first + 4);
    raw.run[2] = LoadStreaming(second);
    raw.run[3] = LoadStreaming(second + 4);
  }
  return raw;
}

__device__ __forceinline__ void WidenPair(uint32_t pair, float* x) {
  x[0] = __uint_as_float(pair << 16);
  x[1] = __uint_as_float(pair & 0xFFFF0000);
}

template <class Input>
__device__ __forceinline__ void Widen(const Raw<Input>& raw, float (&x)[16]) {
  if constexpr (sizeof(Input) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      WidenPair(raw.run[i].x, x + 8 * i);
      WidenPair(raw.run[i].y, x + 8 * i + 2);
      WidenPair(raw.run[i].z, x + 8 * i + 4);
      WidenPair(raw.run[i].w, x + 8 * i + 6);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[4 * i] = __uint_as_float(raw.run[i].x);
      x[4 * i + 1] = __uint_as_float(raw.run[i].y);
      x[4 * i + 2] = __uint_as_float(raw.run[i].z);
      x[4 * i + 3] = __uint_as_float(raw.run[i].w);
    }
  }
}

// Eight codes to `first` and eight to `second`.
__device__ __forceinline__ void StoreCodes(const Codes& codes, bool is_16bit, void* first,
                                           void* second) {
  const uint32_t* word = codes.word;
  if (is_16bit) {
    *static_cast<uint4*>(first) = make_uint4(word[0], word[1], word[2], word[3]);
    *static_cast<uint4*>(second) = make_uint4(word[4], word[5], word[6], word[7]);
  } else {
    *static_cast<uint2*>(first) = make_uint2(word[0], word[1]);
    *static_cast<uint2*>(second) = make_uint2(word[2], word[3]);
  }
}

// A layer's statistics. Its amax rarely changes, so most warps only read it, early.
class Reporter {
 public:
  __device__ Reporter(const Params& p, int which)
      : saturated_(p.saturated == nullptr ? nullptr : p.saturated + which),
        amax_(p.amax == nullptr ? nullptr : p.amax + which),
        known_(amax_ == nullptr ? 0 : *const_cast<const volatile float*>(amax_)) {}
  // By a whole warp.
  __device__ void Report(Statistics statistics) const {
    statistics.amax = MaxOverLanes<32>(statistics.amax);
    statistics.saturated = __reduce_add_sync(0xFFFFFFFF, statistics.saturated);
    if (threadIdx.x % 32 != 0) return;
    if (saturated_ != nullptr && statistics.saturated > 0)
      atomicAdd(saturated_, static_cast<unsigned long long>(statistics.saturated));
    // No float here is negative, so they order as integers.
    if (amax_ != nullptr && statistics.amax > known_)
      atomicMax(reinterpret_cast<int*>(amax_), __float_as_int(statistics.amax));
  }

 private:
  unsigned long long* saturated_;
  float* amax_;
  float known_;
};

// ---- queries and keys

// A lane's two runs of eight elements are such that rotation pairs them: as many lanes as it takes
// hold pairs (i, i + rotary_dim / 2), the others what is not rotated.
struct Runs {
  int first, second;
  bool rotated;
};
template <int kHeadDim>
__device__ __forceinline__ Runs RunsOf(int lane, int rotary_dim) {
  const int rotating = rotary_dim / 16;
  if (lane < rotating) return {8 * lane, 8 * lane + rotary_dim / 2, true};
  const int first = rotary_dim + 8 * (lane - rotating);
  return {first, first + (kHeadDim - rotary_dim) / 2, false};
}

// `weights`: [head_dim] in shared memory, the offset already added.
template <int kHeadDim>
__device__ __forceinline__ void Normalise(const float* weights, float eps, const Runs& runs,
                                          float (&x)[16]) {
  float parts[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) parts[i % 4] = fmaf(x[i], x[i], parts[i % 4]);
  float squares = (parts[0] + parts[1]) + (parts[2] + parts[3]);
#pragma unroll
  for (int step = kHeadDim / 32; step > 0; step /= 2)
    squares += __shfl_xor_sync(0xFFFFFFFF, squares, step);
  const float inverse = ReciprocalRoot(squares * (1.0f / kHeadDim) + eps);
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const auto w =
        *reinterpret_cast<const float4*>(weights + (i < 8 ? runs.first + i : runs.second + i - 8));
    x[i] *= inverse * w.x;
    x[i + 1] *= inverse * w.y;
    x[i + 2] *= inverse * w.z;
    x[i + 3] *= inverse * w.w;
  }
}

// `angles`: a token's cosines and sines in shared memory.
__device__ __forceinline__ void Rotate(const float* angles, int rotary_dim, const Runs& runs,
                                       float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const auto cos = *reinterpret_cast<const float4*>(angles + runs.first + i);
    const auto sin = *reinterpret_cast<const float4*>(angles + rotary_dim / 2 + runs.first + i);
    const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float a = x[i + j], b = x[i + j + 8];
      x[i + j] = a * c[j] - b * s[j];
      x[i + j + 8] = b * c[j] + a * s[j];
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StoreQuery(const Params& p, int64_t row, bool active,
                                           const Runs& runs, bool leads, bool fp8, float (&x)[16]) {
  if (fp8) {
    const float scale = DynamicScale(MaxOverLanes<kHeadDim / 16>(LargestMagnitude(x)), false);
    const float reciprocal = Reciprocal(scale);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= reciprocal;
    if (!active) return;
    Codes codes;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      codes.word[i] = PackE4M3(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    uint8_t* to = p.q_fp8 + row * kHeadDim;
    StoreCodes(codes, false, to + runs.first, to + runs.second);
    if (leads) p.q_scale[row] = scale;
  } else if (active) {
    Codes codes;
#pragma unroll
    for (int i = 0; i < 8; ++i) codes.word[i] = PackBF16(x[2 * i], x[2 * i + 1]);
    __nv_bfloat16* to = p.q_out + row * kHeadDim;
    StoreCodes(codes, true, to + runs.first, to + runs.second);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StoreKey(const Params& p, int64_t slot, int head, bool active,
                                         const Runs& runs, bool leads, float (&x)[16],
                                         Statistics& statistics) {
  float scale = IsStaticFp8(p.k_format) && active ? p.k_scale[head] : 1.0f;
  const Codes codes = Quantize<kHeadDim / 16>(p.k_format, x, &scale, statistics);
  if (!active) return;
  const bool is_16bit = Is16Bit(p.k_format);
  const int place = static_cast<int>(slot % kPageSize);
  std::byte* claim = Claim(p, slot);
  std::byte* to = claim + head * p.head_bytes + place * (kHeadDim << is_16bit);
  StoreCodes(codes, is_16bit, to + (runs.first << is_16bit), to + (runs.second << is_16bit));
  if (leads && IsDynamic(p.k_format))
    reinterpret_cast<float*>(claim + p.k_scales)[head * kPageSize + place] = scale;
}

// Shares of tokens' query and key heads, one per warp; unit u is share u % p.shares of token
// u / p.shares of the tile. `weights`: room for the norms of q and of k.
template <int kHeadDim, class Input>
__device__ __forceinline__ void AppendQueriesAndKeys(const Params& p, int tile_begin, int unit,
                                                     float* weights) {
  constexpr int kLanes = kHeadDim / 16;  // of one head
  constexpr int kHeads = 32 / kLanes;    // at a time
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int lane_head = static_cast<int>(threadIdx.x % 32) / kLanes;
  const int q_steps = (p.heads + kHeads - 1) / kHeads;
  const int steps = q_steps + (p.kv_heads + kHeads - 1) / kHeads;
  const int token = tile_begin + unit / p.shares, share = unit % p.shares;
  const bool inside = token < min(tile_begin + p.tile, p.tokens);
  const int begin = steps * share / p.shares, end = inside ? steps * (share + 1) / p.shares : 0;
  const Runs runs = RunsOf<kHeadDim>(lane, p.rotary_dim);

  const int64_t lane_at = lane_head * kHeadDim + runs.first;
  const auto* q = static_cast<const Input*>(p.q) + token * p.q_stride + lane_at;
  const auto* k = static_cast<const Input*>(p.k) + token * p.k_stride + lane_at;
  const int q_active = p.heads - lane_head, k_active = p.kv_heads - lane_head;
  auto load = [&](int step) {
    const bool is_key = step >= q_steps;
    const int head = (is_key ? step - q_steps : step) * kHeads;  // of the warp's first lanes
    if (step >= end || head >= (is_key ? k_active : q_active)) return Raw<Input>{};
    const Input* from = (is_key ? k : q) + head * kHeadDim;
    return Load<Input>(from, from + (runs.second - runs.first));
  };

  Raw<Input> next = load(begin), after = load(begin + 1);
  int64_t slot = -1;
  bool fp8 = false;
  float* angles = weights + (2 + threadIdx.x / 32) * kHeadDim;
  if (inside) {
    slot = p.slots[token];
    for (int i = 4 * static_cast<int>(threadIdx.x % 32); i < p.rotary_dim; i += 128) {
      *reinterpret_cast<float4*>(angles + i) =
          *reinterpret_cast<const float4*>(p.cos_sin + int64_t{token} * p.rotary_dim + i);
    }
    __syncwarp();
    fp8 = p.fp8_queries != nullptr && p.fp8_queries[token] != 0;
  }
  const Reporter reporter(p, 0);
  if (p.q_norm != nullptr || p.k_norm != nullptr) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kHeadDim; i += kThreads) {
      if (p.q_norm != nullptr) weights[i] = __bfloat162float(p.q_norm[i]) + p.norm_offset;
      if (p.k_norm != nullptr)
        weights[kHeadDim + i] = __bfloat162float(p.k_norm[i]) + p.norm_offset;
    }
    __syncthreads();
  }
  if (slot < 0) return;

  Statistics statistics;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const bool is_key = step >= q_steps;
    float x[16];
    Widen(next, x);
    next = after;
    after = load(step + 2);
    if ((is_key ? p.k_norm : p.q_norm) != nullptr)
      Normalise<kHeadDim>(weights + (is_key ? kHeadDim : 0), p.norm_eps, runs, x);
    if (runs.rotated) Rotate(angles, p.rotary_dim, runs, x);
    const int head = (is_key ? step - q_steps : step) * kHeads + lane_head;
    if (is_key) {
      StoreKey<kHeadDim>(p, slot, head, head < p.kv_heads, runs, lane == 0, x, statistics);
    } else {
      StoreQuery<kHeadDim>(p, int64_t{token} * p.heads + head, head < p.heads, runs, lane == 0, fp8,
                           x);
    }
  }
  if (end > q_steps) reporter.Report(statistics);
}

// ---- values

// Consecutive tokens of a tile that stand in one 16-byte vector of a row of V.
struct Piece {
  int64_t slot;  // of the first
  int32_t token, count;
  bool clears;  // nothing behind it in its page is written by this launch, and slot 0 is
};

// By one warp. Tokens of a page are consecutive rows of the call.
template <int kPerVector>
__device__ __forceinline__ void FindPieces(const Params& p, int tile_begin, Piece* pieces,
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
__device__ __forceinline__ void AppendValues(const Params& p, int tile_begin, int head,
                                             std::byte* staged) {
  constexpr int kLanes = kHeadDim / 16;
  constexpr int kAtOnce = kThreads / kLanes;  // tokens
  constexpr int kWords = (kHeadDim << k16Bit) / 4, kInterleave = k16Bit ? 8 : 4;
  __shared__ Piece pieces[kMaxTile];
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
  Raw<Input> next = load(thread / kLanes), after = load(thread / kLanes + kAtOnce);
  if (thread < 32) FindPieces<k16Bit ? 8 : 16>(p, tile_begin, pieces, &piece_count);
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
      auto* scales = reinterpret_cast<float*>(Claim(p, slot) + p.v_scales);
      scales[head * kPageSize + slot % kPageSize] = scale;
    }
  }
  reporter.Report(statistics);
  __syncthreads();

  const int items = (piece_count + kInterleave - 1) / kInterleave * kInterleave * kWords;
  for (int item = thread; item < items; item += kThreads) {
    const int index = item / (kInterleave * kWords) * kInterleave + item % kInterleave;
    if (index >= piece_count) continue;
    const Piece piece = pieces[index];
    const int word = item / kInterleave % kWords;
    std::byte* claim = Claim(p, piece.slot);
    StorePiece<kHeadDim, k16Bit>(piece, staged, word, claim + head * p.head_bytes + p.v_offset);
    if (!piece.clears) continue;
    const int unwritten = static_cast<int>(piece.slot % kPageSize) + piece.count;
    for (int place = unwritten + word; place < kPageSize; place += kWords) {
      if (IsDynamic(p.k_format))
        reinterpret_cast<float*>(claim + p.k_scales)[head * kPageSize + place] = 0;
      if (IsDynamic(p.v_format))
        reinterpret_cast<float*>(claim + p.v_scales)[head * kPageSize + place] = 0;
    }
  }
}

template <int kHeadDim, class Input>
__global__ __launch_bounds__(kThreads, sizeof(Input) == 2 ? 5 : 4) void append_kernel(
    const __grid_constant__ Params p) {
  extern __shared__ __align__(16) std::byte staged[];
  const int tile_begin = static_cast<int>(blockIdx.y) * p.tile;
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.kv_heads) {
    if (Is16Bit(p.v_format)) {
      AppendValues<kHeadDim, Input, true>(p, tile_begin, block, staged);
    } else {
      AppendValues<kHeadDim, Input, false>(p, tile_begin, block, staged);
    }
  } else {
    const int unit = (block - p.kv_heads) * kWarps + static_cast<int>(threadIdx.x / 32);
    AppendQueriesAndKeys<kHeadDim, Input>(p, tile_begin, unit, reinterpret_cast<float*>(staged));
  }
}

// ---- host

[[noreturn]] void Refuse(const char* argument, const std::string& expected,
                         const std::string& found) {
  throw std::invalid_argument(std::string("Append: ") + argument + ": expected " + expected +
                              ", found " + found);
}
void Require(bool condition, const char* argument, const char* expected, int64_t found) {
  if (!condition) Refuse(argument, expected, std::to_string(found));
}
void RequirePointer(const void* p, const char* argument) {
  if (p == nullptr) Refuse(argument, "a device pointer", "null");
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) Refuse(argument, "16-byte alignment", "less");
}
bool HasStaticScale(KvFormat format) {
  return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
}

void Check(const AppendCall& call) {
  const KvLayout& layout = call.cache.layout;
  const int d = layout.head_dim;
  Require(call.tokens >= 0, "tokens", "0 or more", call.tokens);
  Require(d == 64 || d == 128 || d == 256, "cache.layout.head_dim", "64, 128 or 256", d);
  Require(layout.kv_heads > 0, "cache.layout.kv_heads", "1 or more", layout.kv_heads);
  Require(call.heads > 0, "heads", "1 or more", call.heads);
  for (KvFormat format : {layout.k_format, layout.v_format}) {
    if (format == KvFormat::kF32) Refuse("cache.layout", "8- or 16-bit formats", Name(format));
  }
  Require(call.rotary_dim >= 0 && call.rotary_dim <= d && call.rotary_dim % 16 == 0, "rotary_dim",
          "a multiple of 16 up to head_dim", call.rotary_dim);
  const int per_vector = call.input == AppendCall::Input::kBF16 ? 8 : 4;
  const char* const expected = "a multiple of 16 bytes";
  Require(call.q_stride % per_vector == 0, "q_stride", expected, call.q_stride);
  Require(call.k_stride % per_vector == 0, "k_stride", expected, call.k_stride);
  Require(call.v_stride % per_vector == 0, "v_stride", expected, call.v_stride);
  RequirePointer(call.q, "q");
  RequirePointer(call.k, "k");
  RequirePointer(call.v, "v");
  RequirePointer(call.q_out, "q_out");
  RequirePointer(call.cache.arena, "cache.arena");
  if (call.slots == nullptr) Refuse("slots", "a device pointer", "null");
  if (call.q_norm != nullptr) RequirePointer(call.q_norm, "q_norm");
  if (call.k_norm != nullptr) RequirePointer(call.k_norm, "k_norm");
  if (call.cos_sin != nullptr) RequirePointer(call.cos_sin, "cos_sin");
  if (HasStaticScale(layout.k_format) && call.cache.k_scale == nullptr)
    Refuse("cache.k_scale", "[kv_heads] scales", "null");
  if (HasStaticScale(layout.v_format) && call.cache.v_scale == nullptr)
    Refuse("cache.v_scale", "[kv_heads] scales", "null");
  if (call.fp8_queries != nullptr) {
    RequirePointer(call.q_fp8, "q_fp8");
    if (call.q_scale == nullptr) Refuse("q_scale", "a device pointer", "null");
  }
}

template <int kHeadDim, class Input>
void Launch(Params p, cudaStream_t stream) {
  constexpr int kHeads = 32 / (kHeadDim / 16);
  const auto ceil_div = [](int a, int b) { return (a + b - 1) / b; };
  const int steps = ceil_div(p.heads, kHeads) + ceil_div(p.kv_heads, kHeads);
  // Few tokens need every warp; of many, whole pages of V and long runs of loads matter.
  p.tile = p.tokens >= 2048 ? 64 : p.tokens >= 512 ? 16 : 8;
  p.shares = p.tokens >= 2048 ? 1 : steps;
  const dim3 grid(p.kv_heads + ceil_div(p.tile * p.shares, kWarps), ceil_div(p.tokens, p.tile));
  const int staged = std::max(p.tile * kHeadDim * ElementSize(p.v_format) + 128,
                              (2 + kWarps) * kHeadDim * int{sizeof(float)});
  append_kernel<kHeadDim, Input><<<grid, kThreads, staged, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

template <class Input>
void LaunchFor(int head_dim, const Params& p, cudaStream_t stream) {
  if (head_dim == 64) return Launch<64, Input>(p, stream);
  if (head_dim == 128) return Launch<128, Input>(p, stream);
  Launch<256, Input>(p, stream);
}

}  // namespace

void Append(const AppendCall& call, Stream stream) {
  Check(call);
  if (call.tokens == 0) return;
  const KvLayer& cache = call.cache;
  const KvLayout& layout = cache.layout;
  const Params p{
      .tokens = call.tokens,
      .heads = call.heads,
      .kv_heads = layout.kv_heads,
      .q = call.q,
      .k = call.k,
      .v = call.v,
      .q_stride = call.q_stride,
      .k_stride = call.k_stride,
      .v_stride = call.v_stride,
      .q_norm = static_cast<const __nv_bfloat16*>(call.q_norm),
      .k_norm = static_cast<const __nv_bfloat16*>(call.k_norm),
      .norm_eps = call.norm_eps,
      .norm_offset = call.norm_offset,
      .cos_sin = call.cos_sin,
      .rotary_dim = call.cos_sin == nullptr ? 0 : call.rotary_dim,
      .slots = call.slots,
      .k_format = layout.k_format,
      .v_format = layout.v_format,
      .arena = cache.arena + cache.claim_offset,
      .head_bytes = layout.KBytes() + layout.VBytes(),
      .v_offset = layout.KBytes(),
      .k_scales = layout.KScaleOffset(0),
      .v_scales = layout.VScaleOffset(0),
      .k_scale = cache.k_scale,
      .v_scale = cache.v_scale,
      .saturated = reinterpret_cast<unsigned long long*>(cache.saturated),
      .amax = cache.amax,
      .q_out = static_cast<__nv_bfloat16*>(call.q_out),
      .fp8_queries = call.fp8_queries,
      .q_fp8 = static_cast<uint8_t*>(call.q_fp8),
      .q_scale = call.q_scale,
  };
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (call.input == AppendCall::Input::kBF16) {
    LaunchFor<__nv_bfloat16>(layout.head_dim, p, cuda_stream);
  } else {
    LaunchFor<float>(layout.head_dim, p, cuda_stream);
  }
}

}  // namespace octavo::cuda
