// `octavo serve` over real sockets, with the shipped model.
#include "server.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "io/json.h"
#include "io/testing.h"

namespace octavo {
namespace {

const char* const kPrompt =
    "The code of amber bell is 123456.\nQuestion: what is the code of amber bell?\nAnswer: ";

const std::string kGoOn = "HTTP/1.1 100 Continue\r\n\r\n";

std::string Completion(Json fields) {
  fields.emplace("prompt", kPrompt);
  fields.emplace("temperature", 0);
  return fields.dump();
}

// The text of a streamed answer, whose pieces are put together.
std::string StreamedText(const std::string& sse) {
  std::string text, last;
  for (size_t at = 0; at < sse.size();) {
    const size_t end = sse.find("\n\n", at);
    EXPECT_EQ(sse.substr(at, 6), "data: ");
    last = sse.substr(at + 6, end - at - 6);
    at = end + 2;
    if (last == "[DONE]") break;
    const Json chunk = Json::parse(last);
    for (const Json& choice : chunk["choices"]) {
      text += choice.contains("delta") ? choice["delta"].value("content", "")
                                       : choice["text"].get<std::string>();
    }
  }
  EXPECT_EQ(last, "[DONE]");
  return text;
}

// What the engine says without a server.
std::string Generated(const std::string& prompt, int max_tokens) {
  const std::string command =
      std::string(OCTAVO_PROGRAM) + " generate --temperature 0 --ignore-eos --max-tokens " +
      std::to_string(max_tokens) + " --prompt-file - <<'EOT'\n" + prompt + "\nEOT";
  FILE* pipe = popen(command.c_str(), "r");
  std::string out;
  std::array<char, 4096> buffer;
  while (const size_t n = fread(buffer.data(), 1, buffer.size(), pipe))
    out.append(buffer.data(), n);
  EXPECT_EQ(pclose(pipe), 0);
  if (!out.empty()) out.pop_back();  // generate ends its text with a newline
  return out;
}

void ExpectServes(int port) {
  const Reply reply = Exchange(port, Post("/v1/completions", Completion(Json::object())));
  EXPECT_EQ(reply.status, 200) << reply.body;
  EXPECT_EQ(reply.json()["choices"][0]["text"], "123456.");
}

// Of the first line that begins so.
double Metric(const std::string& metrics, const std::string& start) {
  const size_t line = metrics.find("\n" + start);
  EXPECT_NE(line, std::string::npos) << start << " is not in\n" << metrics;
  if (line == std::string::npos) return -1;
  const size_t end = metrics.find('\n', line + 1);
  return std::stod(metrics.substr(metrics.rfind(' ', end), end));
}

TEST(ServeTest, AnswersAreTheEnginesOwn) {
  Server server({"--kv-cache-dtype", "fp8"});
  EXPECT_NE(server.log().find("fp8"), std::string::npos) << server.log();
  ExpectServes(server.port());

  const Json chat = {{"messages", {{{"role", "user"}, {"content", kPrompt}}}}, {"temperature", 0}};
  Reply reply = Exchange(server.port(), Post("/v1/chat/completions", chat.dump()));
  ASSERT_EQ(reply.status, 200) << reply.body;
  const Json whole = reply.json();
  EXPECT_EQ(whole["choices"][0]["message"]["content"], "123456.");
  EXPECT_EQ(whole["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(whole["usage"]["completion_tokens"], 8);  // and the end

  Json streamed = chat;
  streamed["stream"] = true;
  reply = Exchange(server.port(), Post("/v1/chat/completions", streamed.dump()));
  EXPECT_NE(reply.head.find("text/event-stream"), std::string::npos) << reply.head;
  EXPECT_EQ(StreamedText(reply.body), "123456.");
}

TEST(ServeTest, StreamedEqualsWholeEqualsGenerate) {
  Server server({});
  const std::string question = "The code of amber bell is 123456.\nQuestion: what is";
  const std::string prompt = question + "\n";  // as the here-document of Generated ends it
  const std::string expected = Generated(question, 200);
  ASSERT_GT(expected.size(), 100u);
  Json fields = {{"prompt", prompt}, {"max_tokens", 200}, {"ignore_eos", true}, {"logprobs", 0}};
  Reply reply = Exchange(server.port(), Post("/v1/completions", Completion(fields)));
  const Json whole = reply.json();
  EXPECT_EQ(whole["choices"][0]["text"], expected);
  EXPECT_EQ(whole["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(whole["choices"][0]["logprobs"]["token_logprobs"].size(), 200u);
  fields["stream"] = true;
  reply = Exchange(server.port(), Post("/v1/completions", Completion(fields)));
  EXPECT_EQ(StreamedText(reply.body), expected);
  // HTTP/1.0 knows no chunks.
  std::string old = Post("/v1/completions", Completion(fields));
  old.replace(old.find("1.1"), 3, "1.0");
  reply = Exchange(server.port(), old);
  EXPECT_EQ(reply.head.find("chunked"), std::string::npos) << reply.head;
  EXPECT_EQ(StreamedText(reply.body), expected);
}

TEST(ServeTest, StopStringsEndAnAnswerAndNothingOfThemIsSent) {
  Server server({});
  for (const bool stream : {false, true}) {
    for (const auto& [stop, include, expected] : {std::tuple{"45", false, "123"},
                                                  {"45", true, "12345"},
                                                  {"6.", false, "12345"},
                                                  {"6x", false, "123456."}}) {
      Json fields = {{"stop", {stop, "never"}}, {"include_stop_str_in_output", include}};
      fields["stream"] = stream;
      const Reply reply = Exchange(server.port(), Post("/v1/completions", Completion(fields)));
      ASSERT_EQ(reply.status, 200) << reply.body;
      if (stream) {
        EXPECT_EQ(StreamedText(reply.body), expected) << stop;
      } else {
        EXPECT_EQ(reply.json()["choices"][0]["text"], expected) << stop;
        EXPECT_EQ(reply.json()["choices"][0]["finish_reason"], "stop") << stop;
      }
    }
  }
  ExpectServes(server.port());
}

TEST(ServeTest, TokensThereAndBack) {
  Server server({});
  Reply reply = Exchange(server.port(), Post("/tokenize", R"({"prompt": "amber bell"})"));
  ASSERT_EQ(reply.status, 200) << reply.body;
  const Json tokens = reply.json();
  EXPECT_EQ(tokens["count"], tokens["tokens"].size());
  EXPECT_GT(tokens["max_model_len"], 0);
  reply = Exchange(server.port(), Post("/detokenize", Json{{"tokens", tokens["tokens"]}}.dump()));
  EXPECT_EQ(reply.json()["prompt"], "amber bell") << reply.body;
  for (const char* body : {R"({"tokens": "x"})", R"({"tokens": [263, 264]})"}) {
    reply = Exchange(server.port(), Post("/detokenize", body));
    EXPECT_EQ(reply.status, 400) << body;
    EXPECT_EQ(reply.json()["error"]["param"], "tokens") << reply.body;
  }
  EXPECT_EQ(Exchange(server.port(), Post("/detokenize", R"({"tokens": [263]})")).status, 200);
  ExpectServes(server.port());
}

// Tokenizer, template and defaults from elsewhere, no prefix cache, and flags that change nothing.
TEST(ServeTest, FlagsOfVllm) {
  const std::string file = testing::TempDir() + "octavo_template.jinja";
  std::ofstream(file) << "{{ messages[0].content }}";
  const std::string golden = std::string(OCTAVO_SOURCE_DIR) + "/tests/golden/llama";
  // The shipped tokenizer without its <bos>, for which this model has no row.
  const TempFolder tokenizer;
  Json bytes = ReadJsonFile(std::string(OCTAVO_SOURCE_DIR) + "/checkpoints/needle/tokenizer.json");
  bytes.erase("post_processor");
  tokenizer.Write("tokenizer.json", bytes.dump());
  Server server({golden, "--tokenizer", tokenizer.path().string(), "--chat-template", file,
                 "--generation-config", "vllm", "--seed", "3", "--no-enable-prefix-caching",
                 "--enforce-eager", "--block-size", "64", "--enable-chunked-prefill",
                 "--disable-log-requests", "--load-format", "safetensors"});
  const std::string text(200, 'a');
  const Json chat = {{"messages", {{{"role", "user"}, {"content", text}}}}};
  const Json plain = {{"prompt", text}, {"add_special_tokens", false}};
  const Json templated = Exchange(server.port(), Post("/tokenize", chat.dump())).json();
  EXPECT_EQ(templated["count"], 200);
  EXPECT_EQ(templated, Exchange(server.port(), Post("/tokenize", plain.dump())).json());
  const std::string body = Json{{"prompt", templated["tokens"]}, {"max_tokens", 3}}.dump();
  for (int i = 0; i < 2; ++i) {
    const Reply reply = Exchange(server.port(), Post("/v1/completions", body));
    ASSERT_EQ(reply.status, 200) << reply.body;
    EXPECT_EQ(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  }
  std::remove(file.c_str());
}

TEST(ServeTest, MetricsCountWhatWasServed) {
  Server server({"--kv-cache-dtype", "fp8"});
  ExpectServes(server.port());
  ExpectServes(server.port());
  const Reply reply = Exchange(server.port(), Get("/metrics"));
  ASSERT_EQ(reply.status, 200) << reply.body;
  EXPECT_NE(reply.head.find("text/plain"), std::string::npos) << reply.head;
  const auto value = [&](const std::string& start) { return Metric(reply.body, start); };
  const std::string labels = "{model_name=\"needle\",engine=\"0\"";
  EXPECT_EQ(value("vllm:request_success_total" + labels + ",finished_reason=\"stop\"}"), 2);
  EXPECT_EQ(value("vllm:request_queue_time_seconds_count"), 2);
  const double prefill = value("vllm:request_prefill_time_seconds_sum");
  const double decode = value("vllm:request_decode_time_seconds_sum");
  EXPECT_GT(prefill, 0);
  EXPECT_GT(decode, 0);
  EXPECT_NEAR(value("vllm:request_inference_time_seconds_sum"), prefill + decode, 1e-9);
  EXPECT_LT(prefill + decode, value("vllm:e2e_request_latency_seconds_sum"));
  EXPECT_GT(value("vllm:request_queue_time_seconds_sum"), 0);
  EXPECT_NE(reply.body.find("\nvllm:cache_config_info{block_size=\"64\",cache_dtype=\"fp8\","),
            std::string::npos);
  EXPECT_EQ(value("vllm:time_to_first_token_seconds_count"), 2);
  EXPECT_EQ(value("vllm:generation_tokens_total"), 16);
  EXPECT_GT(value("vllm:prompt_tokens_total"), 0);
  EXPECT_EQ(value("vllm:num_requests_running"), 0);
  EXPECT_GT(value("octavo:kv_cache_amax" + labels + ",layer=\"0\",operand=\"k\""), 0);
  EXPECT_EQ(value("octavo:kv_cache_amax_limit" + labels + ",layer=\"3\",operand=\"v\""), 448);
}

TEST(ServeTest, SaturationIsSaidWhileARequestRuns) {
  const std::string file = testing::TempDir() + "octavo_scales.json";
  std::ofstream(file) << R"({"octavo_kv_scales": 1, "layers": {"0": {"k": 1e-4, "v": 1e-4},
      "1": {"k": 1, "v": 1}, "2": {"k": 1, "v": 1}, "3": {"k": 1, "v": 1}}})";
  Server server({"--kv-cache-dtype", "fp8", "--kv-cache-scales", file});
  Client client(server.port());
  ASSERT_TRUE(client.Send(
      Post("/v1/completions",
           Completion({{"max_tokens", 100000}, {"ignore_eos", true}, {"stream", true}}))));
  std::string text;
  while (server.log().find("layer 0: K saturates") == std::string::npos)
    ASSERT_TRUE(client.Receive(&text)) << server.log();
  EXPECT_EQ(text.find("[DONE]"), std::string::npos);
  std::remove(file.c_str());
}

TEST(ServeTest, ThePageAsksNobodyElse) {
  Server server({"--api-key", "secret"});
  const Reply reply = Exchange(server.port(), Get("/?key=secret"));
  ASSERT_EQ(reply.status, 200);
  EXPECT_NE(reply.head.find("text/html"), std::string::npos) << reply.head;
  EXPECT_NE(reply.head.find("Content-Security-Policy: default-src 'none'"), std::string::npos)
      << reply.head;
  EXPECT_NE(reply.body.find("</html>"), std::string::npos);
  for (const char* outside : {"http:", "https:", "src=", "@import", "url("})
    EXPECT_EQ(reply.body.find(outside), std::string::npos) << outside;
}

TEST(ServeTest, SixteenStreamsAtOnce) {
  Server server({"--max-num-seqs", "5"});
  std::vector<std::string> prompts, expected(16), got;
  for (int i = 0; i < 16; ++i) {
    prompts.push_back("The code of amber bell is " + std::to_string(123456 + 31337 * i) +
                      ".\nQuestion: what is the code of amber bell?\nAnswer: ");
    const Json fields = {{"prompt", prompts[i]}, {"max_tokens", 60}, {"ignore_eos", true}};
    expected[i] = Exchange(server.port(), Post("/v1/completions", Completion(fields)))
                      .json()["choices"][0]["text"];
    EXPECT_TRUE(expected[i].starts_with(std::to_string(123456 + 31337 * i))) << expected[i];
  }
  std::vector<std::future<std::string>> clients;
  for (int i = 0; i < 16; ++i) {
    clients.push_back(std::async(std::launch::async, [&, i] {
      const Json fields = {
          {"prompt", prompts[i]}, {"max_tokens", 60}, {"ignore_eos", true}, {"stream", true}};
      return StreamedText(
          Exchange(server.port(), Post("/v1/completions", Completion(fields))).body);
    }));
  }
  for (std::future<std::string>& client : clients) got.push_back(client.get());
  EXPECT_EQ(got, expected);
}

TEST(ServeTest, OneConnectionManyRequestsAlsoPipelined) {
  Server server({});
  Client client(server.port());
  const std::string post = Post("/v1/completions", Completion(Json::object()), "keep-alive");
  ASSERT_TRUE(client.Send(post + post + Get("/health")));
  std::string text;
  while (client.Receive(&text)) continue;
  int answers = 0;
  for (size_t at = 0; (at = text.find("123456.", at)) != text.npos; ++at) ++answers;
  EXPECT_EQ(answers, 2) << text;
}

TEST(ServeTest, CachedTokensAreReported) {
  Server server({});
  Json fields = {{"prompt", std::string(500, 'a')}, {"max_tokens", 1}};
  std::vector<int> cached;
  for (int i = 0; i < 2; ++i) {
    const Reply reply = Exchange(server.port(), Post("/v1/completions", Completion(fields)));
    cached.push_back(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]);
  }
  EXPECT_EQ(cached, (std::vector<int>{0, 448}));  // full pages of 64
}

TEST(ServeTest, WhoeverHangsUpGivesHisPlaceBack) {
  Server server({"--max-num-seqs", "1", "--max-requests", "1"});
  const Json endless = {{"max_tokens", 100000}, {"ignore_eos", true}};
  for (const bool stream : {true, false}) {
    for (const bool more : {false, true}) {  // bytes after the request, which nobody reads yet
      Json fields = endless;
      fields["stream"] = stream;
      Client client(server.port());
      ASSERT_TRUE(client.Send(Post("/v1/completions", Completion(fields)) + (more ? "G" : "")));
      std::string text;
      if (stream) {
        ASSERT_TRUE(client.Receive(&text));
      } else {  // it has begun once others are refused
        while (
            Exchange(server.port(), Post("/v1/completions", Completion(Json::object()))).status !=
            503)
          continue;
      }
      const Reply refused =
          Exchange(server.port(), Post("/v1/completions", Completion(Json::object())));
      EXPECT_EQ(refused.status, 503);
      EXPECT_NE(refused.head.find("Retry-After: 1"), std::string::npos) << refused.head;
      client.Close();
      // Without its cancellation the request would go on for minutes.
      const auto patience =
          std::chrono::steady_clock::now() + std::chrono::milliseconds(kPatienceMs);
      Reply reply;
      do {
        ASSERT_LT(std::chrono::steady_clock::now(), patience) << stream << more;
        reply = Exchange(server.port(), Post("/v1/completions", Completion(Json::object())));
      } while (reply.status == 503);
      EXPECT_EQ(reply.json()["choices"][0]["text"], "123456.");
    }
  }
}

// He has shut down his sending side only: before his answer begins and while it is streamed.
TEST(ServeTest, WhoeverSaysNoMoreIsStillAnswered) {
  Server server({});
  for (const bool stream : {true, false}) {
    for (const char* version : {"1.1", "1.0"}) {
      for (const char* more : {"", "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"}) {
        const Json fields = {{"max_tokens", 200}, {"ignore_eos", true}, {"stream", stream}};
        std::string post = Post("/v1/completions", Completion(fields), "keep-alive");
        post.replace(post.find("1.1"), 3, version);
        Client client(server.port());
        ASSERT_TRUE(client.Send(post + more));
        shutdown(client.fd(), SHUT_WR);
        std::string text;
        while (client.Receive(&text)) continue;
        if (!stream && version == std::string("1.0")) {  // nothing can tell him from who is gone
          EXPECT_EQ(text, "");
          continue;
        }
        while (text.starts_with(kGoOn)) text.erase(0, kGoOn.size());
        EXPECT_TRUE(text.starts_with("HTTP/" + std::string(version) + " 200 OK\r\n")) << text;
        EXPECT_NE(text.find(stream ? "[DONE]" : "\"completion_tokens\":200"), text.npos) << text;
      }
    }
  }
  ExpectServes(server.port());
}

// Nobody pays for the work of those who hung up, nor waits with a small request behind large ones.
TEST(ServeTest, WhatTakesLongToPrepareKeepsNobodyWaiting) {
  Server server({"--trust-request-chat-template", "--max-requests", "100000"});
  const int port = server.port();
  const auto cpu_seconds = [&] {
    return Metric(Exchange(port, Get("/metrics")).body, "octavo:server_cpu_seconds_total");
  };
  const Json message = {{"role", "user"}, {"content", "hi"}};
  const auto post = [&](const std::string& path, const std::string& source) {
    return Post(path, Json{{"messages", {message}}, {"chat_template", source}}.dump());
  };
  const std::string loop = "{% for i in range(99999) %}", end = "{% endfor %}";
  const std::string endless = loop + loop + end + end;
  const double before = cpu_seconds();
  for (const std::string& source : {endless, std::string("{% include 'x' %}")}) {
    const Reply reply = Exchange(port, post("/v1/chat/completions", source));
    EXPECT_EQ(reply.status, 400);
    EXPECT_EQ(reply.json()["error"]["param"], "chat_template") << reply.body;
  }
  const double one = cpu_seconds() - before;
  constexpr int kGone = 1000;
  for (int i = 0; i < kGone; ++i) {
    Client client(port);
    ASSERT_TRUE(client.Send(post(i % 2 ? "/v1/chat/completions" : "/tokenize", endless)));
  }
  ExpectServes(port);
  EXPECT_LT(cpu_seconds() - before, one * kGone / 4);

  // Nested loops over so many messages pass the limit, but not soon.
  const Json large = {
      {"messages", std::vector<Json>(50000, message)},
      {"chat_template", "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}"}};
  std::vector<std::unique_ptr<Client>> waiting;
  for (int i = 0; i < 30; ++i) {
    waiting.push_back(std::make_unique<Client>(port));
    ASSERT_TRUE(waiting.back()->Send(Post("/v1/chat/completions", large.dump())));
  }
  ExpectServes(port);
  pollfd last{waiting.back()->fd(), POLLIN, 0};
  EXPECT_EQ(poll(&last, 1, 0), 0) << "all large ones were answered before the small one";
}

// He says no more, is asked whether he is there, reads that, and leaves.
TEST(ServeTest, WhoeverLeavesAfterHeWasAskedIsFoundOutToo) {
  Server server({"--max-requests", "1"});
  Client client(server.port());
  const Json endless = {{"max_tokens", 100000}, {"ignore_eos", true}};
  ASSERT_TRUE(client.Send(Post("/v1/completions", Completion(endless))));
  shutdown(client.fd(), SHUT_WR);
  std::string text;
  while (text.find(kGoOn) == text.npos) ASSERT_TRUE(client.Receive(&text));
  client.Close();
  const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(kPatienceMs);
  int status = 503;
  while (status == 503) {
    ASSERT_LT(std::chrono::steady_clock::now(), patience);
    status = Exchange(server.port(), Post("/v1/completions", Completion(Json::object()))).status;
  }
  EXPECT_EQ(status, 200);
}

TEST(ServeTest, EveryChoiceCountsAsARequest) {
  Server server({"--max-num-seqs", "4", "--max-requests", "4"});
  const Reply alone = Exchange(server.port(), Post("/v1/completions", Completion({{"n", 8}})));
  EXPECT_EQ(alone.status, 200) << alone.body;  // more than that is for whoever is alone
  Client client(server.port());
  ASSERT_TRUE(client.Send(Post(
      "/v1/completions",
      Completion({{"n", 3}, {"max_tokens", 100000}, {"ignore_eos", true}, {"stream", true}}))));
  std::string text;
  ASSERT_TRUE(client.Receive(&text));
  const auto status = [&](int n) {
    return Exchange(server.port(), Post("/v1/completions", Completion({{"n", n}}))).status;
  };
  EXPECT_EQ(status(2), 503);
  EXPECT_EQ(status(1), 200);
}

TEST(ServeTest, BadRequestsAreNamedAndTheNextIsServed) {
  Server server({"--max-model-len", "1k"});
  const int port = server.port();
  const auto expect = [&](const std::string& bytes, int status, const Json& param) {
    const Reply reply = Exchange(port, bytes);
    EXPECT_EQ(reply.status, status) << bytes.substr(0, 300) << "\n" << reply.body;
    const Json error = reply.json().value("error", Json::object());
    EXPECT_EQ(error.value("param", Json("absent")), param) << reply.body;
    EXPECT_EQ(error.value("code", 0), status) << reply.body;
  };
  const auto completion = [&](const std::string& body, int status, const Json& param) {
    expect(Post("/v1/completions", body), status, param);
  };
  completion("", 400, nullptr);
  completion("{", 400, nullptr);
  completion("{\"prompt\": \"\xc3\x28\"}", 400, nullptr);
  completion(std::string(200000, '['), 400, nullptr);
  completion(R"({"prompt": ")" + std::string(2000, 'a') + "\"}", 400, "prompt");
  completion(R"({"prompt": [264]})", 400, "prompt");
  completion(R"({"prompt": []})", 400, "prompt");
  completion(R"({"prompt": "x", "top_p": 0})", 400, "top_p");
  completion(R"({"prompt": "x", "temperature": -1})", 400, "temperature");
  completion(R"({"prompt": "x", "n": 0})", 400, "n");
  completion(R"({"prompt": "x", "stop": ")" + std::string(5000, 'a') + "\"}", 400, "stop");
  completion(R"({"prompt": "x", "max_tokens": 20, "min_tokens": 21})", 400, "min_tokens");
  completion(R"({"prompt": "x", "max_tokens": 1023})", 400, "max_tokens");
  completion(R"({"prompt": ["x", "yz"], "max_tokens": 1022})", 400, "max_tokens");
  completion(R"({"prompt": "x", "model": "gpt-9"})", 404, "model");
  completion(std::string((8 << 20) + 1, ' '), 413, nullptr);
  expect(Post("/v1/chat/completions", R"({"messages": "x"})"), 400, "messages");
  const auto chat = [](const std::string& content, const std::string& fields) {
    return Post("/v1/chat/completions",
                R"({"messages": [{"role": "user", "content": ")" + content + "\"}]" + fields + "}");
  };
  expect(chat(std::string(2000, 'a'), ""), 400, "messages");
  expect(chat("a", R"(, "max_tokens": 1024)"), 400, "max_tokens");
  expect(chat("a", R"(, "max_completion_tokens": 1024)"), 400, "max_completion_tokens");
  expect(chat("a", R"(, "stop_token_ids": [100000])"), 400, "stop_token_ids");
  expect(chat("a", R"(, "chat_template": "a")"), 400, "chat_template");
  const std::string post = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n";
  expect(post + "Content-Length: 200000000\r\n\r\n{", 413, nullptr);
  expect(post + "Content-Length: -1\r\n\r\n{", 400, nullptr);
  expect(post + "Transfer-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 501, nullptr);
  expect(post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, nullptr);
  expect(post + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415, nullptr);
  expect(Post("/tokenize", R"({"prompt": "x", "model": "nope"})"), 404, "model");
  expect(Post("/detokenize", R"({"tokens": [1], "model": "nope"})"), 404, "model");
  expect("GET /health HTTP/1.1\r\n\r\n", 400, nullptr);
  expect(Get("/health", "Host: y\r\n"), 400, nullptr);
  expect("what?\r\n\r\n", 400, nullptr);
  expect(Get("/nowhere"), 404, nullptr);
  expect(Get("/v1/completions"), 405, nullptr);
  expect(Post("/metrics", ""), 405, nullptr);
  expect(Post("/health", ""), 405, nullptr);
  expect(Get("/health", "X: " + std::string(20000, 'x') + "\r\n"), 431, nullptr);
  // Half a request, then the end: nothing to answer.
  for (const std::string& bytes : {std::string("GET /hea"), std::string(),
                                   Post("/v1/completions", std::string(300, ' ')).substr(0, 250)}) {
    Client client(port);
    client.Send(bytes);
    shutdown(client.fd(), SHUT_WR);
    std::string text;
    while (client.Receive(&text)) continue;
    EXPECT_EQ(text, "") << bytes;
  }
  ExpectServes(port);
}

TEST(ServeTest, MutatedRequestsAreAnsweredOrClosed) {
  Server server({"--max-model-len", "128"});  // those that lose their max_tokens are served, too
  const Json chat = {{"messages", {{{"role", "user"}, {"content", "hi"}}}},
                     {"max_tokens", 2},
                     {"temperature", 0.5},
                     {"stop_token_ids", {1, 2}},
                     {"stream", true},
                     {"stream_options", {{"include_usage", true}}}};
  const std::string valid = Post("/v1/chat/completions", chat.dump());
  std::mt19937 random(20240607);
  std::map<int, int> statuses;
  const int requests = 10000;
  for (int i = 0; i < requests; ++i) {
    std::string bytes = valid;
    for (int edits = 1 + static_cast<int>(random() % 3); edits > 0; --edits) {
      const size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1 + random() % 8);
          break;
        case 2:
          bytes.insert(at, bytes.substr(random() % bytes.size(), random() % 16));
          break;
        case 3:
          bytes.insert(at, 1, "{}[]\",:0-\\\r\n"[random() % 12]);
          break;
      }
    }
    Client client(server.port());
    ASSERT_TRUE(client.connected()) << i;
    client.Send(bytes);
    shutdown(client.fd(), SHUT_WR);  // or a longer Content-Length would wait for more
    std::string text;
    while (client.Receive(&text)) continue;
    while (text.starts_with(kGoOn)) text.erase(0, kGoOn.size());
    ++statuses[text.starts_with("HTTP/1.1 ") ? std::stoi(text.substr(9)) : 0];
  }
  EXPECT_GT(statuses[200], 0);
  EXPECT_GT(statuses[400], requests / 10);
  EXPECT_EQ(statuses[500], 0);
  ExpectServes(server.port());
}

