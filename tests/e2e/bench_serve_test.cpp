// `octavo bench serve` against `octavo serve`, and against servers that misbehave.
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "io/json.h"
#include "server.h"

namespace octavo {
namespace {

namespace fs = std::filesystem;

struct Outcome {
  int code = -1;
  std::string text;  // stdout and stderr
  Json json;         // the result file, if one was written
};

class BenchServeTest : public ::testing::Test {
 protected:
  BenchServeTest() {
    std::string pattern = (fs::temp_directory_path() / "octavo-bench-XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
  }
  ~BenchServeTest() override { fs::remove_all(folder_); }

  Outcome Run(int port, const std::string& flags) {
    const fs::path result = folder_ / "result.json";
    const std::string command = "timeout 120 " + std::string(OCTAVO_PROGRAM) +
                                " bench serve --port " + std::to_string(port) +
                                " --save-result --save-detailed --result-filename result.json" +
                                " --result-dir " + folder_.string() + " " + flags + " 2>&1";
    Outcome outcome;
    FILE* pipe = popen(command.c_str(), "r");
    std::array<char, 4096> buffer;
    while (const size_t n = fread(buffer.data(), 1, buffer.size(), pipe))
      outcome.text.append(buffer.data(), n);
    const int status = pclose(pipe);
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    EXPECT_EQ(outcome.text.find("Sanitizer"), std::string::npos) << outcome.text;
    if (fs::exists(result)) outcome.json = ReadJsonFile(result);
    fs::remove(result);
    return outcome;
  }

  fs::path folder_;
};

double Metric(int port, const std::string& name) {
  const std::string text = Exchange(port, Get("/metrics")).body;
  const size_t line = text.find("\n" + name + "{");
  if (line == text.npos) return -1;
  return std::stod(text.substr(text.find("} ", line) + 2));
}

int64_t Sum(const Json& numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), int64_t{0},
                         [](int64_t sum, const Json& n) { return sum + n.get<int64_t>(); });
}

TEST_F(BenchServeTest, ClosedLoopHasAllFieldsAndItsTokensAddUp) {
  Server server({"--max-num-seqs", "8"});
  const Outcome run = Run(server.port(),
                          "--num-prompts 24 --max-concurrency 6 --random-input-len 40 "
                          "--random-output-len 12 --random-range-ratio 0.5 --ignore-eos "
                          "--percentile-metrics ttft,tpot,itl,e2el --metric-percentiles 50,99.9");
  ASSERT_EQ(run.code, 0) << run.text;
  const Json& json = run.json;
  std::set<std::string> expected = {"date",
                                    "endpoint_type",
                                    "backend",
                                    "label",
                                    "model_id",
                                    "tokenizer_id",
                                    "num_prompts",
                                    "request_rate",
                                    "burstiness",
                                    "max_concurrency",
                                    "duration",
                                    "completed",
                                    "failed",
                                    "total_input_tokens",
                                    "total_output_tokens",
                                    "request_throughput",
                                    "request_goodput",
                                    "output_throughput",
                                    "total_token_throughput",
                                    "max_output_tokens_per_s",
                                    "max_concurrent_requests",
                                    "rtfx",
                                    "input_lens",
                                    "output_lens",
                                    "ttfts",
                                    "itls",
                                    "start_times",
                                    "generated_texts",
                                    "errors",
                                    "octavo_steps",
                                    "octavo_model_ms_per_step",
                                    "octavo_loop_ms_per_step",
                                    "octavo_server_cpu_ms_per_step",
                                    "octavo_overhead_ms_per_step"};
  for (const char* metric : {"ttft", "tpot", "itl", "e2el"}) {
    for (const char* figure : {"mean", "median", "std", "p50", "p99.9"})
      expected.insert(std::string(figure) + "_" + metric + "_ms");
  }
  std::set<std::string> found;
  for (const auto& [key, value] : json.items()) found.insert(key);
  EXPECT_EQ(found, expected);

  EXPECT_EQ(json["model_id"], "needle");
  EXPECT_EQ(json["completed"], 24);
  EXPECT_EQ(json["failed"], 0);
  EXPECT_EQ(json["max_concurrent_requests"], 6);
  EXPECT_EQ(Sum(json["input_lens"]), json["total_input_tokens"]);
  EXPECT_EQ(Sum(json["output_lens"]), json["total_output_tokens"]);
  // What the server counted.
  EXPECT_EQ(Metric(server.port(), "vllm:generation_tokens_total"), json["total_output_tokens"]);
  EXPECT_EQ(Metric(server.port(), "vllm:prefix_cache_queries_total"), json["total_input_tokens"]);
  EXPECT_EQ(Metric(server.port(), "octavo:engine_steps_total"), json["octavo_steps"]);
  EXPECT_GT(json["octavo_model_ms_per_step"], 0);
  EXPECT_GT(json["octavo_loop_ms_per_step"], 0);
  EXPECT_GT(json["octavo_server_cpu_ms_per_step"], 0);
  for (size_t i = 0; i < 24; ++i) {
    const int64_t input = json["input_lens"][i], output = json["output_lens"][i];
    EXPECT_TRUE(input >= 20 && input <= 60) << input;
    EXPECT_TRUE(output >= 6 && output <= 18) << output;
    EXPECT_LT(json["itls"][i].size(), static_cast<size_t>(output));
    EXPECT_GT(json["ttfts"][i], 0);
    EXPECT_EQ(json["errors"][i], "");
  }
  EXPECT_GT(json["output_lens"].back(), 0);
  EXPECT_GT(json["mean_e2el_ms"], json["mean_ttft_ms"]);
  EXPECT_NE(run.text.find("Server overhead (ms):"), std::string::npos) << run.text;
}

TEST_F(BenchServeTest, OpenLoopOfChatsKeepsItsSchedule) {
  Server server({"--api-key", "secret"});
  const std::string flags =
      "--backend openai-chat --num-prompts 10 --num-warmups 2 --request-rate 50 "
      "--burstiness 0.5 --random-input-len 30 --random-output-len 4 --ignore-eos --temperature 0 "
      "--extra-body '{\"max_tokens\": 3}' --metadata chip=none rule=a=b --goodput e2el:1e9 "
      "--seed 5 --tokenizer " OCTAVO_SOURCE_DIR "/checkpoints/needle";
  const Outcome refused = Run(server.port(), flags);
  EXPECT_EQ(refused.code, 2) << refused.text;
  EXPECT_NE(refused.text.find("HTTP 401"), std::string::npos) << refused.text;

  const Outcome run = Run(server.port(), flags + " --api-key secret");
  ASSERT_EQ(run.code, 0) << run.text;
  EXPECT_EQ(run.json["completed"], 10);
  EXPECT_EQ(run.json["total_output_tokens"], 30);  // max_tokens is the extra body's
  EXPECT_GT(run.json["total_input_tokens"], 0);
  EXPECT_EQ(run.json["backend"], "openai-chat");
  EXPECT_EQ(run.json["chip"], "none");
  EXPECT_EQ(run.json["rule"], "a=b");
  EXPECT_EQ(run.json["request_goodput"], run.json["request_throughput"]);
  const std::vector<double> starts = run.json["start_times"];
  EXPECT_TRUE(std::is_sorted(starts.begin(), starts.end()));
  EXPECT_GE(starts.back(), 10 / 50.0 - 1e-6);  // never early
}

// Answers each request with what `reply` makes of its path, then closes; an empty reply is silence.
// After a reply that promises to keep the connection it waits for the next request's first byte and
// closes on that.
class ScriptedServer {
 public:
  using Script = std::function<std::string(const std::string& path)>;

