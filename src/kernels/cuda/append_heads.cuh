// Queries and keys, and of few tokens values too, a step at a time: a warp takes a range of steps
// across tokens, loading two steps ahead.
#pragma once

#include "kernels/cuda/append.cuh"

namespace octavo::cuda {

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
__device__ __forceinline__ void StoreQuery(const AppendParams& p, int64_t row, bool active,
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
__device__ __forceinline__ void StoreKey(const AppendParams& p, int64_t slot, int head,
                                         const Runs& runs, const Codes& codes) {
  const bool is_16bit = Is16Bit(p.k_format);
  const int place = static_cast<int>(slot % kPageSize);
  std::byte* to = Claim(p, slot) + head * p.head_bytes + place * (kHeadDim << is_16bit);
  StoreCodes(codes, is_16bit, to + (runs.first << is_16bit), to + (runs.second << is_16bit));
}

template <class Element>
__device__ __forceinline__ void StoreColumn(const Codes& codes, std::byte* v, const Runs& runs,
                                            int position) {
  auto* to = reinterpret_cast<Element*>(v) + position;
  constexpr int kPerWord = 4 / sizeof(Element);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int d = i < 8 ? runs.first + i : runs.second + i - 8;
    to[d * kPageSize] =
        static_cast<Element>(codes.word[i / kPerWord] >> (i % kPerWord * 8 * sizeof(Element)));
  }
}

// One token's column of V; clears the columns, and the scales, from `unwritten` on.
__device__ __forceinline__ void StoreValue(const AppendParams& p, int64_t slot, int head,
                                           const Runs& runs, const Codes& codes, int unwritten) {
  const int place = static_cast<int>(slot % kPageSize);
  std::byte* claim = Claim(p, slot);
  std::byte* v = claim + head * p.head_bytes + p.v_offset;
  const bool is_16bit = Is16Bit(p.v_format);
  if (is_16bit) {
    StoreColumn<uint16_t>(codes, v, runs, place);
  } else {
    StoreColumn<uint8_t>(codes, v, runs, PositionIn8Bit(place));
  }
#pragma unroll 1
  for (int other = unwritten; other < kPageSize; ++other) {
    if (is_16bit) {
      StoreColumn<uint16_t>({}, v, runs, other);
    } else {
      StoreColumn<uint8_t>({}, v, runs, PositionIn8Bit(other));
    }
    if (runs.first != 0) continue;
    if (IsDynamic(p.k_format))
      reinterpret_cast<float*>(claim + p.k_scales)[head * kPageSize + other] = 0;
    if (IsDynamic(p.v_format))
      reinterpret_cast<float*>(claim + p.v_scales)[head * kPageSize + other] = 0;
  }
}

// Room in shared memory: norm weights of q and k, then angles of each warp's token and its next.
template <int kHeadDim>
constexpr int kHeadsSharedBytes = (2 + 2 * kAppendWarps) * kHeadDim* int{sizeof(float)};

// Steps [begin, end), counted through all tokens, by one warp. All warps of the block call.
template <int kHeadDim, class Input>
__device__ __forceinline__ void AppendSteps(const AppendParams& p, int begin, int end,
                                            float* shared) {
  constexpr int kLanes = kHeadDim / 16;  // of one head
  constexpr int kHeads = 32 / kLanes;    // of a step
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int lane_head = static_cast<int>(threadIdx.x % 32) / kLanes;
  const Runs runs = RunsOf<kHeadDim>(lane, p.rotary_dim);
  const int lane_at = lane_head * kHeadDim + runs.first;
  const int k_begin = p.q_steps, v_begin = p.q_steps + p.k_steps;

  // What is loaded next.
  int load_token = begin / p.steps, load_step = begin % p.steps, loads = end - begin;
  auto load = [&] {
    const bool is_query = load_step < k_begin, is_key = load_step < v_begin;
    const int head = (load_step - (is_query ? 0 : is_key ? k_begin : v_begin)) * kHeads;
    const void* tensor = is_query ? p.q : is_key ? p.k : p.v;
    const int64_t stride = is_query ? p.q_stride : is_key ? p.k_stride : p.v_stride;
    const Input* from =
        static_cast<const Input*>(tensor) + load_token * stride + lane_at + head * kHeadDim;
    const bool active = loads > 0 && head + lane_head < (is_query ? p.heads : p.kv_heads);
    --loads;
    if (++load_step == p.steps) {
      load_step = 0;
      ++load_token;
    }
    return active ? Load<Input>(from, from + (runs.second - runs.first)) : Raw<Input>{};
  };

  int token = load_token, step = load_step;
  Raw<Input> next = load(), after = load();
  float* angles = shared + (2 + 2 * (threadIdx.x / 32)) * kHeadDim;
  auto fetch_angles = [&](int of, int buffer) {
    if (of < p.tokens) {
      for (int i = 4 * static_cast<int>(threadIdx.x % 32); i < p.rotary_dim; i += 128)
        CopyAsync16(angles + buffer * kHeadDim + i, p.cos_sin + int64_t{of} * p.rotary_dim + i);
    }
    CopyAsyncCommit();
  };
  const bool works = begin < end;
  int64_t slot = works ? p.slots[token] : -1;
  bool fp8 = works && p.fp8_queries != nullptr && p.fp8_queries[token] != 0;
  if (works) fetch_angles(token, token % 2);
  // A warp that has values has nothing else.
  const int which = p.tile == 0 && step >= v_begin ? 1 : 0;
  const float known_amax = KnownAmax(p, which);
  if (p.q_norm != nullptr || p.k_norm != nullptr) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kHeadDim; i += kAppendThreads) {
      if (p.q_norm != nullptr) shared[i] = __bfloat162float(p.q_norm[i]) + p.norm_offset;
      if (p.k_norm != nullptr) shared[kHeadDim + i] = __bfloat162float(p.k_norm[i]) + p.norm_offset;
    }
  }
  __syncthreads();

  Statistics statistics;
  for (int left = end - begin; left > 0;) {  // a token
    const int step_end = min(p.steps, step + left);
    left -= step_end - step;
    const bool more = left > 0;
    const int64_t next_slot = more ? p.slots[token + 1] : -1;
    const bool next_fp8 = more && p.fp8_queries != nullptr && p.fp8_queries[token + 1] != 0;
    __syncwarp();
    fetch_angles(more ? token + 1 : p.tokens, (token + 1) % 2);
    CopyAsyncWait<1>();
    __syncwarp();
    const float* token_angles = angles + token % 2 * kHeadDim;
#pragma unroll 1
    for (; step < step_end; ++step) {
      const bool is_query = step < k_begin, is_value = step >= v_begin;
      const int head = (step - (is_query ? 0 : is_value ? v_begin : k_begin)) * kHeads + lane_head;
      const bool active = head < (is_query ? p.heads : p.kv_heads);
      float x[16];
      Widen(next, x);
      next = after;
      after = load();
      if (slot < 0) continue;
      if (!is_value) {
        if ((is_query ? p.q_norm : p.k_norm) != nullptr)
          Normalise<kHeadDim>(shared + (is_query ? 0 : kHeadDim), p.norm_eps, runs, x);
        if (runs.rotated) Rotate(token_angles, p.rotary_dim, runs, x);
      }
      if (is_query) {
        StoreQuery<kHeadDim>(p, int64_t{token} * p.heads + head, active, runs, lane == 0, fp8, x);
        continue;
      }
      const KvFormat format = is_value ? p.v_format : p.k_format;
      float scale = 1;
      if (IsStaticFp8(format) && active) scale = (is_value ? p.v_scale : p.k_scale)[head];
      const Codes codes = Quantize<kLanes>(format, x, &scale, statistics);
      if (!active) continue;
      if (lane == 0 && IsDynamic(format)) {
        auto* scales =
            reinterpret_cast<float*>(Claim(p, slot) + (is_value ? p.v_scales : p.k_scales));
        scales[head * kPageSize + slot % kPageSize] = scale;
      }
      if (is_value) {
        StoreValue(p, slot, head, runs, codes, FirstUnwritten(p, token, slot));
      } else {
        StoreKey<kHeadDim>(p, slot, head, runs, codes);
      }
    }
    slot = next_slot;
    fp8 = next_fp8;
    ++token;
    step = 0;
  }
  Report(p, which, known_amax, statistics);
}

}  // namespace octavo::cuda
