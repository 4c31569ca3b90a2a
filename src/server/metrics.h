// GET /metrics: Prometheus' text format, with vLLM's names, labels and buckets, so that its
// dashboards work, and with the cache's health per layer. Not thread-safe: the I/O thread counts
// and prints.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "octavo/engine.h"

namespace octavo {

// Cumulative counts of observations at most as large as each bound.
class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds)
      : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}
  // What has been counted elsewhere: as many counts as bounds and one.
  Histogram(std::vector<double> bounds, std::vector<uint64_t> counts, double sum)
      : bounds_(std::move(bounds)), counts_(std::move(counts)), sum_(sum) {}
  void Observe(double value);
  // `labels`: what stands between braces, without "le".
  std::string Text(const std::string& name, const std::string& help,
                   const std::string& labels) const;

 private:
  std::vector<double> bounds_;
  std::vector<uint64_t> counts_;  // not cumulative; the last: beyond all bounds
  double sum_ = 0;
};

// A request of the engine that has ended: one choice of one prompt.
struct Finished {
  std::string reason;
  double seconds = 0;                                                 // since it arrived
  double queue_seconds = 0, prefill_seconds = 0, decode_seconds = 0;  // as Event has them
  int64_t prompt_tokens = 0, cached_tokens = 0, output_tokens = 0;
  int64_t max_tokens = 0;  // as asked for
};

class Metrics {
 public:
  Metrics(const std::string& model_name, int64_t max_model_len);
  void Count(const Finished& request);
  // All choices of a prompt are finished; `output_tokens`: of the longest.
  void CountPrompt(int choices, int64_t output_tokens);
  void FirstToken(double seconds) { ttft_.Observe(seconds); }
  void NextToken(double seconds) { itl_.Observe(seconds); }
  // Processor time of the server beside the engine.
  void SetCpuSeconds(double seconds) { cpu_seconds_ = seconds; }

  std::string Text(const EngineOptions& options, const EngineStats& stats,
                   std::span<const LayerCacheReport> layers) const;

 private:
  const std::string labels_;  // of every metric
  std::map<std::string, uint64_t> finished_ = {
      {"abort", 0}, {"error", 0}, {"length", 0}, {"stop", 0}};
  double cpu_seconds_ = 0;
  Histogram ttft_, itl_, tpot_, e2e_, queue_, inference_, prefill_, decode_, prompt_tokens_,
      computed_tokens_, output_tokens_, most_output_tokens_, max_tokens_, choices_;
};

// Layers in which elements have saturated that had not in `before`: a line for each, which says
// what to do about it. `before` becomes `now`.
std::vector<std::string> SaturationWarnings(std::vector<LayerCacheReport>& before,
                                            std::vector<LayerCacheReport> now);

}  // namespace octavo
