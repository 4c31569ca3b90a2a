#include "eval/bench_throughput.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <random>

#include <fmt/format.h>

#include "base/error.h"
#include "engine/executor.h"
#include "eval/variant.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "models/config.h"
#include "text/tokenizer.h"

namespace octavo {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRandomPrompts = 64;

Request MakeRequest(std::vector<int32_t> prompt, int output_len) {
  return {.prompt = std::move(prompt),
          .sampling = {.max_tokens = output_len, .temperature = 0, .ignore_eos = true}};
}

std::vector<Request> RandomRequests(const ThroughputBenchOptions& options, int64_t vocab) {
  std::mt19937_64 random(options.seed);
  const auto draw = [&](int64_t length) {
    const double r = options.random_range_ratio, x = static_cast<double>(length);
    return std::uniform_int_distribution<int64_t>(
        std::max<int64_t>(1, static_cast<int64_t>(std::floor(x * (1 - r)))),
        static_cast<int64_t>(std::ceil(x * (1 + r))))(random);
  };
  std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(vocab) - 1);
  std::vector<Request> requests;
  const int count = options.num_prompts ? options.num_prompts : kRandomPrompts;
  for (int i = 0; i < count; ++i) {
    std::vector<int32_t> prompt(draw(options.input_len));
    for (int32_t& id : prompt) id = token(random);
    requests.push_back(MakeRequest(std::move(prompt), static_cast<int>(draw(options.output_len))));
  }
  return requests;
}

std::vector<Request> DatasetRequests(const ThroughputBenchOptions& options) {
  const Tokenizer tokenizer = Tokenizer::FromFolder(options.engine.model);
  const MappedFile file(options.dataset);
  const bool jsonl = options.dataset.ends_with(".jsonl");
  std::vector<Request> requests;
  std::string_view rest = file.bytes();
  for (int number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    const std::string where = fmt::format("{}:{}", options.dataset, number);
    std::string text(line);
    if (jsonl) {
      const Json object = ParseJson(line, where);
      const Json prompt = object.is_object() ? object.value("prompt", Json()) : Json();
      if (!prompt.is_string()) {
        throw Error(ErrorCode::kInvalidArgument,
                    fmt::format("{}: expected an object with a string \"prompt\", found {}", where,
                                Describe(object.is_object() ? prompt : object)));
      }
      text = prompt.get<std::string>();
    }
    std::vector<int32_t> ids = tokenizer.Encode(text);
    Require(!ids.empty(), where, "a prompt of at least one token", "none");
    requests.push_back(MakeRequest(std::move(ids), options.output_len));
    if (std::ssize(requests) == options.num_prompts) break;
  }
  Require(!requests.empty() &&
              (options.num_prompts == 0 || std::ssize(requests) == options.num_prompts),
          options.dataset,
          options.num_prompts ? fmt::format("{} prompts (--num-prompts)", options.num_prompts)
                              : "a prompt per line",
          requests.size());
  return requests;
}

int64_t Longest(const std::vector<Request>& requests) {
  int64_t longest = 0;
  for (const Request& r : requests)
    longest = std::max(longest, std::ssize(r.prompt) + r.sampling.max_tokens);
  return longest;
}

// What the engine's loop tells the thread that waits. It outlives the wait where Submit throws.
struct Tally {
  std::mutex mutex;
  std::condition_variable changed;
  int finished = 0;
  int64_t output_tokens = 0;
  std::string error;  // of the first request that failed
};

// Runs all to their ends; returns the tokens generated.
int64_t RunAll(Engine& engine, const std::vector<Request>& requests,
               const std::function<void(int finished)>& progress) {
  const auto tally = std::make_shared<Tally>();
  for (const Request& request : requests) {
    engine.Submit(request, [tally](const Event& event) {
      std::lock_guard lock(tally->mutex);
      if (event.kind == Event::Kind::kToken) ++tally->output_tokens;
      if (event.kind != Event::Kind::kFinished) return;
      ++tally->finished;
      if (tally->error.empty()) tally->error = event.error;
      tally->changed.notify_one();
    });
  }
  const int all = static_cast<int>(requests.size());
  std::unique_lock lock(tally->mutex);
  for (int seen = 0; seen < all && tally->error.empty();) {
    tally->changed.wait(lock, [&] { return tally->finished > seen; });
    seen = tally->finished;
    lock.unlock();
    progress(seen);
    lock.lock();
  }
  if (!tally->error.empty()) {
    throw Error(ErrorCode::kResourceExhausted, fmt::format("bench throughput: {}", tally->error));
  }
  return tally->output_tokens;
}

ThroughputVariant RunVariant(Engine& engine, const std::string& name,
                             const std::vector<Request>& requests,
                             const std::function<void(int finished)>& progress) {
  RunAll(engine, {MakeRequest({requests[0].prompt[0]}, 2)}, [](int) {});
  ThroughputVariant v{.name = name, .requests = std::ssize(requests)};
  int64_t expected = 0;
  for (const Request& request : requests) {
    v.prompt_tokens += std::ssize(request.prompt);
    expected += request.sampling.max_tokens;
  }
  const Clock::time_point start = Clock::now();
  v.output_tokens = RunAll(engine, requests, progress);
  v.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  OCTAVO_CHECK(v.output_tokens == expected, v.output_tokens, expected);
  const EngineStats stats = engine.stats();
  v.preemptions = stats.preemptions;
  v.peak_running = stats.peak_running;
  v.cache_bytes = stats.cache_bytes;
  v.cache_tokens = stats.cache_tokens;
  return v;
}

}  // namespace

