#include "eval/bench_latency.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <future>
#include <limits>
#include <random>

#include <fmt/format.h>

#include "base/error.h"
#include "engine/device.h"
#include "eval/variant.h"
#include "models/config.h"
#include "models/inspect.h"

namespace octavo {
namespace {

using Clock = std::chrono::steady_clock;
using Groups = std::vector<std::vector<Measurement>>;

// For one sequence with 16-bit pages, and a slab per group to spare.
int64_t CacheBytes(const ModelSpec& spec, int64_t tokens) {
  int64_t page = 0;
  for (const LayerSpec& layer : spec.layers) {
    page += KvLayout{KvFormat::kBF16, KvFormat::kBF16, layer.kv_heads, layer.head_dim}.ClaimBytes();
  }
  return (tokens / kPageSize + 2) * page * 5 / 4 + (int64_t{256} << 20);
}

// What a token adds to what every later one reads: of full-attention layers only.
double GrowingBytes(const ModelSpec& spec, const std::vector<LayerCacheReport>& layers) {
  double bytes = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerSpec& layer = spec.layers[l];
    if (layer.window > 0) continue;
    const KvLayout layout{.k_format = *KvFormatFromName(layers[l].k_format),
                          .v_format = *KvFormatFromName(layers[l].v_format),
                          .kv_heads = layer.kv_heads,
                          .head_dim = layer.head_dim};
    bytes += static_cast<double>(layout.UsedBytes()) / kPageSize;
  }
  return bytes;
}

struct Timing {
  double ttft = 0, itl = 0;  // seconds
};

Timing RunRequest(Engine& engine, std::vector<int32_t> prompt, int output_len) {
  std::vector<Clock::time_point> times;
  std::promise<std::string> finished;
  const Clock::time_point start = Clock::now();
  engine.Submit({.prompt = std::move(prompt),
                 .sampling = {.max_tokens = output_len, .temperature = 0, .ignore_eos = true}},
                [&](const Event& event) {
                  if (event.kind == Event::Kind::kToken) times.push_back(Clock::now());
                  if (event.kind == Event::Kind::kFinished) finished.set_value(event.error);
                });
  if (const std::string error = finished.get_future().get(); !error.empty())
    throw Error(ErrorCode::kResourceExhausted, fmt::format("bench latency: {}", error));
  const auto seconds = [](Clock::time_point a, Clock::time_point b) {
    return std::chrono::duration<double>(b - a).count();
  };
  // The first steps of a request may record a graph.
  constexpr size_t kSkip = 2;
  std::vector<double> gaps;
  for (size_t i = kSkip + 1; i < times.size(); ++i) gaps.push_back(seconds(times[i - 1], times[i]));
  std::nth_element(gaps.begin(), gaps.begin() + gaps.size() / 2, gaps.end());
  return {.ttft = seconds(start, times.front()), .itl = gaps[gaps.size() / 2]};
}

std::vector<Measurement> Flatten(std::span<const std::vector<Measurement>> groups) {
  std::vector<Measurement> all;
  for (const auto& group : groups) all.insert(all.end(), group.begin(), group.end());
  return all;
}

// Where line b comes to lie below line a for good.
double BreakEven(const std::array<double, 3>& a, const std::array<double, 3>& b) {
  if (b[1] >= a[1]) return std::numeric_limits<double>::infinity();
  return std::max(0.0, (b[0] - a[0]) / (a[1] - b[1]));
}

Estimate Of(const Groups& groups,
            const std::function<double(std::span<const std::vector<Measurement>>)>& statistic) {
  return {statistic(groups), Bootstrap(groups, statistic)};
}

std::array<double, 3> Line(std::span<const std::vector<Measurement>> groups) {
  return FitPolynomial(Flatten(groups), 1, false);
}
std::array<double, 3> Parabola(std::span<const std::vector<Measurement>> groups) {
  return FitPolynomial(Flatten(groups), 2, true);
}

// A statistic of two variants' groups, drawn each from its own.
Estimate OfBoth(const Groups& a, const Groups& b,
                const std::function<double(std::span<const std::vector<Measurement>>,
                                           std::span<const std::vector<Measurement>>)>& statistic) {
  Groups both = a;
  both.insert(both.end(), b.begin(), b.end());
  return Of(both, [&](std::span<const std::vector<Measurement>> drawn) {
    return statistic(drawn.first(a.size()), drawn.subspan(a.size()));
  });
}

void Fit(LatencyVariant& v, const LatencyVariant& base) {
  v.slope = Of(v.itl, [](auto groups) { return Line(groups)[1]; });
  v.intercept = Of(v.itl, [](auto groups) { return Line(groups)[0]; });
  v.ttft_a = Of(v.ttft, [](auto groups) { return Parabola(groups)[2]; });
  v.ttft_b = Of(v.ttft, [](auto groups) { return Parabola(groups)[1]; });
  v.ttft_c = Of(v.ttft, [](auto groups) { return Parabola(groups)[0]; });
  v.slope_ratio = OfBoth(base.itl, v.itl, [](auto a, auto b) { return Line(b)[1] / Line(a)[1]; });
  v.intercept_difference =
      OfBoth(base.itl, v.itl, [](auto a, auto b) { return Line(b)[0] - Line(a)[0]; });
  v.break_even =
      OfBoth(base.itl, v.itl, [](auto a, auto b) { return BreakEven(Line(a), Line(b)); });
  v.ttft_a_ratio =
      OfBoth(base.ttft, v.ttft, [](auto a, auto b) { return Parabola(b)[2] / Parabola(a)[2]; });
}

void Check(const LatencyBenchOptions& options, const ModelSpec& spec) {
  if (options.variants.empty() || options.input_lens.size() < 3 || options.repeats < 1) {
    throw Error(ErrorCode::kInvalidArgument,
                "bench latency: a fit needs a variant, three --input-lens and a repeat");
  }
  if (options.output_len < 8) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--output-len: expected at least 8, found {}", options.output_len));
  }
  for (const int64_t length : options.input_lens) {
    if (length < 1 || length + options.output_len > spec.max_position_embeddings) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("--input-lens: expected lengths that leave room for --output-len {} in "
                      "the model's max_position_embeddings, {}, found {}",
                      options.output_len, spec.max_position_embeddings, length));
    }
  }
}

}  // namespace

