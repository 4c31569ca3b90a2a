#include "eval/bench_decode.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <set>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/float_bits.h"
#include "base/thread_pool.h"
#include "engine/executor.h"
#include "kernels/backend.h"
#include "kernels/cpu/bandwidth.h"
#include "models/config.h"

namespace octavo {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kHeadDim = 128;
constexpr int kMatrix = 4096;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The median time of calls of f(i), i counting up, over at least `seconds`. Not the fastest: on
// shared machines memory is at moments half again as fast as usual, and the limit and what is held
// against it would each catch their own.
double Median(double seconds, const std::function<void(int)>& f) {
  std::vector<double> times;
  const double end = Now() + seconds;
  for (int i = 0; i < 3 || Now() < end; ++i) {
    const double start = Now();
    f(i);
    times.push_back(Now() - start);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

std::vector<uint16_t> RandomBF16(int64_t count, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = FloatToBF16(normal(random));
  return values;
}

double MatVecBandwidth(Backend& backend, double seconds) {
  const int64_t bytes = int64_t{2} * kMatrix * kMatrix;
  const int count = static_cast<int>(std::max<int64_t>(4, (cpu::ColdBytes() + bytes - 1) / bytes));
  Buffer weights(bytes * count);
  std::mt19937_64 random(1);
  const std::vector<uint16_t> some = RandomBF16(kMatrix, random);
  for (int64_t row = 0; row < int64_t{count} * kMatrix; ++row) {
    std::memcpy(weights.data() + row * kMatrix * 2, some.data(), kMatrix * 2);
  }
  std::vector<uint16_t> x = RandomBF16(kMatrix, random), out(kMatrix);
  const double time = Median(seconds, [&](int i) {
    backend.MatMul(
        {.x = Tensor(x.data(), DType::kBF16, {1, kMatrix}),
         .weight = Tensor(weights.data() + bytes * (i % count), DType::kBF16, {kMatrix, kMatrix}),
         .bias = {},
         .out = Tensor(out.data(), DType::kBF16, {1, kMatrix})});
  });
  return static_cast<double>(bytes) / time / 1e9;
}

// A pool of pages of one synthetic layer, filled by the backend's own append; sequences are runs of
// pages in it.
class SyntheticLayer {
 public:
  SyntheticLayer(Backend& backend, KvFormat format, int64_t tokens)
      : backend_(backend),
        plan_(backend.PlanAttention(
            {.shape = {.heads = kHeads, .kv_heads = kKvHeads, .head_dim = kHeadDim, .window = 0}})),
        ones_(kKvHeads, 1.0f) {
    kv_.layout = {
        .k_format = format, .v_format = format, .kv_heads = kKvHeads, .head_dim = kHeadDim};
    page_bytes_ = kv_.layout.ClaimBytes();
    pages_ = tokens / kPageSize;
    memory_ = Buffer(pages_ * page_bytes_);
    kv_.arena = memory_.data();
    kv_.k_scale = kv_.v_scale = ones_.data();
    kv_.saturated = saturated_;
    kv_.amax = amax_;
    Fill();
  }

  double bytes_per_token() const { return static_cast<double>(kv_.layout.UsedBytes()) / kPageSize; }

  // Attention of one token over `context` tokens; i chooses which.
  void Attend(int64_t context, int i) {
    const int64_t pages = context / kPageSize;
    const int64_t first = (i % (pages_ / pages)) * pages;
    std::vector<uint32_t> table(pages);
    for (int64_t p = 0; p < pages; ++p) table[p] = Entry(first + p);
    const int32_t q_begin[] = {0, 1}, kv_len[] = {static_cast<int32_t>(context)};
    const BatchView batch{.tokens = 1,
                          .q_begin = q_begin,
                          .kv_len = kv_len,
                          .slots = {},
                          .block_table = Tensor(table.data(), DType::kI32, {1, pages})};
    plan_->Make(batch);
    const Tensor q(queries_.data(), DType::kBF16, {1, kHeads * kHeadDim});
    const Tensor out(out_.data(), DType::kBF16, {1, kHeads * kHeadDim});
    backend_.Attention({.q = q,
                        .out = out,
                        .batch = &batch,
                        .plan = plan_.get(),
                        .cache = kv_,
                        .scale = 0.088f,
                        .soft_cap = 0,
                        .sinks = {}});
  }

 private:
  uint32_t Entry(int64_t page) const {
    return static_cast<uint32_t>(page * page_bytes_ / kPageUnit);
  }

  void Fill() {
    std::mt19937_64 random(2);
    queries_ = RandomBF16(kHeads * kHeadDim, random);
    out_.resize(kHeads * kHeadDim);
    std::vector<uint16_t> q(kPageSize * kHeads * kHeadDim),
        k = RandomBF16(kPageSize * kKvHeads * kHeadDim, random),
        v = RandomBF16(kPageSize * kKvHeads * kHeadDim, random);
    std::vector<float> cos_sin(kPageSize * kHeadDim);
    for (size_t i = 0; i < cos_sin.size(); ++i)
      cos_sin[i] = i % kHeadDim < kHeadDim / 2 ? 1.0f : 0.0f;
    std::vector<int64_t> slots(kPageSize);
    for (int64_t page = 0; page < pages_; ++page) {
      for (int t = 0; t < kPageSize; ++t) slots[t] = int64_t{Entry(page)} * kPageSize + t;
      const BatchView batch{.tokens = kPageSize,
                            .q_begin = {},
                            .kv_len = {},
                            .slots = Tensor(slots.data(), DType::kI64, {kPageSize}),
                            .block_table = {}};
      backend_.Append({.q = Tensor(q.data(), DType::kBF16, {kPageSize, kHeads * kHeadDim}),
                       .k = Tensor(k.data(), DType::kBF16, {kPageSize, kKvHeads * kHeadDim}),
                       .v = Tensor(v.data(), DType::kBF16, {kPageSize, kKvHeads * kHeadDim}),
                       .heads = kHeads,
                       .q_norm = {},
                       .k_norm = {},
                       .cos_sin = Tensor(cos_sin.data(), DType::kF32, {kPageSize, kHeadDim}),
                       .batch = &batch,
                       .cache = kv_});
    }
  }

  Backend& backend_;
  std::unique_ptr<AttentionPlan> plan_;
  KvLayer kv_;
  std::vector<float> ones_;
  uint64_t saturated_[2] = {};
  float amax_[2] = {};
  int64_t page_bytes_ = 0, pages_ = 0;
  Buffer memory_;
  std::vector<uint16_t> queries_, out_;
};

// One sequence of a real model whose cache is filled with small values: speed does not depend on
// them.
class ModelDecode {
 public:
  static int64_t CacheBytes(const std::string& model, const std::string& format, int64_t tokens) {
    const KvFormat f = *KvFormatFromName(format);
    int64_t page = 0;
    for (const LayerSpec& layer : ReadModelSpec(model).layers) {
      page += KvLayout{f, f, layer.kv_heads, layer.head_dim}.ClaimBytes();
    }
    return (tokens / kPageSize + 1) * page * 5 /
           4;  // a quarter more than all layers at full length: slabs
  }

  ModelDecode(const std::string& model, const std::string& format, int64_t longest, int threads)
      : executor_({.model = model,
                   .device = "cpu",
                   .kv_cache_dtype = format,
                   .kv_cache_memory_bytes = CacheBytes(model, format, longest),
                   .max_model_len = longest,
                   .max_num_seqs = 1,
                   .enable_prefix_caching = false,
                   .threads = threads}),
        batch_(executor_.MakeBatch()) {
    std::memset(executor_.pool().arena().base(), 0x11, executor_.cache_bytes());
  }

  double bytes_per_token() const { return executor_.cache_bytes_per_token(); }

  double Measure(int64_t context, double seconds) {
    const std::vector<int32_t> tokens(context, 1);
    SequencePages pages = executor_.pool().Acquire({});
    OCTAVO_CHECK(pages.Extend(context), context);
    pages.Publish(tokens, context - 1);
    batch_.Clear();
    batch_.AddSample(batch_.Add(tokens, context - 1, 1, pages), {});
    return Median(seconds, [&](int) { executor_.Execute(batch_); });
  }

 private:
  Executor executor_;
  Batch batch_;
};

void FitLine(DecodeSeries& series) {
  double n = 0, x = 0, y = 0, xx = 0, xy = 0;
  for (const DecodePoint& p : series.points) {
    const double c = static_cast<double>(p.context);
    n += 1, x += c, y += p.microseconds, xx += c * c, xy += c * p.microseconds;
  }
  const double determinant = n * xx - x * x;
  series.slope = determinant > 0 ? (n * xy - x * y) / determinant : 0;
  series.intercept = (y - series.slope * x) / n;
}

DecodePoint Point(int64_t context, double seconds, double bytes_per_token) {
  return {.context = context,
          .microseconds = seconds * 1e6,
          .gigabytes_per_second = bytes_per_token * static_cast<double>(context) / seconds / 1e9};
}

}  // namespace

DecodeBenchReport BenchDecode(const DecodeBenchOptions& options) {
  std::vector<KvFormat> formats;
  for (const std::string& name : options.formats) {
    const auto format = KvFormatFromName(name);
    if (!format)
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--kv-cache-dtypes: unknown format '{}'", name));
    formats.push_back(*format);
  }
  const int64_t most = ReadModelSpec(options.model).max_position_embeddings;
  for (int64_t context : options.contexts) {
    if (context < kPageSize || context % kPageSize != 0 || context > most) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--contexts: expected multiples of {} up to the model's "
                              "max_position_embeddings, {}, found {}",
                              kPageSize, most, context));
    }
  }
  Require(!formats.empty(), "--kv-cache-dtypes", "at least one", "none");
  const auto contexts = std::set(options.contexts.begin(), options.contexts.end()).size();
  Require(contexts >= 2, "--contexts", "two at least, for a slope", contexts);
  Require(options.seconds > 0 && options.seconds <= 3600, "--seconds", "a number in (0, 3600]",
          options.seconds);
  ThreadPool pool(options.threads);
  DecodeBenchReport report{.threads = pool.threads()};
  std::vector<double> reads = {cpu::ReadBandwidth(pool, options.seconds) / 1e9};
  const std::unique_ptr<Backend> backend = MakeCpuBackend(pool.threads());
  report.matvec_gigabytes_per_second = MatVecBandwidth(*backend, options.seconds);

  const int64_t longest = *std::max_element(options.contexts.begin(), options.contexts.end());
  std::vector<std::unique_ptr<SyntheticLayer>> layers;
  std::vector<std::unique_ptr<ModelDecode>> models;
  const size_t count = formats.size();
  report.series.resize(2 * count);
  for (size_t f = 0; f < count; ++f) {
    const KvLayout layout{
        .k_format = formats[f], .v_format = formats[f], .kv_heads = kKvHeads, .head_dim = kHeadDim};
    const int64_t tokens = std::max(
        longest, cpu::ColdBytes() * kPageSize / layout.ClaimBytes() / kPageSize * kPageSize);
    layers.push_back(std::make_unique<SyntheticLayer>(*backend, formats[f], tokens));
    models.push_back(
        std::make_unique<ModelDecode>(options.model, options.formats[f], longest, pool.threads()));
    report.series[f] = {.what = "attention",
                        .format = Name(formats[f]),
                        .points = {},
                        .cache_bytes_per_token = layers[f]->bytes_per_token()};
    report.series[count + f] = {.what = "model",
                                .format = Name(formats[f]),
                                .points = {},
                                .cache_bytes_per_token = models[f]->bytes_per_token()};
  }
  for (int64_t context : options.contexts) {
    reads.push_back(cpu::ReadBandwidth(pool, options.seconds) /
                    1e9);  // speed drifts: in turn with the rest
    for (size_t f = 0; f < count; ++f) {
      const double time = Median(options.seconds, [&](int i) { layers[f]->Attend(context, i); });
      report.series[f].points.push_back(Point(context, time, layers[f]->bytes_per_token()));
      report.series[count + f].points.push_back(Point(
          context, models[f]->Measure(context, options.seconds), models[f]->bytes_per_token()));
    }
  }
  std::nth_element(reads.begin(), reads.begin() + reads.size() / 2, reads.end());
  report.read_gigabytes_per_second = reads[reads.size() / 2];
  for (DecodeSeries& series : report.series) FitLine(series);
  return report;
}

