#include "server/bench_serve.h"

#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"
#include "server/completion_stream.h"
#include "server/http_client.h"
#include "text/tokenizer.h"

namespace octavo {
namespace {

using Clock = HttpClient::Clock;

constexpr int32_t kSafeVocab = 256;  // ids that every vocabulary has
constexpr double kMaxSeconds = 1e6;
constexpr auto kReadyCheckPause = std::chrono::milliseconds(500);

Clock::duration Duration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

void CheckOptions(const ServeBenchOptions& o) {
  Require(o.endpoint.starts_with('/'), "--endpoint", "a path that begins with /",
          Quote(o.endpoint));
  Require(o.backend.empty() || (o.backend == "openai-chat") == o.is_chat(), "--backend",
          o.is_chat() ? "openai-chat, for such an --endpoint" : "openai, for such an --endpoint",
          Quote(o.backend));
  Require(o.random_range_ratio >= 0 && o.random_range_ratio < 1, "--random-range-ratio",
          "a number in [0, 1)", o.random_range_ratio);
  Require(o.request_rate >= 0.01, "--request-rate", "at least 0.01 per second, or inf",
          o.request_rate);
  Require(o.burstiness >= 0.01 && o.burstiness <= 1e6, "--burstiness", "a number in [0.01, 1e6]",
          o.burstiness);
  Require(o.ready_check_timeout_sec >= 0 && o.ready_check_timeout_sec <= kMaxSeconds,
          "--ready-check-timeout-sec", "seconds in [0, 1e6]", o.ready_check_timeout_sec);
  Require(o.request_timeout_sec > 0 && o.request_timeout_sec <= kMaxSeconds,
          "--request-timeout-sec", "seconds in (0, 1e6]", o.request_timeout_sec);
  for (const double p : o.metric_percentiles)
    Require(p >= 0 && p <= 100, "--metric-percentiles", "numbers in [0, 100]", p);
  for (const auto& [metric, ms] : o.goodput)
    Require(ms >= 0, "--goodput", metric + " in milliseconds, at least 0", ms);
}

// What a chat is sent for random ids without a tokenizer: words of a letter, about a token each.
std::string Letters(std::span<const int32_t> ids) {
  std::string text;
  for (const int32_t id : ids) {
    text += static_cast<char>('a' + id % 26);
    text += ' ';
  }
  return text;
}

Json ExtraBody(const ServeBenchOptions& o) {
  if (o.extra_body.empty()) return Json::object();
  const Json extra = ParseJson(o.extra_body, "--extra-body");
  Require(extra.is_object(), "--extra-body", "a JSON object", extra.type_name());
  return extra;
}

std::string RequestBody(const ServeBenchOptions& o, const Json& extra, const std::string& model,
                        const std::optional<Tokenizer>& tokenizer, const RandomPrompt& prompt) {
  Json body = {{"model", model},
               {"max_tokens", prompt.output_len},
               {"stream", true},
               {"stream_options", {{"include_usage", true}}}};
  if (o.is_chat()) {
    const std::string text = tokenizer ? tokenizer->Decode(prompt.ids) : Letters(prompt.ids);
    body["messages"] = Json::array({{{"role", "user"}, {"content", text}}});
  } else {
    body["prompt"] = prompt.ids;
  }
  if (o.temperature) body["temperature"] = *o.temperature;
  if (o.ignore_eos) body["ignore_eos"] = true;
  body.update(extra);
  return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string FirstModel(const HttpReply& reply) {
  if (reply.status == 200) {
    try {
      return ParseJson(reply.body, "/v1/models").at("data").at(0).at("id").get<std::string>();
    } catch (const Json::exception&) {
      // Said below.
    }
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--model: not given, and /v1/models names none: HTTP {} {}", reply.status,
                          ErrorMessage(reply.body)));
}

HttpClient Connect(const ServeBenchOptions& o, double timeout_sec) {
  return HttpClient(
      {.base_url = o.base_url,
       .api_key = o.api_key,
       .timeout = std::chrono::duration_cast<std::chrono::milliseconds>(Duration(timeout_sec))});
}

// The model to ask for, once the server answers. One that is still loading says 503.
std::string WaitUntilReady(const ServeBenchOptions& o) {
  const Clock::time_point end = Clock::now() + Duration(o.ready_check_timeout_sec);
  HttpClient client = Connect(o, std::max(o.ready_check_timeout_sec, 1.0));
  for (;;) {
    const HttpReply reply = client.Get("/v1/models");
    if (reply.error.empty() && reply.status < 500)
      return o.model.empty() ? FirstModel(reply) : o.model;
    if (Clock::now() + kReadyCheckPause > end) {
      const std::string why =
          reply.error.empty() ? fmt::format("HTTP {}", reply.status) : reply.error;
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--base-url: no server is ready after {} s: {}",
                              o.ready_check_timeout_sec, why));
    }
    client.At(Clock::now() + kReadyCheckPause, [] {});
    client.Run();
  }
}

