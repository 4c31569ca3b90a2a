// An HTTP/1.1 client of one server, for many requests at a time on one thread.
//
//   HttpClient client({.base_url = "http://127.0.0.1:8000"});
//   client.Send("/v1/completions", body, on_end, on_piece);  // starts it
//   client.Run();                                            // until all has ended
//
// Callbacks run inside Run and may call Send and At. Connections are kept and used again. Every
// request ends: with a whole reply, or with `error` when the connection fails or the server says
// nothing for `timeout`.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace octavo {

struct HttpClientOptions {
  std::string base_url;  // http://host[:port][/prefix]
  std::string api_key;   // empty: none
  std::chrono::milliseconds timeout{600'000};
};

struct HttpReply {
  int status = 0;     // 0: no header came
  std::string body;   // what on_piece was not given
  std::string error;  // why the reply is not whole; empty: it is
};

class HttpClient {
 public:
  using Clock = std::chrono::steady_clock;
  using OnEnd = std::function<void(const HttpReply&)>;
  using OnPiece = std::function<void(std::string_view)>;

  // Throws Error if the URL is none, or its host is not known.
  explicit HttpClient(const HttpClientOptions& options);
  ~HttpClient();

  // POST of a JSON body, or GET without one. `on_piece` gets the body of a reply of status 200 as
  // it comes.
  void Send(std::string path, std::optional<std::string> json, OnEnd on_end,
            OnPiece on_piece = nullptr);
  void At(Clock::time_point time, std::function<void()> action);
  void Run();

  HttpReply Get(const std::string& path);  // with nothing else under way

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octavo
