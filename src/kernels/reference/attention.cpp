#include "kernels/reference/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/error.h"
#include "base/float_bits.h"

namespace octavo::reference {
namespace {

template <class T>
T Load(const void* p, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(p) + index * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

template <class T>
void Store(void* p, int64_t index, T value) {
  std::memcpy(static_cast<std::byte*>(p) + index * static_cast<int64_t>(sizeof(T)), &value,
              sizeof(T));
}

double Read(DType dtype, const void* p, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return Load<float>(p, index);
    case DType::kF16:
      return Float16::Decode(Load<uint16_t>(p, index));
    case DType::kBF16:
      return BF16ToFloat(Load<uint16_t>(p, index));
    case DType::kF8E4M3:
      return Fp8E4M3::Decode(Load<uint8_t>(p, index));
    case DType::kF8E5M2:
      return Fp8E5M2::Decode(Load<uint8_t>(p, index));
    case DType::kI8:
      return Load<int8_t>(p, index);
    default:
      break;
  }
  OCTAVO_CHECK(false, Name(dtype));
  return 0;
}

int8_t RoundToInt8(float x) {
  if (x != x) return 0;  // the scale of such a token is NaN
  return static_cast<int8_t>(std::clamp(std::nearbyint(x), -127.0f, 127.0f));
}

void Write(DType dtype, void* p, int64_t index, float x) {
  switch (dtype) {
    case DType::kF32:
      return Store(p, index, x);
    case DType::kF16:
      return Store(p, index, static_cast<uint16_t>(Float16::Encode(x)));
    case DType::kBF16:
      return Store(p, index, FloatToBF16(x));
    case DType::kF8E4M3:
      return Store(p, index, static_cast<uint8_t>(Fp8E4M3::Encode(x)));
    case DType::kF8E5M2:
      return Store(p, index, static_cast<uint8_t>(Fp8E5M2::Encode(x)));
    case DType::kI8:
      return Store(p, index, RoundToInt8(x));
    default:
      OCTAVO_CHECK(false, Name(dtype));
  }
}

double Read(const Tensor& tensor, int64_t row, int64_t column) {
  return Read(tensor.dtype, tensor.data, row * tensor.row_stride + column);
}

void Write(const Tensor& tensor, int64_t row, int64_t column, double x) {
  Write(tensor.dtype, tensor.data, row * tensor.row_stride + column, static_cast<float>(x));
}

// Norm and rotation of one head of one token.
std::vector<double> NormAndRotate(const Tensor& x, int token, int head, int head_dim,
                                  const Tensor& norm, const AppendArgs& args) {
  std::vector<double> row(head_dim);
  for (int d = 0; d < head_dim; ++d) row[d] = Read(x, token, int64_t{head} * head_dim + d);
  if (norm) {
    double squares = 0;
    for (double value : row) squares += value * value;
    const double inverse = 1.0 / std::sqrt(squares / head_dim + args.norm_eps);
    for (int d = 0; d < head_dim; ++d) row[d] *= inverse * (Read(norm, 0, d) + args.norm_offset);
  }
  if (args.cos_sin) {
    const int half = static_cast<int>(args.cos_sin.columns() / 2);
    for (int i = 0; i < half; ++i) {
      const double cos = Read(args.cos_sin, token, i), sin = Read(args.cos_sin, token, half + i);
      const double a = row[i], b = row[i + half];
      row[i] = a * cos - b * sin;
      row[i + half] = b * cos + a * sin;
    }
  }
  return row;
}

struct Statistics {
  uint64_t* saturated;
  float* amax;
};

bool RoundsBeyondLargest(KvFormat format, float x) {
  if (format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8PerTokenHead) {
    return std::abs(x) >
           464.0f;  // a tie between 448 and 480 goes to 448, whose significand is even
  }
  if (format == KvFormat::kFp8E5M2) return std::abs(x) >= 61440.0f;  // this tie goes to 65536
  return false;
}

// Quantises one head of one token; element d is stored at stride * d + offset. Dynamic scales go to
// *token_scale.
void Quantize(KvFormat format, const std::vector<double>& row, const float* static_scale,
              std::byte* to, int64_t stride, int64_t offset, std::byte* token_scale,
              Statistics statistics) {
  float scale = 1.0f;
  if (HasTokenScales(format)) {
    float amax = 0;
    bool finite = true;
    for (double x : row) {
      finite = finite && std::isfinite(static_cast<float>(x));
      amax = std::max(amax, std::abs(static_cast<float>(x)));
    }
    const bool is_int8 = format == KvFormat::kInt8PerTokenHead;
    scale = std::max(amax / (is_int8 ? 127.0f : kFp8E4M3Max), 1e-6f);
    if (!is_int8) scale = std::exp2(std::ceil(std::log2(scale)));
    if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
    Store(token_scale, 0, scale);
  } else if (static_scale) {
    scale = *static_scale;
  }
  for (size_t d = 0; d < row.size(); ++d) {
    const float x = static_cast<float>(row[d]);
    const float scaled = x / scale;
    Write(StorageDType(format), to, stride * static_cast<int64_t>(d) + offset, scaled);
    if (!std::isfinite(x)) continue;
    if (statistics.saturated && RoundsBeyondLargest(format, scaled)) ++*statistics.saturated;
    const float seen = std::abs(HasTokenScales(format) ? x : scaled);
    if (statistics.amax && std::isfinite(seen)) *statistics.amax = std::max(*statistics.amax, seen);
  }
}

bool HasStaticScale(KvFormat format) {
  return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
}

void AppendHead(const AppendArgs& args, int token, int head) {
  const KvLayout& layout = args.cache.layout;
  const int64_t slot = args.batch->slots.Row<int64_t>(0)[token];
  const int place = static_cast<int>(slot % kPageSize);
  std::byte* claim = args.cache.Claim(static_cast<uint32_t>(slot / kPageSize));
  std::byte* k = claim + layout.KOffset(head);
  std::byte* v = claim + layout.VOffset(head);
  std::byte* k_scales = claim + layout.KScaleOffset(head);
  std::byte* v_scales = claim + layout.VScaleOffset(head);
  if (place == 0) {
    std::memset(v, 0, static_cast<size_t>(layout.VBytes()));
    if (HasTokenScales(layout.k_format)) std::memset(k_scales, 0, kPageSize * sizeof(float));
    if (HasTokenScales(layout.v_format)) std::memset(v_scales, 0, kPageSize * sizeof(float));
  }
  const std::vector<double> key =
      NormAndRotate(args.k, token, head, layout.head_dim, args.k_norm, args);
  std::vector<double> value(layout.head_dim);
  for (int d = 0; d < layout.head_dim; ++d)
    value[d] = Read(args.v, token, int64_t{head} * layout.head_dim + d);

  const KvLayer& cache = args.cache;
  auto statistics = [&](int which) {
    return Statistics{cache.saturated ? cache.saturated + which : nullptr,
                      cache.amax ? cache.amax + which : nullptr};
  };
  Quantize(layout.k_format, key, HasStaticScale(layout.k_format) ? cache.k_scale + head : nullptr,
           k, 1, int64_t{place} * layout.head_dim, k_scales + place * sizeof(float), statistics(0));
  Quantize(layout.v_format, value, HasStaticScale(layout.v_format) ? cache.v_scale + head : nullptr,
           v, kPageSize, VPosition(layout.v_format, place), v_scales + place * sizeof(float),
           statistics(1));
}

// One key and one value of the cache, decoded and scaled.
struct Entry {
  std::vector<double> k, v;
};

Entry ReadEntry(const KvLayer& cache, uint32_t page, int place, int head) {
  const KvLayout& layout = cache.layout;
  const std::byte* claim = cache.Claim(page);
  double k_scale = 1, v_scale = 1;
  if (HasStaticScale(layout.k_format)) k_scale = cache.k_scale[head];
  if (HasStaticScale(layout.v_format)) v_scale = cache.v_scale[head];
  if (HasTokenScales(layout.k_format))
    k_scale = Load<float>(claim + layout.KScaleOffset(head), place);
  if (HasTokenScales(layout.v_format))
    v_scale = Load<float>(claim + layout.VScaleOffset(head), place);
  Entry entry{std::vector<double>(layout.head_dim), std::vector<double>(layout.head_dim)};
  for (int d = 0; d < layout.head_dim; ++d) {
    entry.k[d] = k_scale * Read(StorageDType(layout.k_format), claim + layout.KOffset(head),
                                int64_t{place} * layout.head_dim + d);
    entry.v[d] = v_scale * Read(StorageDType(layout.v_format), claim + layout.VOffset(head),
                                int64_t{d} * kPageSize + VPosition(layout.v_format, place));
  }
  return entry;
}

}  // namespace

void RopeTable(const RopeTableArgs& args) {
  const int64_t half = args.inv_freq.size();
  for (int64_t i = 0; i < args.positions.size(); ++i) {
    for (int64_t j = 0; j < half; ++j) {
      const double angle = static_cast<float>(args.positions.Row<int32_t>(0)[i]) *
                           args.inv_freq.Row<float>(0)[j];  // product in float32
      Write(args.cos_sin, static_cast<int64_t>(i), j, std::cos(angle) * args.scaling);
      Write(args.cos_sin, static_cast<int64_t>(i), half + j, std::sin(angle) * args.scaling);
    }
  }
}

void Append(const AppendArgs& args) {
  const int head_dim = args.cache.layout.head_dim;
  const Tensor& q_out = args.q_out ? args.q_out : args.q;
  for (int token = 0; token < args.batch->tokens; ++token) {
    if (args.batch->slots.Row<int64_t>(0)[token] < 0) continue;
    for (int head = 0; head < args.heads; ++head) {
      const std::vector<double> row =
          NormAndRotate(args.q, token, head, head_dim, args.q_norm, args);
      for (int d = 0; d < head_dim; ++d) Write(q_out, token, int64_t{head} * head_dim + d, row[d]);
    }
    for (int head = 0; head < args.cache.layout.kv_heads; ++head) AppendHead(args, token, head);
  }
}

void Attention(const AttentionArgs& args) {
  const BatchView& batch = *args.batch;
  const KvLayout& layout = args.cache.layout;
  const int head_dim = layout.head_dim;
  const int heads = static_cast<int>(args.q.columns() / head_dim);
  const int group = heads / layout.kv_heads;
  const int window = args.plan->shape().window;
  for (int sequence = 0; sequence < batch.sequences(); ++sequence) {
    const int tokens = batch.q_begin[sequence + 1] - batch.q_begin[sequence];
    for (int kv_head = 0; kv_head < layout.kv_heads; ++kv_head) {
      // Entries are decoded once for all queries; behind a window there may be no page.
      const int first = window > 0 ? std::max(0, batch.kv_len[sequence] - tokens - window + 1) : 0;
      std::vector<Entry> entries(std::max(0, batch.kv_len[sequence]));
      for (int t = first; t < batch.kv_len[sequence]; ++t) {
        const uint32_t page = batch.block_table.Row<uint32_t>(sequence)[t / kPageSize];
        entries[t] = ReadEntry(args.cache, page, t % kPageSize, kv_head);
      }
      for (int i = 0; i < tokens * group; ++i) {
        const int row = batch.q_begin[sequence] + i / group;
        const int head = kv_head * group + i % group;
        const int position = batch.kv_len[sequence] - tokens + i / group;
        const int begin = window > 0 ? std::max(0, position - window + 1) : 0;
        std::vector<double> q(head_dim);
        for (int d = 0; d < head_dim; ++d) q[d] = Read(args.q, row, int64_t{head} * head_dim + d);

        std::vector<double> scores;
        double max = -std::numeric_limits<double>::infinity();
        for (int t = begin; t <= position; ++t) {
          double s = 0;
          for (int d = 0; d < head_dim; ++d) s += q[d] * entries[t].k[d];
          s *= args.scale;
          if (args.soft_cap > 0) s = args.soft_cap * std::tanh(s / args.soft_cap);
          scores.push_back(s);
          if (!(s <= max)) max = s;  // NaN too
        }
        double denominator = 0;
        if (args.sinks) {
          const double sink = Read(args.sinks, 0, head);
          if (!(sink <= max)) max = sink;
          denominator = std::exp(sink - max);
        }
        std::vector<double> out(head_dim, 0.0);
        for (int t = begin; t <= position; ++t) {
          const double p = std::exp(scores[t - begin] - max);
          denominator += p;
          for (int d = 0; d < head_dim; ++d) out[d] += p * entries[t].v[d];
        }
        for (int d = 0; d < head_dim; ++d) {
          // A query that sees nothing (padding) yields zeros.
          Write(args.out, row, int64_t{head} * head_dim + d,
                scores.empty() ? 0.0 : out[d] / denominator);
        }
      }
    }
  }
}

}  // namespace octavo::reference
