// The append's arithmetic, one head row at a time: RMS norm, rotation, and the stored formats of
// base/float_bits.h.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "base/float_bits.h"
#include "kernels/cpu/append_kernels.h"
#include "kernels/cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/append_rows.cpp"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"
#include "kernels/cpu/attention_common-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {

using VI = hn::Vec<DI>;

// ---- encoding

// Codes of a SmallFloat (base/float_bits.h), the same bits.
template <class Format, int kExponentBits, int kMantissaBits>
HWY_INLINE VI EncodeSmallFloat(VF x) {
  const DF d;
  const DI di;
  constexpr int kShift = 23 - kMantissaBits;
  constexpr int32_t kSmallestNormal = (127 + 1 - Format::kBias) << 23;
  // Adding this to a magnitude below the smallest normal rounds it to a multiple of the smallest
  // subnormal.
  constexpr int32_t kMagic = (127 + 1 - Format::kBias + kShift) << 23;
  const VI bits = hn::BitCast(di, x);
  const VI magnitude = hn::And(bits, hn::Set(di, 0x7FFFFFFF));
  const VI sign = hn::ShiftLeft<kExponentBits + kMantissaBits>(
      hn::BitCast(di, hn::ShiftRight<31>(hn::BitCast(hn::RebindToUnsigned<DI>(), bits))));

  const VI odd = hn::And(hn::ShiftRight<kShift>(magnitude), hn::Set(di, 1));
  const VI rounded = hn::Add(hn::Add(magnitude, hn::Set(di, (1 << (kShift - 1)) - 1)), odd);
  const VI normal =
      hn::Sub(hn::ShiftRight<kShift>(rounded), hn::Set(di, (127 - Format::kBias) << kMantissaBits));
  const VF sum = hn::Add(hn::BitCast(d, magnitude), hn::BitCast(d, hn::Set(di, kMagic)));
  const VI subnormal = hn::Sub(hn::BitCast(di, sum), hn::Set(di, kMagic));

  VI code = hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, kSmallestNormal)), subnormal, normal);
  const int32_t max_finite = Format::kMaxFinite;
  const int32_t overflow =
      static_cast<int32_t>(Format::Encode(std::numeric_limits<float>::infinity()));
  code = hn::IfThenElse(hn::Gt(code, hn::Set(di, max_finite)), hn::Set(di, overflow), code);
  code = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7F800000)),
                        hn::Set(di, int32_t{Format::kNaN}), code);
  return hn::Or(code, sign);
}

// An encoder stores kLanes codes. kLargest: a finite value beyond it would overflow if it did not
// saturate.
struct StoreF32 {
  using T = float;
  static constexpr float kLargest = std::numeric_limits<float>::infinity();
  static HWY_INLINE void Store(VF x, T* to) { hn::StoreU(x, DF(), to); }
};

struct StoreF16 {
  using T = uint16_t;
  static constexpr float kLargest = std::numeric_limits<float>::infinity();
  static HWY_INLINE void Store(VF x, T* to) {
    const hn::Rebind<uint16_t, DF> d16;
    hn::StoreU(hn::DemoteTo(d16, EncodeSmallFloat<Float16, 5, 10>(x)), d16, to);
  }
};

struct StoreBF16 {
  using T = uint16_t;
  static constexpr float kLargest = std::numeric_limits<float>::infinity();
  static HWY_INLINE void Store(VF x, T* to) {
    const hn::RebindToUnsigned<DF> du;
    const hn::Rebind<uint16_t, DF> d16;
    const auto bits = hn::BitCast(du, x);
    const auto high = hn::ShiftRight<16>(bits);
    const auto rounded = hn::ShiftRight<16>(
        hn::Add(hn::Add(bits, hn::Set(du, 0x7FFF)), hn::And(high, hn::Set(du, 1))));
    const auto nan = hn::RebindMask(du, hn::IsNaN(x));
    const auto code = hn::IfThenElse(nan, hn::Or(high, hn::Set(du, 0x40)), rounded);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(DI(), code)), d16, to);
  }
};

struct StoreF8E4M3 {
  using T = uint8_t;
  static constexpr float kLargest = 464.0f;  // halfway to 480; this tie goes down, to the even 448
  static HWY_INLINE void Store(VF x, T* to) {
    const hn::Rebind<uint8_t, DF> d8;
    hn::StoreU(hn::DemoteTo(d8, EncodeSmallFloat<Fp8E4M3, 4, 3>(x)), d8, to);
  }
};

