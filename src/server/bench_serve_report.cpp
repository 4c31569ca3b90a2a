// What came of it: see bench_serve.h.
#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <numeric>

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"
#include "server/bench_serve.h"

namespace octavo {
namespace {

using OrderedJson = nlohmann::ordered_json;

struct Totals {
  int64_t input = 0, output = 0;  // tokens of completed requests
  double peak_output = 0;         // tokens in the fullest second
};

Totals TotalsOf(const ServeReport& report) {
  Totals totals;
  std::map<int64_t, int64_t> by_second;
  for (const ServedRequest& r : report.requests) {
    if (!r.error.empty()) continue;
    totals.input += r.input_len;
    totals.output += r.output_len;
    double time = r.start + r.ttft;
    ++by_second[static_cast<int64_t>(time)];
    for (const double gap : r.itl) ++by_second[static_cast<int64_t>(time += gap)];
  }
  for (const auto& [second, count] : by_second)
    totals.peak_output = std::max(totals.peak_output, static_cast<double>(count));
  return totals;
}

// One request's, in milliseconds: itl has one per gap, tpot none for a single token.
std::vector<double> Values(const ServedRequest& r, const std::string& metric) {
  if (metric == "ttft") return {1e3 * r.ttft};
  if (metric == "e2el") return {1e3 * r.latency};
  if (metric == "itl") {
    std::vector<double> gaps = r.itl;
    for (double& gap : gaps) gap *= 1e3;
    return gaps;
  }
  OCTAVO_CHECK(metric == "tpot", metric);
  if (r.output_len <= 1) return {};
  return {1e3 * (r.latency - r.ttft) / static_cast<double>(r.output_len - 1)};
}

std::vector<double> Values(const ServeReport& report, const std::string& metric) {
  std::vector<double> values;
  for (const ServedRequest& r : report.requests) {
    if (!r.error.empty()) continue;
    const std::vector<double> more = Values(r, metric);
    values.insert(values.end(), more.begin(), more.end());
  }
  return values;
}

// Good requests per second.
double Goodput(const ServeReport& report) {
  const auto good = [&](const ServedRequest& r) {
    return r.error.empty() && std::all_of(report.options.goodput.begin(),
                                          report.options.goodput.end(), [&](const auto& limit) {
                                            const std::vector<double> values =
                                                Values(r, limit.first);
                                            return values.empty() || values.front() <= limit.second;
                                          });
  };
  return static_cast<double>(std::count_if(report.requests.begin(), report.requests.end(), good)) /
         report.duration;
}

const std::map<std::string, std::string> kTitles = {{"ttft", "Time to First Token"},
                                                    {"tpot", "Time per Output Token"},
                                                    {"itl", "Inter-token Latency"},
                                                    {"e2el", "End-to-end Latency"}};

std::string Upper(std::string text) {
  for (char& c : text) c = static_cast<char>(std::toupper(c));
  return text;
}

std::string Row(const std::string& label, const std::string& value) {
  return fmt::format("{:<40} {:<10}\n", label + ":", value);
}
std::string Row(const std::string& label, double value) {
  return Row(label, fmt::format("{:.2f}", value));
}
std::string Row(const std::string& label, int64_t value) {
  return Row(label, std::to_string(value));
}

double PerStep(const ServerCost& cost, double seconds) {
  return cost.steps > 0 ? 1e3 * seconds / cost.steps : 0;
}

void AddRequests(OrderedJson& json, const ServeReport& report) {
  for (const char* key :
       {"input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"})
    json[key] = OrderedJson::array();
  for (const ServedRequest& r : report.requests) {
    json["input_lens"].push_back(r.input_len);
    json["output_lens"].push_back(r.output_len);
    json["ttfts"].push_back(r.ttft);
    json["itls"].push_back(r.itl);
    json["start_times"].push_back(r.start);
    json["generated_texts"].push_back(r.text);
    json["errors"].push_back(r.error);
  }
}

}  // namespace

Summary Summarise(std::vector<double> values, std::span<const double> percentiles) {
  Summary summary{.percentiles = std::vector<double>(percentiles.size())};
  if (values.empty()) return summary;
  std::sort(values.begin(), values.end());
  const auto percentile = [&](double p) {
    const double at = p / 100 * static_cast<double>(values.size() - 1);
    const size_t below = static_cast<size_t>(at);
    const size_t above = std::min(below + 1, values.size() - 1);
    return std::lerp(values[below], values[above], at - static_cast<double>(below));
  };
  const double n = static_cast<double>(values.size());
  summary.mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  summary.median = percentile(50);
  double squares = 0;
  for (const double value : values) squares += (value - summary.mean) * (value - summary.mean);
  summary.std = std::sqrt(squares / n);
  std::transform(percentiles.begin(), percentiles.end(), summary.percentiles.begin(), percentile);
  return summary;
}

std::string ServeTable(const ServeReport& report) {
  const ServeBenchOptions& o = report.options;
  const Totals totals = TotalsOf(report);
  const double input = static_cast<double>(totals.input);
  const double output = static_cast<double>(totals.output);
  const int completed = report.completed();
  std::string out = fmt::format("{:=^50}\n", " Serving Benchmark Result ");
  out += Row("Successful requests", int64_t{completed});
  out += Row("Failed requests", static_cast<int64_t>(report.requests.size()) - completed);
  if (o.max_concurrency > 0) out += Row("Maximum request concurrency", int64_t{o.max_concurrency});
  if (std::isfinite(o.request_rate)) out += Row("Request rate configured (RPS)", o.request_rate);
  out += Row("Benchmark duration (s)", report.duration);
  out += Row("Total input tokens", totals.input);
  out += Row("Total generated tokens", totals.output);
  out += Row("Request throughput (req/s)", completed / report.duration);
  if (!o.goodput.empty()) out += Row("Request goodput (req/s)", Goodput(report));
  out += Row("Output token throughput (tok/s)", output / report.duration);
  out += Row("Peak output token throughput (tok/s)", totals.peak_output);
  out += Row("Peak concurrent requests", int64_t{report.max_concurrent});
  out += Row("Total token throughput (tok/s)", (input + output) / report.duration);
  for (const std::string& metric : o.percentile_metrics) {
    const Summary summary = Summarise(Values(report, metric), o.metric_percentiles);
    out += fmt::format("{:-^50}\n", kTitles.at(metric));
    out += Row(fmt::format("Mean {} (ms)", Upper(metric)), summary.mean);
    out += Row(fmt::format("Median {} (ms)", Upper(metric)), summary.median);
    for (size_t i = 0; i < summary.percentiles.size(); ++i) {
      out += Row(fmt::format("P{} {} (ms)", o.metric_percentiles[i], Upper(metric)),
                 summary.percentiles[i]);
    }
  }
  if (const auto& cost = report.cost) {
    const auto row = [&](const char* label, double seconds) {
      out += Row(label, fmt::format("{:.3f}", PerStep(*cost, seconds)));
    };
    out += fmt::format("{:-^50}\n", "Octavo, per Step of the Engine");
    out += Row("Steps", static_cast<int64_t>(cost->steps));
    row("Model (ms)", cost->model_seconds);
    row("Engine's loop beside it (ms)", cost->loop_seconds);
    row("HTTP, JSON, tokenising (ms of CPU)", cost->cpu_seconds);
    row("Server overhead (ms)", cost->loop_seconds + cost->cpu_seconds);
  }
  return out + std::string(50, '=') + "\n";
}

std::string ServeJson(const ServeReport& report, const std::string& date, bool detailed) {
  const ServeBenchOptions& o = report.options;
  const Totals totals = TotalsOf(report);
  const double input = static_cast<double>(totals.input);
  const double output = static_cast<double>(totals.output);
  const int completed = report.completed();
  const std::string backend = !o.backend.empty() ? o.backend
                              : o.is_chat()      ? "openai-chat"
                                                 : "openai";
  OrderedJson json = {
      {"date", date},
      {"endpoint_type", backend},
      {"backend", backend},
      {"label", nullptr},
      {"model_id", report.model},
      {"tokenizer_id", o.tokenizer.empty() ? OrderedJson() : OrderedJson(o.tokenizer)},
      {"num_prompts", o.num_prompts},
      {"request_rate",
       std::isinf(o.request_rate) ? OrderedJson("inf") : OrderedJson(o.request_rate)},
      {"burstiness", o.burstiness},
      {"max_concurrency", o.max_concurrency > 0 ? OrderedJson(o.max_concurrency) : OrderedJson()},
      {"duration", report.duration},
      {"completed", completed},
      {"failed", report.requests.size() - static_cast<size_t>(completed)},
      {"total_input_tokens", totals.input},
      {"total_output_tokens", totals.output},
      {"request_throughput", completed / report.duration},
      {"request_goodput", o.goodput.empty() ? OrderedJson() : OrderedJson(Goodput(report))},
      {"output_throughput", output / report.duration},
      {"total_token_throughput", (input + output) / report.duration},
      {"max_output_tokens_per_s", totals.peak_output},
      {"max_concurrent_requests", report.max_concurrent},
      {"rtfx", 0.0}};
  for (const std::string& metric : o.percentile_metrics) {
    const Summary summary = Summarise(Values(report, metric), o.metric_percentiles);
    json[fmt::format("mean_{}_ms", metric)] = summary.mean;
    json[fmt::format("median_{}_ms", metric)] = summary.median;
    json[fmt::format("std_{}_ms", metric)] = summary.std;
    for (size_t i = 0; i < summary.percentiles.size(); ++i)
      json[fmt::format("p{}_{}_ms", o.metric_percentiles[i], metric)] = summary.percentiles[i];
  }
  for (const auto& [key, value] : o.metadata) json[key] = value;
  if (detailed) AddRequests(json, report);
  if (const auto& cost = report.cost) {
    json["octavo_steps"] = static_cast<int64_t>(cost->steps);
    json["octavo_model_ms_per_step"] = PerStep(*cost, cost->model_seconds);
    json["octavo_loop_ms_per_step"] = PerStep(*cost, cost->loop_seconds);
    json["octavo_server_cpu_ms_per_step"] = PerStep(*cost, cost->cpu_seconds);
    json["octavo_overhead_ms_per_step"] = PerStep(*cost, cost->loop_seconds + cost->cpu_seconds);
  }
  return json.dump(2, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
}

}  // namespace octavo
