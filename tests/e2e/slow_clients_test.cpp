// Clients that are slow on purpose, against a server with little patience.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>

#include <chrono>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "server.h"
#include "server/http_server.h"

namespace octavo {
namespace {

// In this process, for the sake of its options.
class HastyServer {
 public:
  explicit HastyServer(std::chrono::seconds patience, int max_connections = 1024,
                       uint64_t max_unfinished_bytes = 256 << 20)
      : server_(Engine::Create({.model = std::string(OCTAVO_SOURCE_DIR) + "/checkpoints/needle",
                                .device = "cpu",
                                .threads = 2}),
                {.port = 0,
                 .tokenizer_folder = std::string(OCTAVO_SOURCE_DIR) + "/checkpoints/needle",
                 .model_name = "needle",
                 .version = "test",
                 .max_unfinished_bytes = max_unfinished_bytes,
                 .max_connections = max_connections,
                 .read_timeout = patience,
                 .body_timeout = patience,
                 .write_timeout = patience}),
        thread_([this] { server_.Run(); }) {}
  ~HastyServer() {
    kill(getpid(), SIGTERM);
    thread_.join();
  }
  int port() const {
    const std::string url = server_.url();
    return std::stoi(url.substr(url.rfind(':') + 1));
  }

 private:
  HttpServer server_;
  std::thread thread_;
};

constexpr char kAsk[] =
    R"({"prompt": "The code of amber bell is 123456.\nQuestion: what is the code of amber bell?\nAnswer: ", "temperature": 0})";

void ExpectServes(int port) {
  const Reply reply = Exchange(port, Post("/v1/completions", kAsk));
  EXPECT_EQ(reply.status, 200) << reply.body;
  EXPECT_EQ(reply.json()["choices"][0]["text"], "123456.");
}

double Metric(int port, const std::string& name) {
  const std::string text = Exchange(port, Get("/metrics")).body;
  const size_t line = text.find("\n" + name + "{");
  if (line == text.npos) return 0;
  const size_t end = text.find('\n', line + 1);
  return std::stod(text.substr(text.rfind(' ', end), end));
}

constexpr int kChoices = 8;

// An answer of megabytes.
std::string AskForMuch(int tokens) {
  return Json{{"prompt", "x"},    {"max_tokens", tokens}, {"ignore_eos", true}, {"n", kChoices},
              {"temperature", 0}, {"logprobs", 20},       {"stream", true}}
      .dump();
}

// What the server's socket holds at most, and ours.
size_t SocketBytes(const Client& client) {
  const int bytes = 64 << 10;
  EXPECT_EQ(setsockopt(client.fd(), SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes)), 0);
  size_t least = 0, usual = 0, most = 0;
  std::ifstream("/proc/sys/net/ipv4/tcp_wmem") >> least >> usual >> most;
  EXPECT_GT(most, 0u);
  return most + 2 * bytes;
}

TEST(SlowClientsTest, WhoReadsLateStallsNobodyAndLosesNothing) {
  HastyServer server(std::chrono::seconds(600));
  constexpr int kTokens = 1500;
  Client slow(server.port());
  const size_t held = SocketBytes(slow);
  ASSERT_TRUE(slow.Send(Post("/v1/completions", AskForMuch(kTokens))));
  for (int i = 0; i < 20; ++i) ExpectServes(server.port());
  // The engine does not wait for the reader either.
  while (Metric(server.port(), "vllm:generation_tokens_total") < kChoices * kTokens)
    ExpectServes(server.port());
  std::string text;
  while (slow.Receive(&text)) continue;
  const Reply reply = ParseReply(text);
  EXPECT_GT(reply.body.size(), held + (1 << 20));
  EXPECT_TRUE(reply.body.ends_with("data: [DONE]\n\n"));
  int tokens = 0;
  for (size_t at = 0; (at = reply.body.find("\"top_logprobs\"", at)) != text.npos; ++at) ++tokens;
  EXPECT_EQ(tokens, kChoices * kTokens);
}

TEST(SlowClientsTest, WhoReadsNothingIsCutOffAndHisRequestEnds) {
  HastyServer server(std::chrono::seconds(1));
  Client deaf(server.port());
  SocketBytes(deaf);
  ASSERT_TRUE(deaf.Send(Post("/v1/completions", AskForMuch(30000))));
  const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(kPatienceMs);
  const std::string aborted =
      "vllm:request_success_total{model_name=\"needle\",engine=\"0\",finished_reason=\"abort\"} "
      "8\n";
  while (Exchange(server.port(), Get("/metrics")).body.find(aborted) == std::string::npos)
    ASSERT_LT(std::chrono::steady_clock::now(), patience);
  EXPECT_EQ(Metric(server.port(), "vllm:num_requests_running"), 0);
  ExpectServes(server.port());
}

// Connections that say nothing, or begin a body and stop, more than there may be: the oldest make
// room.
TEST(SlowClientsTest, WhoSaysNothingLocksNobodyOut) {
  HastyServer server(std::chrono::seconds(600), /*max_connections=*/20);
  const std::string post = Post("/v1/completions", kAsk);
  for (const size_t said : {size_t{0}, post.size() - 5}) {
    std::vector<std::unique_ptr<Client>> silent;
    for (int i = 0; i < 50; ++i) {
      silent.push_back(std::make_unique<Client>(server.port()));
      ASSERT_TRUE(silent.back()->connected());
      silent.back()->Send(post.substr(0, said));
    }
    ExpectServes(server.port());
    std::string text;
    EXPECT_FALSE(silent.front()->Receive(&text));  // closed
    EXPECT_EQ(text, "");
    ASSERT_TRUE(silent.back()->Send(post.substr(said)));
    while (silent.back()->Receive(&text)) continue;
    EXPECT_EQ(ParseReply(text).status, 200);
  }
}

// Large bodies that never end: together they hold no more than the server allows.
TEST(SlowClientsTest, UnfinishedBodiesAreBoundedTogether) {
  HastyServer server(std::chrono::seconds(600), 1024, /*max_unfinished_bytes=*/1 << 20);
  const std::string body(400 << 10, ' ');
  const std::string post = Post("/v1/completions", body + kAsk);
  std::vector<std::unique_ptr<Client>> slow;
  for (int i = 0; i < 10; ++i) {
    slow.push_back(std::make_unique<Client>(server.port()));
    slow.back()->Send(post.substr(0, post.size() - 5));
    ExpectServes(server.port());
  }
  std::string text;
  EXPECT_FALSE(slow.front()->Receive(&text));  // closed
  EXPECT_EQ(text, "");
  ASSERT_TRUE(slow.back()->Send(post.substr(post.size() - 5)));
  while (slow.back()->Receive(&text)) continue;
  EXPECT_EQ(ParseReply(text).status, 200);
}

// A byte at a time: of a header, of a body, of nothing at all.
TEST(SlowClientsTest, WhoSendsByTheByteIsCutOffWhileOthersAreServed) {
  HastyServer server(std::chrono::seconds(1));
  const std::string post = Post("/v1/completions", std::string(1000, ' '));
  for (const std::string& begin :
       {std::string("GET /health HTTP/1.1\r\nX: "), post.substr(0, post.size() - 1000),
        Get("/health").replace(Get("/health").find("close"), 5, "keep-alive")}) {
    const bool idle = begin.find("keep-alive") != begin.npos;
    std::vector<std::unique_ptr<Client>> slow;
    for (int i = 0; i < 50; ++i) {
      slow.push_back(std::make_unique<Client>(server.port()));
      ASSERT_TRUE(slow.back()->Send(begin));
    }
    const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(kPatienceMs);
    while (!slow.empty()) {
      ASSERT_LT(std::chrono::steady_clock::now(), patience) << begin;
      std::erase_if(slow, [&](const std::unique_ptr<Client>& client) {
        if (!idle && !client->Send(" ")) return true;
        char byte;
        ssize_t n;
        while ((n = recv(client->fd(), &byte, 1, MSG_DONTWAIT)) > 0) continue;
        return n == 0 || errno == ECONNRESET;
      });
      ExpectServes(server.port());
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }
}

}  // namespace
}  // namespace octavo