struct StoreF8E5M2 {
  using T = uint8_t;
  // Just below 61440, halfway to 65536: that tie goes up.
  static constexpr float kLargest = 0x1.dffffep15f;
  static HWY_INLINE void Store(VF x, T* to) {
    const hn::Rebind<uint8_t, DF> d8;
    hn::StoreU(hn::DemoteTo(d8, EncodeSmallFloat<Fp8E5M2, 5, 2>(x)), d8, to);
  }
};

struct StoreI8 {
  using T = int8_t;
  // Never: the scale is the row's own.
  static constexpr float kLargest = std::numeric_limits<float>::infinity();
  static HWY_INLINE void Store(VF x, T* to) {
    const DF d;
    const hn::Rebind<int8_t, DF> d8;
    const VF number = hn::IfThenZeroElse(hn::IsNaN(x), x);  // the scale is NaN
    const VF clamped = hn::Min(hn::Max(number, hn::Set(d, -127.0f)), hn::Set(d, 127.0f));
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(clamped)), d8, to);
  }
};

// What was seen while encoding one head of a run.
struct Statistics {
  uint64_t saturated = 0;
  float amax = 0;
};

// to[i] = encode(x[i] / scale) for i in [0, count); x is padded with zeros to whole vectors, and so
// may `to` be.
template <class Store>
void EncodeRow(const float* x, size_t count, float scale, bool dynamic, void* to,
               Statistics& statistics) {
  const DF d;
  const VF divisor = hn::Set(d, scale);
  VF amax = hn::Zero(d);
  for (size_t i = 0; i < count; i += kLanes) {
    const VF value = hn::Load(d, x + i);
    const VF scaled = hn::Div(value, divisor);
    Store::Store(scaled, static_cast<typename Store::T*>(to) + i);
    const VF magnitude = hn::Abs(scaled);
    const auto beyond =
        hn::And(hn::Gt(magnitude, hn::Set(d, Store::kLargest)), hn::IsFinite(value));
    statistics.saturated += hn::CountTrue(d, beyond);
    const VF seen = dynamic ? hn::Abs(value) : magnitude;
    amax = hn::Max(amax, hn::IfThenElseZero(hn::IsFinite(seen), seen));
  }
  statistics.amax = std::max(statistics.amax, hn::GetLane(hn::MaxOfLanes(d, amax)));
}

using EncodeFunction = void (*)(const float*, size_t, float, bool, void*, Statistics&);

EncodeFunction Encoder(KvFormat format) {
  switch (StorageDType(format)) {
    case DType::kF32:
      return EncodeRow<StoreF32>;
    case DType::kF16:
      return EncodeRow<StoreF16>;
    case DType::kBF16:
      return EncodeRow<StoreBF16>;
    case DType::kF8E4M3:
      return EncodeRow<StoreF8E4M3>;
    case DType::kF8E5M2:
      return EncodeRow<StoreF8E5M2>;
    default:
      return EncodeRow<StoreI8>;
  }
}

// The scale of one token and head. NaN if an element is not finite, so that it shows in whatever
// reads the token: int8 has no code for it.
float DynamicScale(KvFormat format, const float* x, size_t count) {
  const DF d;
  VF amax = hn::Zero(d);
  auto finite = hn::IsFinite(amax);
  for (size_t i = 0; i < count; i += kLanes) {
    const VF value = hn::Load(d, x + i);
    finite = hn::And(finite, hn::IsFinite(value));
    amax = hn::Max(amax, hn::Abs(value));
  }
  if (!hn::AllTrue(d, finite)) return std::numeric_limits<float>::quiet_NaN();
  const bool is_int8 = format == KvFormat::kInt8PerTokenHead;
  const float largest = is_int8 ? 127.0f : kFp8E4M3Max;
  const float scale = std::max(hn::GetLane(hn::MaxOfLanes(d, amax)) / largest, 1e-6f);
  return is_int8 ? scale : PowerOfTwoAtLeast(scale);
}

// ---- rows