LatencyReport BenchLatency(const LatencyBenchOptions& options, const LatencyProgress& progress) {
  const ModelSpec spec = ReadModelSpec(options.engine.model);
  Check(options, spec);
  LatencyReport report{
      .model = options.engine.model,
      .device = {},
      .output_len = options.output_len,
      .repeats = options.repeats,
      .weight_bytes_per_token = static_cast<double>(InspectWeights(spec).bytes_per_token),
      .variants = {}};
  {
    const auto backend = MakeBackend(options.engine.device, options.engine.threads);
    report.device = backend->name();
    report.read_bandwidth = backend->ReadBandwidth();
  }
  const int64_t longest = *std::max_element(options.input_lens.begin(), options.input_lens.end());
  std::vector<std::unique_ptr<Engine>> engines;
  for (const std::string& name : options.variants) {
    EngineOptions engine = WithVariant(options.engine, name);
    engine.enable_prefix_caching = false;
    engine.max_num_seqs = 1;
    engine.max_model_len = longest + options.output_len;
    if (engine.kv_cache_memory_bytes == 0)
      engine.kv_cache_memory_bytes = CacheBytes(spec, engine.max_model_len);
    engines.push_back(Engine::Create(engine, engines.empty() ? nullptr : engines.front()->model()));
    report.variants.push_back(
        {.name = name,
         .cache_bytes_per_token = GrowingBytes(spec, engines.back()->CacheReport()),
         .ttft = {},
         .itl = {}});
  }
  std::mt19937_64 random(options.seed);
  std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(spec.vocab) - 1);
  const auto prompt = [&](int64_t length) {
    std::vector<int32_t> ids(length);
    for (int32_t& id : ids) id = token(random);
    return ids;
  };
  for (const auto& engine : engines) RunRequest(*engine, prompt(options.input_lens[0]), 16);

  const int all = static_cast<int>(options.input_lens.size() * engines.size()) * options.repeats;
  int done = 0;
  for (const int64_t length : options.input_lens) {
    for (LatencyVariant& v : report.variants) {
      v.ttft.emplace_back();
      v.itl.emplace_back();
    }
    for (int repeat = 0; repeat < options.repeats; ++repeat) {
      const std::vector<int32_t> ids = prompt(length);
      for (size_t i = 0; i < engines.size(); ++i) {
        const Timing timing = RunRequest(*engines[i], ids, options.output_len);
        const double x = static_cast<double>(length);
        report.variants[i].ttft.back().push_back({x, timing.ttft});
        report.variants[i].itl.back().push_back({x + options.output_len / 2.0, timing.itl});
        if (progress) progress(++done, all);
      }
    }
  }
  for (LatencyVariant& v : report.variants) Fit(v, report.variants.front());
  return report;
}

}  // namespace octavo