  explicit ScriptedServer(Script reply)
      : reply_(std::move(reply)), listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_, 64), 0);
    socklen_t size = sizeof(address);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Accept(); });
  }
  ~ScriptedServer() {
    shutdown(listener_, SHUT_RDWR);  // wakes accept
    thread_.join();
    close(listener_);
    for (const int fd : silent_) close(fd);
  }
  ScriptedServer(const ScriptedServer&) = delete;

  int port() const { return port_; }

 private:
  void Accept() {
    for (;;) {
      const int fd = accept(listener_, nullptr, nullptr);
      if (fd < 0) return;
      const std::string request = Read(fd);
      const size_t space = request.find(' ');
      const std::string reply =
          reply_(request.substr(space + 1, request.find(' ', space + 1) - space - 1));
      if (reply.empty()) {
        silent_.push_back(fd);
        continue;
      }
      send(fd, reply.data(), reply.size(), MSG_NOSIGNAL);
      char byte;
      if (reply.find("keep-alive") != reply.npos) recv(fd, &byte, 1, 0);
      close(fd);
    }
  }

  static std::string Read(int fd) {
    std::string text;
    std::array<char, 4096> buffer;
    for (;;) {
      const size_t end = text.find("\r\n\r\n");
      if (end != text.npos) {
        const size_t length = text.find("Content-Length: ");
        const size_t body = length == text.npos ? 0 : std::stoul(text.substr(length + 16));
        if (text.size() >= end + 4 + body) return text;
      }
      const ssize_t n = recv(fd, buffer.data(), buffer.size(), 0);
      if (n <= 0) return text;
      text.append(buffer.data(), static_cast<size_t>(n));
    }
  }

  const Script reply_;
  const int listener_;
  int port_ = 0;
  std::vector<int> silent_;  // the thread's, then the destructor's
  std::thread thread_;
};

