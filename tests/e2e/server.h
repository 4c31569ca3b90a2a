// `octavo serve` in a process of its own, and a client that speaks to it in bytes.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "io/json.h"

namespace octavo {

constexpr int kPatienceMs = 60'000;  // a server that hangs fails the test, slowness does not

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

  // More bytes of what the server sends; false at its end, or when patience is.
  bool Receive(std::string* out) {
    pollfd wait{fd_, POLLIN, 0};
    if (poll(&wait, 1, kPatienceMs) <= 0) {
      ADD_FAILURE() << "the server is silent";
      return false;
    }
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
  EXPECT_TRUE(client.connected());
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

// A server on a free port.
class Server {
 public:
  explicit Server(const std::vector<std::string>& flags) {
    int pipe_ends[2];
    EXPECT_EQ(pipe2(pipe_ends, O_CLOEXEC), 0);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      dup2(pipe_ends[1], STDERR_FILENO);
      std::vector<std::string> words = {OCTAVO_PROGRAM, "serve", "--port", "0", "--threads", "2"};
      words.insert(words.end(), flags.begin(), flags.end());
      std::vector<char*> arguments;
      for (std::string& word : words) arguments.push_back(word.data());
      arguments.push_back(nullptr);
      execv(OCTAVO_PROGRAM, arguments.data());
      _exit(127);
    }
    close(pipe_ends[1]);
    log_fd_ = pipe_ends[0];
    const std::string address = "http://127.0.0.1:";
    while (ReadLog()) {
      const size_t at = log_.find(address);
      if (at == log_.npos || log_.find('\n', at) == log_.npos) continue;
      port_ = std::stoi(log_.substr(at + address.size()));
      break;
    }
    EXPECT_NE(port_, 0) << log_;
  }

  ~Server() {
    if (pid_ > 0 && ::testing::Test::HasFailure()) {  // it may never drain
      Signal(SIGKILL);
      Wait();
    } else if (pid_ > 0) {
      Signal(SIGTERM);
      EXPECT_EQ(Wait(), 0) << log_;
    }
    close(log_fd_);
  }
  Server(const Server&) = delete;

  int port() const { return port_; }
  const std::string& log() const { return log_; }

  void Signal(int signal) { kill(pid_, signal); }

  // Its exit code.
  int Wait() {
    while (ReadLog()) continue;
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }

  bool WaitForLog(const std::string& line) {
    while (log_.find(line) == log_.npos) {
      if (!ReadLog()) return false;
    }
    return true;
  }

 private:
  bool ReadLog() {
    pollfd wait{log_fd_, POLLIN, 0};
    if (poll(&wait, 1, kPatienceMs) <= 0) {
      ADD_FAILURE() << "the server hangs; its log:\n" << log_;
      kill(pid_, SIGKILL);
      return false;
    }
    std::array<char, 4096> buffer;
    const ssize_t n = read(log_fd_, buffer.data(), buffer.size());
    if (n > 0) log_.append(buffer.data(), static_cast<size_t>(n));
    return n > 0;
  }

  pid_t pid_ = -1;
  int log_fd_ = -1;
  int port_ = 0;
  std::string log_;
};

}  // namespace octavo
