// octavo bench serve: sends random prompts to any OpenAI-compatible server, on a schedule (open
// loop) or so many at a time (closed loop), and measures when each token comes.
//
// Options and JSON fields are those of `vllm bench serve`, and so are their meanings: ttft to the
// first token, tpot (e2el - ttft) / (tokens - 1), itl between tokens, e2el to the last token.
// One thread does it all; errors of single requests are counted, not thrown.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace octavo {

struct ServeBenchOptions {
  std::string base_url;                      // http://host[:port][/path]
  std::string endpoint = "/v1/completions";  // or one that ends in /chat/completions
  std::string backend;  // as the result names it: vllm or openai, openai-chat; empty: by endpoint
  std::string api_key;
  std::string model;      // empty: the first of /v1/models
  std::string tokenizer;  // a folder with tokenizer.json; empty: ids below 256
  int64_t random_input_len = 1024, random_output_len = 128;  // tokens
  double random_range_ratio = 0;  // lengths are uniform in [(1 - r) L, (1 + r) L]; below 1
  int num_prompts = 1000;
  int num_warmups = 0;  // requests before, which are not measured
  double request_rate = std::numeric_limits<double>::infinity();  // per second
  double burstiness = 1;    // shape of the gamma distribution of gaps; 1: Poisson arrivals
  int max_concurrency = 0;  // 0: no limit
  bool ignore_eos = false;
  std::optional<double> temperature;  // absent: the server's default
  std::string extra_body;             // a JSON object of more fields for every request; or empty
  uint64_t seed = 0;
  double ready_check_timeout_sec = 600;
  double request_timeout_sec = 600;                                       // of silence
  std::vector<std::string> percentile_metrics = {"ttft", "tpot", "itl"};  // and e2el
  std::vector<double> metric_percentiles = {99};
  // A request is good whose metrics (ttft, tpot, e2el) take at most so many milliseconds.
  std::map<std::string, double> goodput;
  std::vector<std::pair<std::string, std::string>> metadata;  // fields for the result

  bool is_chat() const { return endpoint.ends_with("/chat/completions"); }
};

struct RandomPrompt {
  std::vector<int32_t> ids;
  int64_t output_len = 0;  // max_tokens
};
// Ids are uniform in [0, vocab). Throws Error for lengths that cannot be.
std::vector<RandomPrompt> RandomPrompts(const ServeBenchOptions& options, int count, int32_t vocab);

// Seconds from the start at which `count` requests are due, in order. Gaps are gamma distributed
// with mean 1 / rate and squared variation 1 / burstiness, then scaled so that the last is due at
// count / rate exactly.
std::vector<double> ArrivalTimes(int count, double rate, double burstiness, uint64_t seed);

struct ServedRequest {
  int64_t input_len = 0, output_len = 0;  // tokens: what the server says, or what is known here
  double start = 0;                       // seconds since the benchmark's start
  double ttft = 0, latency = 0;           // seconds from `start`: to the first and the last token
  std::vector<double> itl;                // seconds
  std::string text;
  std::string error;  // empty: it succeeded
};

// What Octavo's /metrics say of the time between two moments.
struct ServerCost {
  double steps = 0;
  double model_seconds = 0;  // in the model: forward and sampling
  double loop_seconds = 0;   // in the engine's loop outside of it: scheduling, events
  double cpu_seconds = 0;    // processor time of HTTP, JSON, templates, tokenising
};
std::optional<ServerCost> ReadServerCost(const std::string& metrics);  // since the server's start

struct ServeReport {
  ServeBenchOptions options;
  std::string model;
  double duration = 0;  // seconds
  int max_concurrent = 0;
  std::vector<ServedRequest> requests;
  std::optional<ServerCost> cost;  // if the server is Octavo

  int completed() const;
};

using ServeProgress = std::function<void(int done, int all)>;
// Throws Error if the options are wrong or the server does not become ready or fails in a
// warm-up.
ServeReport BenchServe(const ServeBenchOptions& options, const ServeProgress& progress = nullptr);

struct Summary {
  double mean = 0, median = 0, std = 0;  // of the population
  std::vector<double> percentiles;       // as asked for, interpolated linearly
};
// All 0 without values.
Summary Summarise(std::vector<double> values, std::span<const double> percentiles);

std::string ServeTable(const ServeReport& report);
// `date` as it shall stand there; `detailed`: with every request.
std::string ServeJson(const ServeReport& report, const std::string& date, bool detailed);

}  // namespace octavo
