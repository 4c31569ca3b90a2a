#include "cuda_batch.h"

#include <cmath>
#include <numeric>
#include <random>

#include "base/float_bits.h"
#include "cuda_oracle.h"

namespace octavo::conformance {
namespace {

constexpr int kSpareRows = 3;  // that a plan allows and no step uses

}  // namespace

DeviceCache::DeviceCache(const CacheSpec& spec)
    : spec_(spec),
      layout_{spec.k_format, spec.v_format, spec.kv_heads, spec.head_dim},
      page_bytes_(layout_.ClaimBytes() + 2 * kPageUnit) {
  int64_t tokens = 0, pages = 0;
  for (int length : spec.lengths) {
    first_row_.push_back(tokens);
    tokens += length;
    const int64_t count = (length + kPageSize - 1) / kPageSize;
    pages += count;
    stride_ = std::max(stride_, count);
  }
  stride_ += 1;
  std::vector<uint32_t> order(pages + 3);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937_64 random(spec.seed);
  std::shuffle(order.begin(), order.end(), random);
  host_table_.assign(stride_ * std::max<size_t>(1, spec.lengths.size()), kNoPage);
  size_t next = 0;
  for (size_t s = 0; s < spec.lengths.size(); ++s) {
    for (int64_t p = 0; p * kPageSize < spec.lengths[s]; ++p)
      host_table_[s * stride_ + p] = order[next++] * static_cast<uint32_t>(page_bytes_ / kPageUnit);
  }
  arena_ = DeviceBuffer(order.size() * page_bytes_);
  table_ = DeviceBuffer(host_table_);
  std::vector<float> k_scale, v_scale;
  for (int head = 0; head < spec.kv_heads; ++head) {
    k_scale.push_back(0.0125f * (1 + 0.03f * head));
    v_scale.push_back(0.0125f * (1 + 0.05f * head));
  }
  k_scale_ = DeviceBuffer(k_scale);
  v_scale_ = DeviceBuffer(v_scale);
  saturated_ = DeviceBuffer(std::vector<uint64_t>(2));

  const int64_t row = int64_t{spec.kv_heads} * spec.head_dim;
  k_ = DeviceBuffer(tokens * row * 2);  // 0xFF: NaN
  v_ = DeviceBuffer(tokens * row * 2);
  std::vector<Tokens> everything;
  for (size_t s = 0; s < spec.lengths.size(); ++s)
    everything.push_back({static_cast<int>(s), 0, spec.lengths[s]});
  const DeviceBuffer nowhere(tokens * row * 2);
  const cuda::AppendCall call{.tokens = static_cast<int>(tokens),
                              .heads = spec.kv_heads,
                              .q = k_.as<void>(),
                              .q_stride = row,
                              .q_out = nowhere.as<void>()};
  Append(everything, call);
  FillNormal(k_.as<void>(), tokens * row, 2 * spec.seed, 0, 0, 1);
  FillNormal(v_.as<void>(), tokens * row, 2 * spec.seed + 1, 0, spec.v_mean, 1);
  if (spec.nan_sequence >= 0) {
    const int64_t first = first_row_[spec.nan_sequence];
    // Kernels do not treat all keys of a tile alike.
    const int key = 3 + 8 * static_cast<int>(spec.seed % 6);
    if (spec.lengths[spec.nan_sequence] > key)
      OCTAVO_CUDA(cudaMemset(k_.as<uint16_t>() + (first + key) * row, 0xFF, row));
    if (spec.lengths[spec.nan_sequence] > 70)
      OCTAVO_CUDA(cudaMemset(v_.as<uint16_t>() + (first + 70) * row, 0xFF, row));
  }
  Append(everything, call);
  OCTAVO_CUDA(cudaDeviceSynchronize());
}

KvLayer DeviceCache::layer() const {
  return {.layout = layout_,
          .arena = arena_.as<std::byte>(),
          .claim_offset = kPageUnit,
          .k_scale = k_scale_.as<float>(),
          .v_scale = v_scale_.as<float>(),
          .saturated = saturated_.as<uint64_t>()};
}

void DeviceCache::Append(const std::vector<Tokens>& ranges, cuda::AppendCall call) const {
  std::vector<int64_t> slots;
  for (const Tokens& range : ranges) {
    for (int t = range.begin; t < range.end; ++t) {
      const int64_t page = host_table_[range.sequence * stride_ + t / kPageSize];
      slots.push_back(page * kPageSize + t % kPageSize);
    }
  }
  if (slots.empty()) return;
  const int64_t row = int64_t{spec_.kv_heads} * spec_.head_dim;
  const DeviceBuffer device_slots(slots);
  const DeviceBuffer k(slots.size() * row * 2), v(slots.size() * row * 2);
  int64_t at = 0;
  for (const Tokens& range : ranges) {
    const int64_t count = (range.end - range.begin) * row;
    const int64_t from = (first_row_[range.sequence] + range.begin) * row;
    OCTAVO_CUDA(cudaMemcpy(k.as<uint16_t>() + at, k_.as<uint16_t>() + from, count * 2,
                           cudaMemcpyDeviceToDevice));
    OCTAVO_CUDA(cudaMemcpy(v.as<uint16_t>() + at, v_.as<uint16_t>() + from, count * 2,
                           cudaMemcpyDeviceToDevice));
    at += count;
  }
  call.k = k.as<void>();
  call.v = v.as<void>();
  call.k_stride = call.v_stride = row;
  call.slots = device_slots.as<int64_t>();
  call.cache = layer();
  cuda::Append(call, nullptr);
  OCTAVO_CUDA(cudaDeviceSynchronize());
}

DeviceStep::DeviceStep(const DeviceCache& cache, const StepSpec& spec)
    : cache_(cache), spec_(spec), heads_(spec.group * cache.spec().kv_heads) {
  const CacheSpec& c = cache.spec();
  q_begin_.push_back(0);
  int longest = 0;
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    q_begin_.push_back(q_begin_.back() + spec.tokens[s]);
    kv_len_.push_back(c.lengths[s]);
    longest = std::max(longest, spec.tokens[s]);
  }
  rows_ = q_begin_.back();
  shape_ = {heads_, c.kv_heads, c.head_dim, spec.window};
  plan_ = std::make_unique<cuda::AttentionPlan>(
      shape_, c.k_format, c.v_format,
      cuda::AttentionLimits{.tokens = rows_ + kSpareRows,
                            .sequences = static_cast<int>(c.lengths.size()) + 1,
                            .sequence_tokens = std::max(1, longest),
                            .kv_tokens = std::max(1, *std::ranges::max_element(c.lengths))},
      cuda::AttentionPlan::Options{.math = spec.math,
                                   .soft_cap = spec.soft_cap > 0,
                                   .deterministic = spec.deterministic,
                                   .widened_bytes = spec.widened_bytes});
  const int64_t elements = int64_t{rows_ + kSpareRows} * heads_ * c.head_dim;
  q_ = DeviceBuffer(elements * 2);
  q_out_ = DeviceBuffer(elements * 2);
  q_fp8_ = DeviceBuffer(elements);
  q_scale_ = DeviceBuffer(int64_t{rows_ + kSpareRows} * heads_ * 4);
  out_ = DeviceBuffer(elements * 2);
  lse_ = DeviceBuffer(int64_t{rows_ + kSpareRows} * heads_ * 4);
  std::vector<float> sinks;
  for (int head = 0; head < heads_; ++head)
    sinks.push_back(0.7f * static_cast<float>(head % 5) - 1);
  sinks_ = DeviceBuffer(sinks);
  for (size_t s = 0; s < c.lengths.size(); ++s) {
    const int64_t row = int64_t{heads_} * c.head_dim;
    FillNormal(q_.as<uint16_t>() + q_begin_[s] * row, spec.tokens[s] * row, 1000 * spec.seed + s,
               (c.lengths[s] - spec.tokens[s]) * row, 0, spec.q_deviation);
  }
}