std::vector<Request> ThroughputRequests(const ThroughputBenchOptions& options,
                                        const ModelSpec& spec) {
  for (const auto& [flag, length] :
       {std::pair<const char*, int64_t>{"--input-len", options.input_len},
        {"--output-len", options.output_len}}) {
    Require(
        length >= 1 && length <= spec.max_position_embeddings, flag,
        fmt::format("1 to the model's max_position_embeddings, {}", spec.max_position_embeddings),
        length);
  }
  Require(options.num_prompts >= 0, "--num-prompts", "at least 0", options.num_prompts);
  Require(options.random_range_ratio >= 0 && options.random_range_ratio < 1, "--random-range-ratio",
          "a number in [0, 1)", options.random_range_ratio);
  std::vector<Request> requests =
      options.dataset.empty() ? RandomRequests(options, spec.vocab) : DatasetRequests(options);
  Require(
      Longest(requests) <= spec.max_position_embeddings,
      options.dataset.empty() ? "--input-len" : options.dataset,
      fmt::format("prompts that fit with --output-len in the model's max_position_embeddings, {}",
                  spec.max_position_embeddings),
      fmt::format("{} tokens", Longest(requests)));
  return requests;
}

ThroughputReport BenchThroughput(const ThroughputBenchOptions& options,
                                 const ThroughputProgress& progress) {
  Require(!options.variants.empty(), "--kv-cache-dtypes", "at least one", "none");
  const ModelSpec spec = ReadModelSpec(options.engine.model);
  const std::vector<Request> requests = ThroughputRequests(options, spec);
  std::vector<EngineOptions> engines;
  for (const std::string& name : options.variants) {
    EngineOptions engine = WithVariant(options.engine, name);
    engine.enable_prefix_caching = false;
    engine.max_model_len = Longest(requests);
    CheckOptions(engine, spec);  // of the last one too, before the first has run
    engines.push_back(std::move(engine));
  }
  ThroughputReport report{.model = options.engine.model, .device = {}, .variants = {}};
  const int count = static_cast<int>(requests.size()), all = count * std::ssize(engines);
  std::shared_ptr<const LoadedModel> model;
  for (size_t i = 0; i < engines.size(); ++i) {
    if (i > 0 && engines[i].kv_cache_memory_bytes == 0)
      engines[i].kv_cache_memory_bytes = report.variants[0].cache_bytes;
    const std::unique_ptr<Engine> engine = Engine::Create(engines[i], model);
    model = engine->model();
    report.device = model->device;
    report.variants.push_back(RunVariant(*engine, options.variants[i], requests, [&](int finished) {
      if (progress) progress(static_cast<int>(i) * count + finished, all);
    }));
  }
  return report;
}

std::string ThroughputTable(const ThroughputReport& report) {
  std::string out =
      fmt::format("{}, {}: {} requests, {} prompt tokens\n\n", report.model, report.device,
                  report.variants[0].requests, report.variants[0].prompt_tokens);
  out += fmt::format("{:<28} {:>9} {:>11} {:>10} {:>12} {:>7} {:>12} {:>13} {:>11}\n", "variant",
                     "seconds", "requests/s", "tokens/s", "output tok/s", "ratio", "peak running",
                     "cache tokens", "preemptions");
  for (const ThroughputVariant& v : report.variants) {
    out += fmt::format(
        "{:<28} {:>9.2f} {:>11.2f} {:>10.1f} {:>12.1f} {:>7.3f} {:>12} {:>13} {:>11}\n", v.name,
        v.seconds, v.PerSecond(v.requests), v.PerSecond(v.tokens()), v.PerSecond(v.output_tokens),
        report.variants[0].seconds / v.seconds, v.peak_running, v.cache_tokens, v.preemptions);
  }
  return out;
}

std::string ThroughputJson(const ThroughputReport& report) {
  nlohmann::ordered_json variants = nlohmann::ordered_json::array();
  for (const ThroughputVariant& v : report.variants) {
    variants.push_back({{"variant", v.name},
                        {"elapsed_time", v.seconds},
                        {"num_requests", v.requests},
                        {"total_num_tokens", v.tokens()},
                        {"requests_per_second", v.PerSecond(v.requests)},
                        {"tokens_per_second", v.PerSecond(v.tokens())},
                        {"output_tokens_per_second", v.PerSecond(v.output_tokens)},
                        {"ratio_to_first", report.variants[0].seconds / v.seconds},
                        {"num_preemptions", v.preemptions},
                        {"peak_running", v.peak_running},
                        {"cache_bytes", v.cache_bytes},
                        {"cache_tokens", v.cache_tokens}});
  }
  const nlohmann::ordered_json all = {
      {"model", report.model}, {"device", report.device}, {"variants", std::move(variants)}};
  return all.dump(2) + "\n";
}

}  // namespace octavo
