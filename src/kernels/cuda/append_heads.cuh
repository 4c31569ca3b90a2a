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

__device__ __forceinline__ void Load8(const float* from, float (&x)[8]) {
  const auto a = *reinterpret_cast<const float4*>(from),
             b = *reinterpret_cast<const float4*>(from + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// The weights of a lane's runs, in shared memory, the offset already added.
template <int kHeadDim>
__device__ __forceinline__ void Normalise(const float* first, const float* second, float eps,
                                          float (&x)[16]) {
  float parts[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) parts[i % 4] = fmaf(x[i], x[i], parts[i % 4]);
  float squares = (parts[0] + parts[1]) + (parts[2] + parts[3]);
#pragma unroll
  for (int step = kHeadDim / 32; step > 0; step /= 2)
    squares += __shfl_xor_sync(0xFFFFFFFF, squares, step);
  const float inverse = ReciprocalRoot(squares * (1.0f / kHeadDim) + eps);
  float w[8];
  Load8(first, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= inverse * w[i];
  Load8(second, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i + 8] *= inverse * w[i];
}

__device__ __forceinline__ void Rotate(const float* cosines, const float* sines, float (&x)[16]) {
  float cos[8], sin[8];
  Load8(cosines, cos);
  Load8(sines, sin);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = x[i], b = x[i + 8];
    x[i] = a * cos[i] - b * sin[i];
    x[i + 8] = b * cos[i] + a * sin[i];
  }
}

// Queries go to element `at` of q_out or q_fp8, where heads lie one behind another.
__device__ __forceinline__ void StoreQuery(const AppendParams& p, int64_t at, const Runs& runs,
                                           const float (&x)[16]) {
  Codes codes;
#pragma unroll
  for (int i = 0; i < 8; ++i) codes.word[i] = PackBF16(x[2 * i], x[2 * i + 1]);
  __nv_bfloat16* to = p.q_out + at;
  StoreCodes(codes, true, to + runs.first, to + runs.second);
}

template <int kHeadDim>
__device__ __forceinline__ void StoreQueryFp8(const AppendParams& p, int64_t at, bool active,
                                              const Runs& runs, bool leads, float (&x)[16]) {
  const float scale = DynamicScale(MaxOverLanes<kHeadDim / 16>(LargestMagnitude(x)), false);
  const float reciprocal = Reciprocal(scale);
  if (!active) return;
  Codes codes;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes.word[i] = PackE4M3(x[4 * i] * reciprocal, x[4 * i + 1] * reciprocal,
                             x[4 * i + 2] * reciprocal, x[4 * i + 3] * reciprocal);
  }
  uint8_t* to = p.q_fp8 + at;
  StoreCodes(codes, false, to + runs.first, to + runs.second);
  if (leads) p.q_scale[at / kHeadDim] = scale;
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

template <class Element>
__device__ __forceinline__ void ClearColumns(std::byte* v, const Runs& runs, int unwritten) {
  constexpr int kPerVector = 16 / sizeof(Element), kRowBytes = kPageSize * sizeof(Element);
  for (; unwritten % kPerVector != 0; ++unwritten) {
    StoreColumn<Element>({}, v, runs, sizeof(Element) == 2 ? unwritten : PositionIn8Bit(unwritten));
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    std::byte* row = v + (i < 8 ? runs.first + i : runs.second + i - 8) * kRowBytes;
    for (int token = unwritten; token < kPageSize; token += kPerVector)
      *reinterpret_cast<uint4*>(row + token * sizeof(Element)) = make_uint4(0, 0, 0, 0);
  }
}

// One token's column of V; clears the columns, and the scales, from `unwritten` on.
__device__ __forceinline__ void StoreValue(const AppendParams& p, int64_t slot, int head,
                                           const Runs& runs, const Codes& codes, int unwritten) {
  const int place = static_cast<int>(slot % kPageSize);
  std::byte* claim = Claim(p, slot);
  std::byte* v = claim + head * p.head_bytes + p.v_offset;
  if (Is16Bit(p.v_format)) {
    StoreColumn<uint16_t>(codes, v, runs, place);
    if (unwritten < kPageSize) ClearColumns<uint16_t>(v, runs, unwritten);
  } else {
    StoreColumn<uint8_t>(codes, v, runs, PositionIn8Bit(place));
    if (unwritten < kPageSize) ClearColumns<uint8_t>(v, runs, unwritten);
  }
  if (runs.first != 0) return;
  for (; unwritten < kPageSize; ++unwritten) {
    if (IsDynamic(p.k_format))
      reinterpret_cast<float*>(claim + p.k_scales)[head * kPageSize + unwritten] = 0;
    if (IsDynamic(p.v_format))
      reinterpret_cast<float*>(claim + p.v_scales)[head * kPageSize + unwritten] = 0;
  }
}

// A lane's loads, in the order of the steps [begin, begin + count).
template <int kHeadDim, class Input>
class StepLoader {
 public:
  static constexpr int kHeads = 512 / kHeadDim;  // of a step

  __device__ __forceinline__ StepLoader(const AppendParams& p, const Runs& runs, int lane_head,
                                        int begin, int count)
      : p_(p),
        lane_at_(lane_head * kHeadDim + runs.first),
        second_(runs.second - runs.first),
        lane_head_(lane_head),
        token_(begin / p.steps),
        count_(count) {
    const int step = begin % p.steps;
    tensor_ = step < p.q_steps ? 0 : step < p.q_steps + p.k_steps ? 1 : 2;
    Enter(step - (tensor_ == 0 ? 0 : tensor_ == 1 ? p.q_steps : p.q_steps + p.k_steps));
  }
  // Zeros behind the last step and for heads that are not there.
  __device__ __forceinline__ Raw<Input> Next() {
    if (left_ == 0) {
      if (++tensor_ == (p_.tile == 0 ? 3 : 2)) {
        tensor_ = 0;
        ++token_;
      }
      Enter(0);
    }
    --left_;
    const bool active = lane_head_ < heads_left_;
    heads_left_ -= kHeads;
    const Input* from = at_;
    at_ += kHeads * kHeadDim;
    return active ? Load<Input>(from, from + second_) : Raw<Input>{};
  }

 private:
  // The current tensor of the current token, from its step `step` on.
  __device__ __forceinline__ void Enter(int step) {
    const void* tensor = tensor_ == 0 ? p_.q : tensor_ == 1 ? p_.k : p_.v;
    const int64_t stride = tensor_ == 0 ? p_.q_stride : tensor_ == 1 ? p_.k_stride : p_.v_stride;
    at_ =
        static_cast<const Input*>(tensor) + token_ * stride + step * (kHeads * kHeadDim) + lane_at_;
    left_ = min((tensor_ == 0 ? p_.q_steps : p_.k_steps) - step, count_);
    heads_left_ = count_ == 0 ? 0 : (tensor_ == 0 ? p_.heads : p_.kv_heads) - step * kHeads;
    if (left_ == 0) left_ = 1 << 30;
    count_ -= min(left_, count_);
  }

  const AppendParams& p_;
  const Input* at_;
  int lane_at_, second_, lane_head_;
  int tensor_, token_, count_;
  int left_, heads_left_;  // of the tensor
};

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
  int left = max(0, end - begin);
  StepLoader<kHeadDim, Input> loader(p, runs, lane_head, begin, left);
  Raw<Input> next = loader.Next(), after = loader.Next();

  int token = begin / p.steps, step = begin % p.steps;
  float* angles = shared + (2 + 2 * (threadIdx.x / 32)) * kHeadDim;
  auto fetch_angles = [&](int of, bool wanted) {
    if (wanted) {
#pragma unroll 1
      for (int i = 4 * static_cast<int>(threadIdx.x % 32); i < p.rotary_dim; i += 128) {
        CopyAsync16(angles + of % 2 * kHeadDim + i, p.cos_sin + int64_t{of} * p.rotary_dim + i);
      }
    }
    CopyAsyncCommit();
  };
  int64_t slot = -1;
  bool fp8 = false;
  auto enter_token = [&] {
    slot = p.slots[token];
    fp8 = p.fp8_queries != nullptr && p.fp8_queries[token] != 0;
  };
  if (left > 0) enter_token();
  fetch_angles(token, left > 0);
  // A warp that has values has nothing else.
  const int which = p.tile == 0 && step >= p.q_steps + p.k_steps ? 1 : 0;
  const float known_amax = KnownAmax(p, which);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kHeadDim; i += kAppendThreads) {
    if (p.q_norm != nullptr) shared[i] = __bfloat162float(p.q_norm[i]) + p.norm_offset;
    if (p.k_norm != nullptr) shared[kHeadDim + i] = __bfloat162float(p.k_norm[i]) + p.norm_offset;
  }
  __syncthreads();
  const float *first_weight = shared + runs.first, *second_weight = shared + runs.second;

  Statistics statistics;
  while (left > 0) {  // a token
    const int step_end = min(p.steps, step + left);
    left -= step_end - step;
    __syncwarp();
    fetch_angles(token + 1, left > 0);
    CopyAsyncWait<1>();
    __syncwarp();
    const float* cosines = angles + token % 2 * kHeadDim + runs.first;
    const float* sines = cosines + p.rotary_dim / 2;
    auto advance = [&](float(&x)[16]) {
      Widen(next, x);
      next = after;
      after = loader.Next();
    };

    const int q_end = min(step_end, p.q_steps);
    int head = step * kHeads + lane_head;
    int64_t at = (int64_t{token} * p.heads + head) * kHeadDim;
#pragma unroll 1
    for (; step < q_end; ++step, head += kHeads, at += kHeads * kHeadDim) {
      float x[16];
      advance(x);
      if (slot < 0) continue;
      if (p.q_norm != nullptr) Normalise<kHeadDim>(first_weight, second_weight, p.norm_eps, x);
      if (runs.rotated) Rotate(cosines, sines, x);
      if (fp8) {
        StoreQueryFp8<kHeadDim>(p, at, head < p.heads, runs, lane == 0, x);
      } else if (head < p.heads) {
        StoreQuery(p, at, runs, x);
      }
    }
#pragma unroll 1
    for (; step < step_end; ++step) {
      const bool is_value = step >= p.q_steps + p.k_steps;
      float x[16];
      advance(x);
      if (slot < 0) continue;
      if (!is_value) {
        if (p.k_norm != nullptr)
          Normalise<kHeadDim>(first_weight + kHeadDim, second_weight + kHeadDim, p.norm_eps, x);
        if (runs.rotated) Rotate(cosines, sines, x);
      }
      const int kv_head = (step - p.q_steps - (is_value ? p.k_steps : 0)) * kHeads + lane_head;
      const KvFormat format = is_value ? p.v_format : p.k_format;
      float scale = 1;
      if (IsStaticFp8(format) && kv_head < p.kv_heads)
        scale = (is_value ? p.v_scale : p.k_scale)[kv_head];
      const Codes codes = Quantize<kLanes>(format, x, &scale, statistics);
      if (kv_head >= p.kv_heads) continue;
      if (lane == 0 && IsDynamic(format)) {
        auto* scales =
            reinterpret_cast<float*>(Claim(p, slot) + (is_value ? p.v_scales : p.k_scales));
        scales[kv_head * kPageSize + slot % kPageSize] = scale;
      }
      if (is_value) {
        StoreValue(p, slot, kv_head, runs, codes, FirstUnwritten(p, token, slot));
      } else {
        StoreKey<kHeadDim>(p, slot, kv_head, runs, codes);
      }
    }
    ++token;
    step = 0;
    if (left > 0) enter_token();
  }
  Report(p, which, known_amax, statistics);
}

}  // namespace octavo::cuda