void DeviceStep::Plan() {
  plan_->Make(q_begin_, kv_len_, nullptr);
  std::vector<DeviceCache::Tokens> ranges;
  for (size_t s = 0; s < kv_len_.size(); ++s)
    ranges.push_back({static_cast<int>(s), kv_len_[s] - spec_.tokens[s], kv_len_[s]});
  const int64_t row = int64_t{heads_} * cache_.spec().head_dim;
  const bool fp8 = spec_.math != AttentionMath::k16Bit;
  cache_.Append(ranges, {.tokens = rows_,
                         .heads = heads_,
                         .q = q_.as<void>(),
                         .q_stride = row,
                         .q_out = q_out_.as<void>(),
                         .fp8_queries = fp8 ? plan_->fp8_queries() : nullptr,
                         .q_fp8 = q_fp8_.as<void>(),
                         .q_scale = q_scale_.as<float>()});
}

void DeviceStep::Launch(cuda::Stream stream) {
  cuda::Attention({.plan = plan_.get(),
                   .cache = cache_.layer(),
                   .block_table = cache_.block_table(),
                   .q = q_out_.as<void>(),
                   .q_fp8 = q_fp8_.as<void>(),
                   .q_scale = q_scale_.as<float>(),
                   .scale = 1 / std::sqrt(static_cast<float>(cache_.spec().head_dim)),
                   .soft_cap = spec_.soft_cap,
                   .sinks = spec_.sinks ? sinks_.as<float>() : nullptr,
                   .out = out_.as<void>(),
                   .lse = lse_.as<float>()},
                  stream);
}

