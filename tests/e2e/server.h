// `octavo serve` in a process of its own, and a client that speaks to it in bytes.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "io/json.h"

namespace octavo {

constexpr int kPatienceMs = 300'000;  // a server that hangs fails the test, slowness does not

// A connection to 127.0.0.1.
class Client {
 public:
  explicit Client(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~Client() { Close(); }
  Client(const Client&) = delete;

  bool connected() const { return connected_; }
  int fd() const { return fd_; }

  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }

  // More bytes of what the server sends; false at its end. Throws if it is silent, so that no test
  // goes on asking.
  bool Receive(std::string* out) {
    pollfd wait{fd_, POLLIN, 0};
    if (poll(&wait, 1, kPatienceMs) <= 0) throw std::runtime_error("the server is silent");
    std::array<char, 16384> buffer;
    const ssize_t n = recv(fd_, buffer.data(), buffer.size(), 0);
    if (n > 0) out->append(buffer.data(), static_cast<size_t>(n));
    return n > 0;
  }

 private:
  int fd_;
  bool connected_ = false;
};

struct Reply {
  int status = 0;  // 0: none came
  std::string head, body;
  Json json() const { return body.empty() ? Json() : ParseJson(body, "the reply"); }
};

inline std::string Dechunk(const std::string& text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t length = std::stoul(text.substr(at), nullptr, 16);
    at = text.find("\r\n", at) + 2;
    if (length == 0) return out;
    out += text.substr(at, length);
    at += length + 2;
  }
  ADD_FAILURE() << "the last chunk is missing";
  return out;
}

inline Reply ParseReply(const std::string& text) {
  Reply reply;
  const size_t end = text.find("\r\n\r\n");
  if (end == text.npos) return reply;
  reply.head = text.substr(0, end);
  reply.status = std::stoi(text.substr(text.find(' ')));
  reply.body = text.substr(end + 4);
  if (reply.head.find("chunked") != reply.head.npos) reply.body = Dechunk(reply.body);
  return reply;
}

inline Reply Exchange(int port, const std::string& bytes) {
  Client client(port);
  if (!client.connected()) throw std::runtime_error("the server is gone");
  client.Send(bytes);  // a server that refuses need not read it all
  std::string text;
  while (client.Receive(&text)) continue;
  return ParseReply(text);
}

inline std::string Post(const std::string& path, const std::string& body,
                        const std::string& connection = "close", const std::string& more = "") {
  return "POST " + path + " HTTP/1.1\r\nHost: x\r\nConnection: " + connection +
         "\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) +
         "\r\n" + more + "\r\n" + body;
}

inline std::string Get(const std::string& path, const std::string& more = "") {
  return "GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + more + "\r\n";
}

// A server on a free port. Its log is a file, which a report of any length fits in; a test that
// fails shows it.
class Server {
 public:
  explicit Server(const std::vector<std::string>& flags)
      : log_fd_(memfd_create("log", MFD_CLOEXEC)) {
    std::vector<std::string> words = {OCTAVO_PROGRAM, "serve", "--port", "0", "--threads", "2"};
    words.insert(words.end(), flags.begin(), flags.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      dup2(log_fd_, STDERR_FILENO);
      execv(OCTAVO_PROGRAM, arguments.data());
      _exit(127);
    }
    const std::string address = "http://127.0.0.1:";
    const std::string line = LineOfLog(address);
    if (line.empty()) {
      ADD_FAILURE() << "no server; its log:\n" << log();
    } else {
      port_ = std::stoi(line.substr(line.find(address) + address.size()));
    }
  }

  ~Server() {
    if (::testing::Test::HasFailure() || std::uncaught_exceptions() > 0) {
      Signal(SIGKILL);  // it may never drain
      Wait();
      std::cerr << "the server's log:\n" << log() << std::endl;
    } else {
      Signal(SIGTERM);
      EXPECT_EQ(Wait(), 0) << log();
    }
    close(log_fd_);
  }
  Server(const Server&) = delete;

  int port() const { return port_; }

  std::string log() const {
    std::string text;
    std::array<char, 4096> buffer;
    for (;;) {
      const auto at = static_cast<off_t>(text.size());
      const ssize_t n = pread(log_fd_, buffer.data(), buffer.size(), at);
      if (n <= 0) return text;
      text.append(buffer.data(), static_cast<size_t>(n));
    }
  }

  void Signal(int signal) {
    if (!Ended()) kill(pid_, signal);
  }

  // Its exit code.
  int Wait() {
    const Clock::time_point patience = Clock::now() + std::chrono::milliseconds(kPatienceMs);
    while (!Ended()) {
      if (Clock::now() > patience) {
        ADD_FAILURE() << "the server hangs; its log:\n" << log();
        Signal(SIGKILL);
      }
      std::this_thread::sleep_for(kPause);
    }
    return code_;
  }

  bool WaitForLog(const std::string& text) { return !LineOfLog(text).empty(); }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kPause{2};

  bool Ended() {
    int status = 0;
    if (pid_ > 0 && waitpid(pid_, &status, WNOHANG) == pid_) {
      code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
      pid_ = -1;
    }
    return pid_ < 0;
  }

  // The first that has `text` in it, once it is there; empty if it never comes.
  std::string LineOfLog(const std::string& text) {
    const Clock::time_point patience = Clock::now() + std::chrono::milliseconds(kPatienceMs);
    for (;;) {
      const bool last = Ended() || Clock::now() > patience;
      const std::string all = log();
      const size_t at = all.find(text), end = all.find('\n', at);
      if (at != all.npos && end != all.npos) {
        const size_t begin = all.rfind('\n', at) + 1;  // npos + 1 is 0
        return all.substr(begin, end - begin);
      }
      if (last) return "";
      std::this_thread::sleep_for(kPause);
    }
  }

  pid_t pid_ = -1;  // while it runs
  int code_ = 0;
  const int log_fd_;
  int port_ = 0;
};

}  // namespace octavo