std::string Whole(const std::string& status, const std::string& body) {
  return "HTTP/1.1 " + status +
         "\r\nConnection: close\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
         body;
}

// Its end is the connection's.
std::string Stream(const std::string& body) {
  return "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body;
}

const char* const kToken = "data: {\"choices\": [{\"text\": \"a\"}]}\n\n";
const char* const kDone = "data: [DONE]\n\n";

ScriptedServer::Script WithModel(ScriptedServer::Script completions) {
  return [completions](const std::string& path) {
    if (path == "/v1/models") return Whole("200 OK", R"({"data": [{"id": "m"}]})");
    if (path == "/v1/completions") return completions(path);
    return Whole("404 Not Found", "");
  };
}

TEST_F(BenchServeTest, FailuresAreCountedAndTheFirstIsSaid) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {Whole("500 Internal Server Error", R"({"error": {"message": "broken"}})"),
       "HTTP 500: 'broken'"},
      {Stream(kToken), "the stream ended without [DONE]"},
      {Stream(kDone), "the answer is empty"},
      {Stream("data: {\"error\": {\"message\": \"no pages\"}}\n\n"), "'no pages'"},
      {Stream("data: nonsense\n\n"), "not valid JSON"},
      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n", "partial message"},
      {"220 mail.example.org ESMTP\r\n\r\n", "bad version"},
      {"", "said nothing for 0.3 s"}};
  for (const auto& [reply, message] : cases) {
    ScriptedServer server(WithModel([&reply = reply](const auto&) { return reply; }));
    const std::string patience = reply.empty() ? " --request-timeout-sec 0.3" : "";
    const Outcome run = Run(server.port(), "--num-prompts 3" + patience);
    EXPECT_EQ(run.code, 1) << run.text;
    EXPECT_EQ(run.json["completed"], 0);
    EXPECT_EQ(run.json["failed"], 3);
    EXPECT_FALSE(run.json.contains("octavo_steps"));
    EXPECT_NE(run.text.find("3 of 3 requests failed, the first with: "), std::string::npos)
        << run.text;
    EXPECT_NE(run.text.find(message), std::string::npos) << message << "\n" << run.text;
  }
}