// Sends requests as they are due, at most so many at a time.
class Load {
 public:
  // `due`: seconds from Run on, in order.
  Load(HttpClient& client, const ServeBenchOptions& options, std::span<const std::string> bodies,
       std::span<const double> due, const ServeProgress& progress)
      : client_(client),
        options_(options),
        bodies_(bodies),
        due_(due),
        progress_(progress),
        requests_(bodies.size()) {}

  void Run() {
    start_ = Clock::now();
    Advance();
    client_.Run();
  }

  double Seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  int max_concurrent() const { return max_concurrent_; }
  std::vector<ServedRequest> TakeRequests() { return std::move(requests_); }

 private:
  void Advance() {
    while (arrived_ < due_.size() && due_[arrived_] <= Seconds()) ++arrived_;
    const int limit = options_.max_concurrency;
    while (sent_ < arrived_ && (limit == 0 || running_ < limit)) Start(sent_++);
    // One timer at a time, for the next that is to arrive.
    if (arrived_ < due_.size() && !waiting_) {
      waiting_ = true;
      client_.At(start_ + Duration(due_[arrived_]), [this] {
        waiting_ = false;
        Advance();
      });
    }
  }

  void Start(size_t index) {
    auto answer = std::make_shared<Answer>();
    max_concurrent_ = std::max(max_concurrent_, ++running_);
    requests_[index].start = Seconds();
    client_.Send(
        options_.endpoint, bodies_[index],
        [this, index, answer](const HttpReply& reply) {
          End(requests_[index], reply, *answer);
          --running_;
          if (progress_) progress_(++ended_, static_cast<int>(requests_.size()));
          Advance();
        },
        [this, answer](std::string_view bytes) {
          if (!answer->error.empty()) return;
          try {
            answer->stream.Push(bytes, Seconds());
          } catch (const Error& error) {
            answer->error = error.message();
          }
        });
  }

  struct Answer {
    CompletionStream stream;
    std::string error;
  };

  static void End(ServedRequest& request, const HttpReply& reply, const Answer& answer) {
    const CompletionStream& stream = answer.stream;
    const std::vector<double>& times = stream.times();
    if (!reply.error.empty()) {
      request.error = reply.error;
    } else if (reply.status != 200) {
      request.error = fmt::format("HTTP {}: {}", reply.status, ErrorMessage(reply.body));
    } else if (!answer.error.empty()) {
      request.error = answer.error;
    } else if (!stream.done()) {
      request.error = "the stream ended without [DONE]";
    } else if (times.empty()) {
      request.error = "the answer is empty";
    }
    request.text = stream.text();
    if (!request.error.empty()) return;
    request.input_len = stream.prompt_tokens().value_or(-1);
    request.output_len = stream.completion_tokens().value_or(static_cast<int64_t>(times.size()));
    request.ttft = times.front() - request.start;
    request.latency = times.back() - request.start;
    for (size_t i = 1; i < times.size(); ++i) request.itl.push_back(times[i] - times[i - 1]);
  }