TEST(ServeTest, LargeBodiesMayAskFirst) {
  Server server({"--max-model-len", "1k"});
  Client client(server.port());
  const std::string bytes =
      Post("/v1/completions", Completion(Json::object()), "close", "Expect: 100-continue\r\n");
  const size_t body = bytes.find("\r\n\r\n") + 4;
  ASSERT_TRUE(client.Send(bytes.substr(0, body)));
  std::string text;
  ASSERT_TRUE(client.Receive(&text));
  EXPECT_TRUE(text.starts_with("HTTP/1.1 100")) << text;
  ASSERT_TRUE(client.Send(bytes.substr(body)));
  text.clear();
  while (client.Receive(&text)) continue;
  EXPECT_EQ(ParseReply(text).status, 200) << text;
}

TEST(ServeTest, OtherFormsOfARequest) {
  Server server({"--api-key", "secret"});
  const int port = server.port();
  EXPECT_EQ(Exchange(port, "GET /health HTTP/1.0\r\n\r\n").status, 200);
  const std::string key = "Authorization: bEARER secret\r\n";
  for (const char* target : {"http://x/v1/models", "HTTP://x:80/v1/models?a=http://y/"})
    EXPECT_EQ(Exchange(port, Get(target, key)).json()["object"], "list") << target;
  for (const char* target : {"http://x?key=secret", "http://x/?key=secret"})
    EXPECT_NE(Exchange(port, Get(target)).body.find("</html>"), std::string::npos) << target;
  EXPECT_EQ(Exchange(port, Get("http://x/nowhere", key)).status, 404);

  // A HEAD has the head of its GET.
  for (const auto& [target, status] :
       {std::pair{"/health", 200}, {"/?key=secret", 200}, {"/v1/models", 401}, {"/metrics", 401}}) {
    std::string head = Get(target);
    head.replace(0, 3, "HEAD");
    const Reply get = Exchange(port, Get(target)), reply = Exchange(port, head);
    EXPECT_EQ(reply.status, status) << target;
    EXPECT_EQ(reply.head, get.head);
    EXPECT_EQ(reply.body, "") << target;
  }
  std::string head = Get("/tokenize", key);
  const Reply refused = Exchange(port, head.replace(0, 3, "HEAD"));
  EXPECT_EQ(refused.status, 405);
  EXPECT_EQ(refused.body, "");
}