void LoadHead(const Tensor& x, int row, int head, int head_dim, float* to) {
  const int64_t first = int64_t{head} * head_dim;
  if (x.dtype == DType::kF32) {
    std::copy_n(x.Row<float>(row) + first, head_dim, to);
  } else {
    const uint16_t* from = x.Row<uint16_t>(row) + first;
    for (int i = 0; i < head_dim; ++i) to[i] = BF16ToFloat(from[i]);
  }
  std::fill(to + head_dim, to + AlignRow(head_dim), 0.0f);
}

void StoreHead(const float* from, const Tensor& x, int row, int head, int head_dim) {
  const int64_t first = int64_t{head} * head_dim;
  if (x.dtype == DType::kF32) {
    std::copy_n(from, head_dim, x.Row<float>(row) + first);
  } else {
    uint16_t* to = x.Row<uint16_t>(row) + first;
    for (int i = 0; i < head_dim; ++i) to[i] = FloatToBF16(from[i]);
  }
}

void NormAndRotate(const AppendArgs& args, const std::vector<float>& weight, int row, float* x) {
  const DF d;
  const int head_dim = args.cache.layout.head_dim;
  if (!weight.empty()) {
    VF squares = hn::Zero(d);
    for (int i = 0; i < head_dim; i += static_cast<int>(kLanes)) {
      const VF value = hn::Load(d, x + i);
      squares = hn::MulAdd(value, value, squares);
    }
    const float mean = hn::GetLane(TreeSum(squares)) / static_cast<float>(head_dim);
    const float inverse = 1.0f / std::sqrt(mean + args.norm_eps);
    for (int i = 0; i < head_dim; ++i) x[i] = x[i] * inverse * weight[i];
  }
  if (args.cos_sin) {
    const int half = static_cast<int>(args.cos_sin.columns() / 2);
    const float* cos = args.cos_sin.Row<float>(row);
    const float* sin = cos + half;
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

void Queries(const AppendJob& job, int begin, int end) {
  const AppendArgs& args = *job.args;
  const int head_dim = args.cache.layout.head_dim;
  const Tensor& q_out = args.q_out ? args.q_out : args.q;
  if (job.q_weight.empty() && !args.cos_sin && q_out.data == args.q.data) return;
  HWY_ALIGN float x[kMaxHeadDim];
  for (int row = begin; row < end; ++row) {
    if (args.batch->slots.Row<int64_t>(0)[row] < 0) continue;
    for (int head = 0; head < args.heads; ++head) {
      LoadHead(args.q, row, head, head_dim, x);
      NormAndRotate(args, job.q_weight, row, x);
      StoreHead(x, q_out, row, head, head_dim);
    }
  }
}

// Where a head's elements of one token go, and by which scale.
struct Target {
  KvFormat format;
  EncodeFunction encode;
  const float* static_scale;  // null: none
  float* token_scales;        // [kPageSize] in the page; null: none

  Target(KvFormat format, const float* scales, int head, std::byte* token_scales)
      : format(format), encode(Encoder(format)), static_scale(nullptr), token_scales(nullptr) {
    if (format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2) {
      OCTAVO_CHECK(scales != nullptr, Name(format));
      static_scale = scales + head;
    }
    if (HasTokenScales(format)) this->token_scales = reinterpret_cast<float*>(token_scales);
  }

  void Write(const float* x, int head_dim, int place, void* to, Statistics& statistics) const {
    float scale = static_scale ? *static_scale : 1.0f;
    if (token_scales) scale = token_scales[place] = DynamicScale(format, x, head_dim);
    encode(x, head_dim, scale, token_scales != nullptr, to, statistics);
  }
};

void Report(const KvLayer& cache, int which, const Statistics& statistics) {
  if (cache.saturated && statistics.saturated > 0) {
    std::atomic_ref(cache.saturated[which])
        .fetch_add(statistics.saturated, std::memory_order_relaxed);
  }
  if (!cache.amax) return;
  std::atomic_ref amax(cache.amax[which]);
  float seen = amax.load(std::memory_order_relaxed);
  while (statistics.amax > seen &&
         !amax.compare_exchange_weak(seen, statistics.amax, std::memory_order_relaxed)) {
  }
}

// Element d of token i of codes [count, stride] to row d of V, at the place of token first + i.
template <class T>
void ScatterValues(const T* codes, int stride, int count, int head_dim, KvFormat format, int first,
                   std::byte* v) {
  int position[kPageSize];
  for (int i = 0; i < count; ++i) position[i] = VPosition(format, first + i);
  T* row = reinterpret_cast<T*>(v);
  for (int d = 0; d < head_dim; ++d, row += kPageSize) {
    for (int i = 0; i < count; ++i) row[position[i]] = codes[i * stride + d];
  }
}

void KeysAndValues(const AppendJob& job, const AppendRun& run, int head) {
  const AppendArgs& args = *job.args;
  const KvLayer& cache = args.cache;
  const KvLayout& layout = cache.layout;
  const int head_dim = layout.head_dim;
  std::byte* claim = cache.Claim(run.page);
  std::byte* k = claim + layout.KOffset(head);
  std::byte* v = claim + layout.VOffset(head);
  const Target keys(layout.k_format, cache.k_scale, head, claim + layout.KScaleOffset(head));
  const Target values(layout.v_format, cache.v_scale, head, claim + layout.VScaleOffset(head));
  if (run.place == 0) {
    std::memset(v, 0, static_cast<size_t>(layout.VBytes()));
    if (keys.token_scales) std::fill_n(keys.token_scales, kPageSize, 0.0f);
    if (values.token_scales) std::fill_n(values.token_scales, kPageSize, 0.0f);
  }

  const int64_t stride = AlignRow(head_dim);
  const int k_size = ElementSize(layout.k_format), v_size = ElementSize(layout.v_format);
  HWY_ALIGN float x[kMaxHeadDim];
  HWY_ALIGN uint8_t code[kMaxHeadDim * sizeof(float)];
  constexpr int kBatch = 8;  // tokens whose V codes are transposed together
  HWY_ALIGN uint8_t codes[kBatch * kMaxHeadDim * sizeof(float)];
  Statistics k_statistics, v_statistics;
  for (int first = 0; first < run.count; first += kBatch) {
    const int count = std::min(kBatch, run.count - first);
    for (int i = 0; i < count; ++i) {
      const int row = run.row + first + i, place = run.place + first + i;
      LoadHead(args.k, row, head, head_dim, x);
      NormAndRotate(args, job.k_weight, row, x);
      keys.Write(x, head_dim, place, code, k_statistics);
      std::memcpy(k + int64_t{place} * head_dim * k_size, code,
                  static_cast<size_t>(head_dim * k_size));
      LoadHead(args.v, row, head, head_dim, x);
      values.Write(x, head_dim, place, codes + i * stride * v_size, v_statistics);
    }
    const int place = run.place + first;
    if (v_size == 1) {
      ScatterValues(codes, stride, count, head_dim, layout.v_format, place, v);
    } else if (v_size == 2) {
      ScatterValues(reinterpret_cast<uint16_t*>(codes), stride, count, head_dim, layout.v_format,
                    place, v);
    } else {
      ScatterValues(reinterpret_cast<float*>(codes), stride, count, head_dim, layout.v_format,
                    place, v);
    }
  }
  Report(cache, 0, k_statistics);
  Report(cache, 1, v_statistics);
}

void Elements(KvFormat format, const float* x, int count, float scale, void* to) {
  const EncodeFunction encode = Encoder(format);
  HWY_ALIGN float padded[kLanes];
  HWY_ALIGN uint8_t codes[kLanes * sizeof(float)];
  const int size = ElementSize(format);
  Statistics statistics;
  for (int i = 0; i < count; i += static_cast<int>(kLanes)) {
    const int n = std::min(count - i, static_cast<int>(kLanes));
    std::fill_n(padded, kLanes, 0.0f);
    std::copy_n(x + i, n, padded);
    encode(padded, kLanes, scale, false, codes, statistics);
    std::memcpy(static_cast<std::byte*>(to) + int64_t{i} * size, codes,
                static_cast<size_t>(n * size));
  }
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {

HWY_EXPORT(Queries);
HWY_EXPORT(KeysAndValues);
HWY_EXPORT(Elements);

void AppendQueries(const AppendJob& job, int begin, int end) {
  HWY_DYNAMIC_DISPATCH(Queries)(job, begin, end);
}

void AppendKeysAndValues(const AppendJob& job, const AppendRun& run, int head) {
  HWY_DYNAMIC_DISPATCH(KeysAndValues)(job, run, head);
}

void EncodeElements(KvFormat format, const float* x, int count, float scale, void* to) {
  HWY_DYNAMIC_DISPATCH(Elements)(format, x, count, scale, to);
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
