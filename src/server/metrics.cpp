#include "server/metrics.h"

#include <algorithm>

#include <fmt/format.h>

#include "octavo/kv_layout.h"

namespace octavo {
namespace {

const std::vector<double> kFirstTokenSeconds = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                                0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                                20,    40,    80,   160,  640,  2560};
const std::vector<double> kTokenSeconds = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                           0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
const std::vector<double> kRequestSeconds = {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                             30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};

// 1, 2, 5, 10, ..., `most` at most.
std::vector<double> TokenBounds(int64_t most) {
  std::vector<double> bounds;
  for (int64_t ten = 1; ten <= most; ten *= 10) {
    for (const int64_t bound : {ten, 2 * ten, 5 * ten}) {
      if (bound <= most) bounds.push_back(static_cast<double>(bound));
    }
  }
  return bounds;
}

std::string Escaped(std::string_view value) {
  std::string out;
  for (const char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

std::string Header(const std::string& name, const std::string& type, const std::string& help) {
  return fmt::format("# HELP {0} {2}\n# TYPE {0} {1}\n", name, type, help);
}

std::string Number(double x) { return fmt::format("{}", x); }

// Saturating formats' largest finite value, in units of the scale; 0: the format cannot saturate.
double LargestStored(const std::string& format) {
  switch (KvFormatFromName(format).value_or(KvFormat::kBF16)) {
    case KvFormat::kFp8E4M3:
      return 448;
    case KvFormat::kFp8E5M2:
      return 57344;
    default:
      return 0;
  }
}

// vLLM's info: a line that is always 1 and whose labels are the configuration, as Python writes it.
std::string CacheConfig(const EngineOptions& options, const EngineStats& stats) {
  const char* const name = "vllm:cache_config_info";
  return Header(name, "gauge", "Configuration of the KV cache.") +
         fmt::format(
             "{}{{block_size=\"{}\",cache_dtype=\"{}\",enable_prefix_caching=\"{}\","
             "gpu_memory_utilization=\"{}\",kv_cache_dtype_skip_layers=\"{}\","
             "kv_cache_memory_bytes=\"{}\",kv_cache_size_tokens=\"{}\","
             "num_gpu_blocks=\"{}\",engine=\"0\"}} 1\n",
             name, kPageSize, options.kv_cache_dtype,
             options.enable_prefix_caching ? "True" : "False", options.gpu_memory_utilization,
             Escaped(fmt::format("{}", fmt::join(options.kv_cache_dtype_skip_layers, ","))),
             stats.cache_bytes, stats.cache_tokens, stats.cache_tokens / kPageSize);
}

// f(layer, "k" or "v", format, saturated, amax, source)
template <class F>
void ForEachOperand(std::span<const LayerCacheReport> layers, const F& f) {
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerCacheReport& r = layers[l];
    f(l, "k", r.k_format, r.k_saturated, r.k_amax, r.k_scale_source);
    f(l, "v", r.v_format, r.v_saturated, r.v_amax, r.v_scale_source);
  }
}

}  // namespace

void Histogram::Observe(double value) {
  ++counts_[std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin()];
  sum_ += value;
}

std::string Histogram::Text(const std::string& name, const std::string& help,
                            const std::string& labels) const {
  std::string out = Header(name, "histogram", help);
  uint64_t count = 0;
  for (size_t i = 0; i < counts_.size(); ++i) {
    count += counts_[i];
    out += fmt::format("{}_bucket{{{},le=\"{}\"}} {}\n", name, labels,
                       i < bounds_.size() ? Number(bounds_[i]) : "+Inf", count);
  }
  return out + fmt::format("{0}_sum{{{1}}} {2}\n{0}_count{{{1}}} {3}\n", name, labels, Number(sum_),
                           count);
}

// The server has one engine, vLLM's number 0.
Metrics::Metrics(const std::string& model_name, int64_t max_model_len)
    : labels_(fmt::format("model_name=\"{}\",engine=\"0\"", Escaped(model_name))),
      ttft_(kFirstTokenSeconds),
      itl_(kTokenSeconds),
      tpot_(kTokenSeconds),
      e2e_(kRequestSeconds),
      queue_(kRequestSeconds),
      inference_(kRequestSeconds),
      prefill_(kRequestSeconds),
      decode_(kRequestSeconds),
      prompt_tokens_(TokenBounds(max_model_len)),
      computed_tokens_(TokenBounds(max_model_len)),
      output_tokens_(TokenBounds(max_model_len)),
      most_output_tokens_(TokenBounds(max_model_len)),
      max_tokens_(TokenBounds(max_model_len)),
      choices_({1, 2, 5, 10, 20}) {}

void Metrics::Count(const Finished& request) {
  const auto output = static_cast<double>(request.output_tokens);
  ++finished_[request.reason];
  e2e_.Observe(request.seconds);
  queue_.Observe(request.queue_seconds);
  if (output > 0) {  // the others got no further
    prefill_.Observe(request.prefill_seconds);
    decode_.Observe(request.decode_seconds);
    inference_.Observe(request.prefill_seconds + request.decode_seconds);
  }
  if (output > 1) tpot_.Observe(request.decode_seconds / (output - 1));
  prompt_tokens_.Observe(static_cast<double>(request.prompt_tokens));
  computed_tokens_.Observe(static_cast<double>(request.prompt_tokens - request.cached_tokens));
  output_tokens_.Observe(output);
  max_tokens_.Observe(static_cast<double>(request.max_tokens));
}

void Metrics::CountPrompt(int choices, int64_t output_tokens) {
  choices_.Observe(choices);
  most_output_tokens_.Observe(static_cast<double>(output_tokens));
}

std::string Metrics::Text(const EngineOptions& options, const EngineStats& stats,
                          std::span<const LayerCacheReport> layers) const {
  const std::string& labels = labels_;
  std::string out = CacheConfig(options, stats);
  const auto one = [&](const char* name, const char* type, const char* help, double value) {
    out += Header(name, type, help) + fmt::format("{}{{{}}} {}\n", name, labels, Number(value));
  };
  const auto by = [&](const char* name, const char* type, const char* help, const char* label,
                      const auto& values) {
    out += Header(name, type, help);
    for (const auto& [of, n] : values)
      out += fmt::format("{}{{{},{}=\"{}\"}} {}\n", name, labels, label, of, n);
  };
  const auto count = [](int64_t n) { return static_cast<double>(n); };
  one("vllm:num_requests_running", "gauge", "Requests in the running batch.", count(stats.running));
  one("vllm:num_requests_waiting", "gauge", "Requests that wait for room.", count(stats.waiting));
  by("vllm:num_requests_waiting_by_reason", "gauge", "Of those, by what they wait for.", "reason",
     std::map<std::string, int64_t>{{"capacity", stats.waiting}, {"deferred", 0}});
  one("vllm:kv_cache_usage_perc", "gauge", "Share of the KV cache in use, 0 to 1.",
      stats.cache_bytes > 0 ? count(stats.cache_bytes_used) / count(stats.cache_bytes) : 0);
  one("vllm:num_preemptions_total", "counter", "Requests put back to be recomputed.",
      count(stats.preemptions));
  one("vllm:prompt_tokens_total", "counter", "Prompt tokens, computed or cached.",
      count(stats.prompt_tokens + stats.cached_tokens));
  one("vllm:prompt_tokens_cached_total", "counter", "Prompt tokens that the prefix cache had.",
      count(stats.cached_tokens));
  by("vllm:prompt_tokens_by_source_total", "counter", "Prompt tokens by where they came from.",
     "source",
     std::map<std::string, int64_t>{{"local_cache_hit", stats.cached_tokens},
                                    {"local_compute", stats.prompt_tokens}});
  one("vllm:generation_tokens_total", "counter", "Tokens generated.",
      count(stats.generated_tokens));
  one("vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.",
      count(stats.prompt_tokens + stats.cached_tokens));
  one("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.",
      count(stats.cached_tokens));
  one("octavo:engine_steps_total", "counter", "Steps of the engine.", count(stats.steps));
  one("octavo:engine_model_seconds_total", "counter", "Time in the model: forward and sampling.",
      stats.model_seconds);
  one("octavo:engine_loop_seconds_total", "counter",
      "Time in the engine's loop outside of the model, while it has work.", stats.loop_seconds);
  one("octavo:server_cpu_seconds_total", "counter",
      "Processor time of HTTP, JSON, templates and tokenising.", cpu_seconds_);
  out += Histogram({std::begin(kStepTokenBounds), std::end(kStepTokenBounds)},
                   {stats.steps_by_tokens.begin(), stats.steps_by_tokens.end()},
                   count(stats.step_tokens))
             .Text("vllm:iteration_tokens_total", "Tokens of a step of the engine.", labels);
  by("vllm:request_success_total", "counter", "Requests by how they ended.", "finished_reason",
     finished_);
  out += ttft_.Text("vllm:time_to_first_token_seconds", "Time to the first token.", labels);
  out += itl_.Text("vllm:inter_token_latency_seconds", "Time between tokens.", labels);
  out += tpot_.Text("vllm:request_time_per_output_token_seconds",
                    "A request's mean time between tokens.", labels);
  out += e2e_.Text("vllm:e2e_request_latency_seconds", "Time to the last token.", labels);
  out += queue_.Text("vllm:request_queue_time_seconds", "Until the first step.", labels);
  out += inference_.Text("vllm:request_inference_time_seconds",
                         "From the first step to the last token.", labels);
  out += prefill_.Text("vllm:request_prefill_time_seconds",
                       "From the first step to the first token.", labels);
  out +=
      decode_.Text("vllm:request_decode_time_seconds", "From the first token to the last.", labels);
  out += prompt_tokens_.Text("vllm:request_prompt_tokens", "Prompt tokens of a request.", labels);
  out += computed_tokens_.Text("vllm:request_prefill_kv_computed_tokens",
                               "Of those, tokens that no cache had.", labels);
  out +=
      output_tokens_.Text("vllm:request_generation_tokens", "Output tokens of a request.", labels);
  out += most_output_tokens_.Text("vllm:request_max_num_generation_tokens",
                                  "Output tokens of the longest choice of a prompt.", labels);
  out += max_tokens_.Text("vllm:request_params_max_tokens", "max_tokens of a request.", labels);
  out += choices_.Text("vllm:request_params_n", "n of a request.", labels);

  const auto per_operand = [&](const char* name, const char* type, const char* help,
                               const auto& value) {
    out += Header(name, type, help);
    ForEachOperand(layers, [&](size_t l, const char* operand, const std::string& format,
                               uint64_t saturated, float amax, const std::string& source) {
      out += fmt::format("{}{{{},layer=\"{}\",operand=\"{}\",kv_cache_dtype=\"{}\"", name, labels,
                         l, operand, format) +
             value(format, saturated, amax, source);
    });
  };
  per_operand("octavo:kv_cache_saturated_elements_total", "counter",
              "Elements stored as the format's largest value because they were beyond it.",
              [](const auto&, uint64_t saturated, float, const auto&) {
                return fmt::format("}} {}\n", saturated);
              });
  per_operand("octavo:kv_cache_amax", "gauge",
              "Largest magnitude seen, in units of the scale (dynamic formats: of the value).",
              [](const auto&, uint64_t, float amax, const auto&) {
                return fmt::format("}} {:g}\n", amax);
              });
  per_operand("octavo:kv_cache_amax_limit", "gauge",
              "Largest magnitude that the format holds, in units of the scale; 0: no limit.",
              [](const std::string& format, uint64_t, float, const auto&) {
                return fmt::format("}} {:g}\n", LargestStored(format));
              });
  per_operand("octavo:kv_cache_scale_info", "gauge", "Where the scale came from.",
              [](const auto&, uint64_t, float, const std::string& source) {
                return fmt::format(",source=\"{}\"}} 1\n", Escaped(source));
              });
  return out;
}

std::vector<std::string> SaturationWarnings(std::vector<LayerCacheReport>& before,
                                            std::vector<LayerCacheReport> now) {
  std::vector<std::string> lines;
  before.resize(now.size());
  for (size_t l = 0; l < now.size(); ++l) {
    const auto check = [&](const char* operand, uint64_t was, uint64_t is, float amax,
                           const std::string& format) {
      if (was > 0 || is == 0) return;
      lines.push_back(
          fmt::format("layer {}: {} saturates in {}: magnitudes up to {:g} scales are stored as "
                      "{:g}; give it a "
                      "scale (octavo calibrate makes them), another format (--kv-cache-dtype "
                      "int8_per_token_head) or skip "
                      "it (--kv-cache-dtype-skip-layers {})",
                      l, operand, format, amax, LargestStored(format), l));
    };
    check("K", before[l].k_saturated, now[l].k_saturated, now[l].k_amax, now[l].k_format);
    check("V", before[l].v_saturated, now[l].v_saturated, now[l].v_amax, now[l].v_format);
  }
  before = std::move(now);
  return lines;
}

}  // namespace octavo