TEST(ServeTest, TheKeyGuardsEverythingButHealth) {
  Server server({"--api-key", "secret", "--served-model-name", "amber"});
  const int port = server.port();
  const std::string key = "Authorization: Bearer secret\r\n";
  EXPECT_EQ(Exchange(port, Get("/health")).status, 200);
  for (const char* path : {"/", "/?key=secreT", "/version", "/v1/models", "/v1/models?key=secret",
                           "/v1/completions", "/nowhere", "/health/.."}) {
    EXPECT_EQ(Exchange(port, Get(path)).status, 401) << path;
    EXPECT_EQ(Exchange(port, Get(path, "Authorization: Bearer secreT\r\n")).status, 401) << path;
  }
  EXPECT_EQ(Exchange(port, Post("/v1/completions", Completion(Json::object()))).status, 401);
  EXPECT_NE(Exchange(port, Get("/")).body.find("open /?key=KEY"), std::string::npos);
  EXPECT_EQ(Exchange(port, Get("/", key)).status, 200);
  EXPECT_TRUE(Exchange(port, Get("/version", key)).json().contains("version"));
  const Json models = Exchange(port, Get("/v1/models", key)).json();
  EXPECT_EQ(models["data"][0]["id"], "amber");
  EXPECT_FALSE(models["data"][0]["kv_cache_policy"].empty());
  const std::string post = Post("/v1/completions", Completion({{"model", "amber"}}), "close", key);
  EXPECT_EQ(Exchange(port, post).status, 200);
}