  HttpClient& client_;
  const ServeBenchOptions& options_;
  const std::span<const std::string> bodies_;
  const std::span<const double> due_;
  const ServeProgress& progress_;
  std::vector<ServedRequest> requests_;
  Clock::time_point start_;
  size_t arrived_ = 0, sent_ = 0;
  bool waiting_ = false;  // for the next to arrive
  int running_ = 0, max_concurrent_ = 0, ended_ = 0;
};

void WarmUp(HttpClient& client, const ServeBenchOptions& o, std::span<const std::string> bodies) {
  const std::vector<double> at_once(bodies.size());
  const ServeProgress silent;
  Load load(client, o, bodies, at_once, silent);
  load.Run();
  for (const ServedRequest& request : load.TakeRequests()) {
    if (!request.error.empty())
      throw Error(ErrorCode::kInvalidArgument, "a warm-up request failed: " + request.error);
  }
}

std::optional<ServerCost> AskServerCost(HttpClient& client) {
  const HttpReply reply = client.Get("/metrics");
  if (!reply.error.empty() || reply.status != 200) return std::nullopt;
  return ReadServerCost(reply.body);
}

}  // namespace

std::optional<ServerCost> ReadServerCost(const std::string& metrics) {
  const auto value = [&](const std::string& name) -> std::optional<double> {
    const size_t line = metrics.find("\n" + name + "{");
    if (line == metrics.npos) return std::nullopt;
    const size_t number = metrics.rfind(' ', metrics.find('\n', line + 1));
    return std::strtod(metrics.c_str() + number, nullptr);
  };
  const auto steps = value("octavo:engine_steps_total");
  const auto model = value("octavo:engine_model_seconds_total");
  const auto loop = value("octavo:engine_loop_seconds_total");
  const auto cpu = value("octavo:server_cpu_seconds_total");
  if (!steps || !model || !loop || !cpu) return std::nullopt;
  return ServerCost{*steps, *model, *loop, *cpu};
}

int ServeReport::completed() const {
  return static_cast<int>(std::count_if(requests.begin(), requests.end(),
                                        [](const auto& one) { return one.error.empty(); }));
}

ServeReport BenchServe(const ServeBenchOptions& options, const ServeProgress& progress) {
  CheckOptions(options);
  const Json extra = ExtraBody(options);
  std::optional<Tokenizer> tokenizer;
  if (!options.tokenizer.empty()) tokenizer = Tokenizer::FromFolder(options.tokenizer);
  const std::vector<RandomPrompt> prompts =
      RandomPrompts(options, options.num_prompts + options.num_warmups,
                    tokenizer ? tokenizer->vocab_size() : kSafeVocab);
  const std::vector<double> due =
      ArrivalTimes(options.num_prompts, options.request_rate, options.burstiness, options.seed);
  ServeReport report{.options = options, .model = WaitUntilReady(options)};
  HttpClient client = Connect(options, options.request_timeout_sec);

  std::vector<std::string> bodies;
  for (const RandomPrompt& prompt : prompts)
    bodies.push_back(RequestBody(options, extra, report.model, tokenizer, prompt));
  WarmUp(client, options, std::span(bodies).subspan(options.num_prompts));
  const std::optional<ServerCost> before = AskServerCost(client);
  Load load(client, options, std::span(bodies).first(options.num_prompts), due, progress);
  load.Run();
  report.duration = load.Seconds();
  report.max_concurrent = load.max_concurrent();
  report.requests = load.TakeRequests();
  const std::optional<ServerCost> after = AskServerCost(client);
  if (before && after) {
    report.cost = ServerCost{
        after->steps - before->steps, after->model_seconds - before->model_seconds,
        after->loop_seconds - before->loop_seconds, after->cpu_seconds - before->cpu_seconds};
  }
  for (size_t i = 0; i < report.requests.size(); ++i) {
    if (report.requests[i].input_len < 0)
      report.requests[i].input_len = static_cast<int64_t>(prompts[i].ids.size());
  }
  return report;
}

}  // namespace octavo