Result DeviceStep::Download() {
  OCTAVO_CUDA(cudaDeviceSynchronize());
  Result result;
  const auto out = out_.Download<uint16_t>();
  const auto lse = lse_.Download<float>();
  const size_t used = size_t(rows_) * heads_;
  for (size_t i = 0; i < used * cache_.spec().head_dim; ++i)
    result.out.push_back(BF16ToFloat(out[i]));
  result.lse.assign(lse.begin(), lse.begin() + used);
  for (size_t i = used * cache_.spec().head_dim; i < out.size(); ++i)
    if (out[i] != 0xFFFF) result.failure = "wrote output rows of no sequence";
  for (size_t i = used; i < lse.size(); ++i)
    if (std::bit_cast<uint32_t>(lse[i]) != 0xFFFFFFFF)
      result.failure = "wrote log-sum-exps of no sequence";
  for (const DeviceBuffer* buffer : {&q_, &q_out_, &q_fp8_, &q_scale_, &out_, &lse_, &sinks_})
    if (!buffer->intact()) result.failure = "wrote outside its output";
  if (!cache_.intact()) result.failure = "wrote outside the cache";
  return result;
}

Result DeviceStep::Run() {
  Plan();
  Launch(nullptr);
  return Download();
}

Result DeviceStep::Oracle(bool exact_queries) {
  std::vector<int32_t> sequence, position;
  for (size_t s = 0; s < kv_len_.size(); ++s) {
    for (int t = 0; t < spec_.tokens[s]; ++t) {
      sequence.push_back(static_cast<int32_t>(s));
      position.push_back(kv_len_[s] - spec_.tokens[s] + t);
    }
  }
  const DeviceBuffer row_sequence(sequence), row_position(position);
  const size_t used = size_t(rows_) * heads_;
  const DeviceBuffer out(used * cache_.spec().head_dim * 8), lse(used * 8);
  OracleAttention({.shape = shape_,
                   .cache = cache_.layer(),
                   .block_table = cache_.block_table(),
                   .row_sequence = row_sequence.as<int32_t>(),
                   .row_position = row_position.as<int32_t>(),
                   .rows = rows_,
                   .q = exact_queries ? q_.as<void>() : q_out_.as<void>(),
                   .fp8_queries = exact_queries || spec_.math == AttentionMath::k16Bit
                                      ? nullptr
                                      : plan_->fp8_queries(),
                   .q_fp8 = q_fp8_.as<void>(),
                   .q_scale = q_scale_.as<float>(),
                   .scale = 1 / std::sqrt(static_cast<float>(cache_.spec().head_dim)),
                   .soft_cap = spec_.soft_cap,
                   .sinks = spec_.sinks ? sinks_.as<float>() : nullptr,
                   .out = out.as<double>(),
                   .lse = lse.as<double>()});
  OCTAVO_CUDA(cudaDeviceSynchronize());
  return {.out = out.Download<double>(), .lse = lse.Download<double>(), .failure = ""};
}

const std::vector<uint16_t>& DeviceStep::queries() {
  host_queries_ = q_out_.Download<uint16_t>();
  return host_queries_;
}

Comparison Compare(const Result& actual, const Result& expected, int head_dim) {
  Comparison comparison;
  double error = 0, power = 0;
  for (size_t row = 0; row < expected.lse.size(); ++row) {
    double row_error = 0, row_power = 0;
    bool finite = true;
    for (size_t i = row * head_dim; i < (row + 1) * head_dim; ++i) {
      const double a = actual.out[i], e = expected.out[i];
      if (std::isfinite(a) != std::isfinite(e)) comparison.finite_alike = false;
      finite = finite && std::isfinite(a) && std::isfinite(e);
      row_error += (a - e) * (a - e);
      row_power += e * e;
    }
    if (!finite) continue;
    error += row_error;
    power += row_power;
    if (row_error > 0)
      comparison.worst_row = std::max(comparison.worst_row, std::sqrt(row_error / row_power));
    const double lse = std::abs(actual.lse[row] - expected.lse[row]);
    if (!(lse <= comparison.lse)) comparison.lse = lse;
  }
  comparison.relative_l2 = error > 0 ? std::sqrt(error / power) : 0;
  return comparison;
}

}  // namespace octavo::conformance