TEST(ServeTest, SigtermDrainsTheSecondStops) {
  {
    Server server({});
    Client idle(server.port()), half(server.port()), busy(server.port());
    ASSERT_TRUE(half.Send(Post("/v1/completions", std::string(300, ' ')).substr(0, 250)));
    const Json fields = {{"max_tokens", 300}, {"ignore_eos", true}, {"stream", true}};
    ASSERT_TRUE(busy.Send(Post("/v1/completions", Completion(fields), "keep-alive")));
    std::string text, nothing;
    ASSERT_TRUE(busy.Receive(&text));
    server.Signal(SIGTERM);
    EXPECT_FALSE(idle.Receive(&nothing));
    EXPECT_FALSE(half.Receive(&nothing));  // a request that may never come
    while (busy.Receive(&text)) continue;
    EXPECT_NE(text.find("[DONE]"), text.npos);
    EXPECT_EQ(server.Wait(), 0);
  }
  Server server({});
  Client busy(server.port());
  const Json fields = {{"max_tokens", 100000}, {"ignore_eos", true}, {"stream", true}};
  ASSERT_TRUE(busy.Send(Post("/v1/completions", Completion(fields))));
  std::string text;
  ASSERT_TRUE(busy.Receive(&text));
  server.Signal(SIGTERM);
  EXPECT_TRUE(server.WaitForLog("draining"));
  EXPECT_FALSE(Client(server.port()).connected());
  server.Signal(SIGTERM);
  while (busy.Receive(&text)) continue;
  EXPECT_EQ(text.find("[DONE]"), text.npos);
  EXPECT_EQ(server.Wait(), 0);
}

}  // namespace
}  // namespace octavo