std::string DecodeBenchTable(const DecodeBenchReport& report) {
  const double limit = report.read_gigabytes_per_second;
  std::string out = fmt::format(
      "{} threads, read bandwidth {:.1f} GB/s; matrix-vector {}x{} bf16 {:.1f} GB/s "
      "({:.0f}%)\n\n{:<10} {:<20} {:>8} "
      "{:>12} {:>9} {:>7}\n",
      report.threads, limit, kMatrix, kMatrix, report.matvec_gigabytes_per_second,
      100 * report.matvec_gigabytes_per_second / limit, "what", "format", "context", "us/token",
      "GB/s", "% read");
  for (const DecodeSeries& series : report.series) {
    for (const DecodePoint& p : series.points) {
      out += fmt::format("{:<10} {:<20} {:>8} {:>12.1f} {:>9.2f} {:>6.0f}%\n", series.what,
                         series.format, p.context, p.microseconds, p.gigabytes_per_second,
                         100 * p.gigabytes_per_second / limit);
    }
  }
  out += fmt::format("\n{:<10} {:<20} {:>14} {:>13} {:>16} {:>14}\n", "what", "format",
                     "slope ns/token", "intercept us", "slope / bf16", "slope GB/s");
  for (const DecodeSeries& series : report.series) {
    const auto bf16 =
        std::find_if(report.series.begin(), report.series.end(), [&](const DecodeSeries& s) {
          return s.what == series.what && s.format == Name(KvFormat::kBF16);
        });
    out += fmt::format(
        "{:<10} {:<20} {:>14.3f} {:>13.1f} {:>16} {:>14.2f}\n", series.what, series.format,
        1e3 * series.slope, series.intercept,
        bf16 == report.series.end() ? "-" : fmt::format("{:.2f}", series.slope / bf16->slope),
        series.cache_bytes_per_token / series.slope / 1e3);
  }
  return out;
}

std::string DecodeBenchJson(const DecodeBenchReport& report) {
  nlohmann::ordered_json json = {{"threads", report.threads},
                                 {"read_gb_per_s", report.read_gigabytes_per_second},
                                 {"matvec_gb_per_s", report.matvec_gigabytes_per_second},
                                 {"series", nlohmann::ordered_json::array()}};
  for (const DecodeSeries& series : report.series) {
    nlohmann::ordered_json points = nlohmann::ordered_json::array();
    for (const DecodePoint& p : series.points) {
      points.push_back(
          {{"context", p.context}, {"us", p.microseconds}, {"gb_per_s", p.gigabytes_per_second}});
    }
    json["series"].push_back({{"what", series.what},
                              {"kv_cache_dtype", series.format},
                              {"slope_us_per_token", series.slope},
                              {"intercept_us", series.intercept},
                              {"cache_bytes_per_token", series.cache_bytes_per_token},
                              {"points", points}});
  }
  return json.dump(2) + "\n";
}

}  // namespace octavo