TEST_F(BenchServeTest, OthersCountWhereSomeFail) {
  std::atomic<int> asked = 0;
  ScriptedServer server(WithModel([&](const auto&) {
    return ++asked % 2 ? Stream(std::string(kToken) + kToken + kDone)
                       : Whole("503 Service Unavailable", "full");
  }));
  const Outcome run =
      Run(server.port(), "--num-prompts 4 --max-concurrency 1 --random-input-len 7");
  EXPECT_EQ(run.code, 0) << run.text;
  EXPECT_EQ(run.json["errors"], Json({"", "HTTP 503: 'full'", "", "HTTP 503: 'full'"}));
  EXPECT_EQ(run.json["total_output_tokens"], 4);  // as counted here: this server says no usage
  EXPECT_EQ(run.json["total_input_tokens"], 14);
}

TEST_F(BenchServeTest, AConnectionClosedAsTheRequestLeavesIsNoFailure) {
  const std::string body = std::string(kToken) + kDone;
  const std::string reply = "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: " +
                            std::to_string(body.size()) + "\r\n\r\n" + body;
  ScriptedServer server(WithModel([&](const auto&) { return reply; }));
  const Outcome run =
      Run(server.port(), "--num-prompts 4 --max-concurrency 1 --random-input-len 7");
  EXPECT_EQ(run.code, 0) << run.text;
  EXPECT_EQ(run.json["completed"], 4);
}

TEST_F(BenchServeTest, WaitsForAServerThatLoads) {
  std::atomic<int> asked = 0;
  const auto model = WithModel([](const auto&) { return Stream(std::string(kToken) + kDone); });
  ScriptedServer server([&](const std::string& path) {
    return path == "/v1/models" && ++asked < 3 ? Whole("503 Service Unavailable", "loading")
                                               : model(path);
  });
  const Outcome run = Run(server.port(), "--num-prompts 1");
  EXPECT_EQ(run.code, 0) << run.text;
  EXPECT_EQ(asked, 3);
}

TEST_F(BenchServeTest, RefusesInOneLine) {
  ScriptedServer silent([](const auto&) { return ""; });
  ScriptedServer no_models([](const auto&) { return Whole("404 Not Found", "gone"); });
  for (const auto& [port, flags, message] : std::vector<std::tuple<int, std::string, std::string>>{
           {1, "--ready-check-timeout-sec 0", "--base-url: no server is ready after 0 s: "},
           {silent.port(), "--ready-check-timeout-sec 0", "said nothing for 1 s"},
           {no_models.port(), "", "--model: not given, and /v1/models names none: HTTP 404 'gone'"},
           {1, "--base-url https://x", "expected http://host[:port][/path], found 'https://x'"},
           {1, "--base-url http://x:70000", "--base-url: expected"},
           {1, "--random-range-ratio 1", "--random-range-ratio: expected a number in [0, 1)"},
           {1, "--request-rate 0", "--request-rate: expected at least 0.01 per second, or inf"},
           {1, "--goodput ttft:20 itl:3",
            "--goodput: expected ttft:MS, tpot:MS or e2el:MS, found itl:3"},
           {1, "--backend openai-chat --endpoint /v1/completions",
            "--backend: expected openai, for such an --endpoint, found 'openai-chat'"},
           {1, "--extra-body [1]", "--extra-body: expected a JSON object, found array"},
           {1, "--extra-body {", "--extra-body: "},
           {1, "--metadata chip", "--metadata: expected KEY=VALUE, found chip"},
           {1, "--goodput e2el:1s", "found e2el:1s"},
           {1, "--goodput tpot:nan", "--goodput: expected tpot in milliseconds, at least 0, found"},
           {1, "--burstiness nan", "--burstiness: expected a number in [0.01, 1e6]"},
           {1, "--random-input-len 0", "--random-input-len: expected lengths"},
           {1, "--dataset-name sharegpt", "--dataset-name"},
           {1, "--tokenizer /nowhere", "/nowhere"}}) {
    const Outcome run = Run(port, flags);
    EXPECT_EQ(run.code, 2) << flags << "\n" << run.text;
    EXPECT_TRUE(run.json.is_null()) << run.json;  // nor an empty file
    EXPECT_EQ(std::count(run.text.begin(), run.text.end(), '\n'), 1) << run.text;
    EXPECT_NE(run.text.find(message), std::string::npos) << message << "\n" << run.text;
  }
}

}  // namespace
}  // namespace octavo
