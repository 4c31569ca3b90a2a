#include "server/http_client.h"

#include <utility>
#include <vector>

#include <fmt/format.h>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>

#include "base/error.h"
#include "io/json.h"

namespace octavo {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::awaitable;
using asio::use_awaitable;
using asio::ip::tcp;
using boost::system::error_code;

constexpr size_t kMaxHeaderBytes = 64 << 10;
constexpr size_t kMaxBodyBytes = 8 << 20;  // of a reply that is kept
constexpr size_t kPieceBytes = 16 << 10;

struct Url {
  std::string authority, host, port, prefix;
};

Url ParseUrl(const std::string& text) {
  const std::string scheme = "http://";
  const auto wrong = [&] {
    return Error(
        ErrorCode::kInvalidArgument,
        fmt::format("--base-url: expected http://host[:port][/path], found {}", Quote(text)));
  };
  if (!text.starts_with(scheme)) throw wrong();
  Url url;
  const size_t slash = std::min(text.find('/', scheme.size()), text.size());
  url.authority = text.substr(scheme.size(), slash - scheme.size());
  url.prefix = text.substr(slash);
  while (url.prefix.ends_with('/')) url.prefix.pop_back();
  const bool is_v6 = url.authority.starts_with('[');
  const size_t colon = url.authority.find(':', is_v6 ? url.authority.find(']') : 0);
  url.host = is_v6 ? url.authority.substr(1, std::min(url.authority.find(']'), colon) - 1)
                   : url.authority.substr(0, colon);
  url.port = colon == std::string::npos ? "80" : url.authority.substr(colon + 1);
  const bool is_number = url.port.find_first_not_of("0123456789") == std::string::npos;
  if (url.host.empty() || url.port.empty() || url.port.size() > 5 || !is_number ||
      std::stoi(url.port) > 65535)
    throw wrong();
  return url;
}

// A connection on which the other side has sent or closed cannot take another request.
bool IsQuiet(tcp::socket& socket) {
  error_code error;
  char byte;
  socket.non_blocking(true, error);
  if (!error) socket.receive(asio::buffer(&byte, 1), tcp::socket::message_peek, error);
  return error == asio::error::would_block;
}

struct Call {
  http::request<http::string_body> request;
  HttpClient::OnEnd on_end;
  HttpClient::OnPiece on_piece;
};

}  // namespace

struct HttpClient::Impl {
  explicit Impl(const HttpClientOptions& o)
      : url(ParseUrl(o.base_url)), api_key(o.api_key), timeout(o.timeout) {
    error_code error;
    tcp::resolver resolver(io);
    endpoints = resolver.resolve(url.host, url.port, tcp::resolver::numeric_service, error);
    if (error) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--base-url: {}: {}", Quote(url.host), error.message()));
    }
  }

  beast::tcp_stream TakeConnection();
  awaitable<void> Exchange(Call call);
  awaitable<error_code> Talk(beast::tcp_stream stream, Call& call, HttpReply& reply);
  awaitable<error_code> ReadReply(beast::tcp_stream& stream, const OnPiece& on_piece,
                                  HttpReply& reply, bool& keep_alive);

  const Url url;
  const std::string api_key;
  const std::chrono::milliseconds timeout;
  asio::io_context io{1};
  tcp::resolver::results_type endpoints;
  std::vector<tcp::socket> idle;
};

// Not open: to be connected.
beast::tcp_stream HttpClient::Impl::TakeConnection() {
  while (!idle.empty()) {
    tcp::socket socket = std::move(idle.back());
    idle.pop_back();
    if (IsQuiet(socket)) return beast::tcp_stream(std::move(socket));
  }
  return beast::tcp_stream(io);
}

awaitable<error_code> HttpClient::Impl::ReadReply(beast::tcp_stream& stream,
                                                  const OnPiece& on_piece, HttpReply& reply,
                                                  bool& keep_alive) {
  error_code error;
  beast::flat_buffer buffer;
  http::response_parser<http::buffer_body> parser;
  parser.header_limit(kMaxHeaderBytes);
  parser.body_limit(boost::none);
  co_await http::async_read_header(stream, buffer, parser,
                                   asio::redirect_error(use_awaitable, error));
  if (error) co_return error;
  reply.status = static_cast<int>(parser.get().result_int());
  keep_alive = parser.keep_alive();
  parser.eager(false);  // a chunk at a time: otherwise it waits until the piece is full
  std::vector<char> piece(kPieceBytes);
  while (!parser.is_done()) {
    auto& body = parser.get().body();
    body.data = piece.data();
    body.size = piece.size();
    stream.expires_after(timeout);
    co_await http::async_read_some(stream, buffer, parser,
                                   asio::redirect_error(use_awaitable, error));
    if (error && error != http::error::need_buffer) co_return error;
    const std::string_view bytes(piece.data(), piece.size() - body.size);
    if (reply.status == 200 && on_piece) {
      if (!bytes.empty()) on_piece(bytes);
    } else if (reply.body.size() + bytes.size() > kMaxBodyBytes) {
      co_return http::error::body_limit;
    } else {
      reply.body += bytes;
    }
  }
  co_return error_code();
}

awaitable<error_code> HttpClient::Impl::Talk(beast::tcp_stream stream, Call& call,
                                             HttpReply& reply) {
  error_code error;
  stream.expires_after(timeout);
  if (!stream.socket().is_open()) {
    co_await stream.async_connect(endpoints, asio::redirect_error(use_awaitable, error));
    if (error) co_return error;
    stream.socket().set_option(tcp::no_delay(true), error);  // writing will tell
  }
  co_await http::async_write(stream, call.request, asio::redirect_error(use_awaitable, error));
  if (error) co_return error;
  bool keep_alive = false;
  error = co_await ReadReply(stream, call.on_piece, reply, keep_alive);
  if (!error && keep_alive) idle.push_back(stream.release_socket());
  co_return error;
}

awaitable<void> HttpClient::Impl::Exchange(Call call) {
  HttpReply reply;
  beast::tcp_stream stream = TakeConnection();
  const bool reused = stream.socket().is_open();
  error_code error = co_await Talk(std::move(stream), call, reply);
  // A server may close an idle connection just as a request leaves (RFC 9112, 9.3.1).
  if (reused && error && error != beast::error::timeout && reply.status == 0)
    error = co_await Talk(beast::tcp_stream(io), call, reply);
  if (error == beast::error::timeout) {
    reply.error = fmt::format("{} said nothing for {} s", url.authority,
                              std::chrono::duration<double>(timeout).count());
  } else if (error) {
    reply.error = fmt::format("{}: {}", url.authority, error.message());
  }
  call.on_end(reply);
}

HttpClient::HttpClient(const HttpClientOptions& options) : impl_(std::make_unique<Impl>(options)) {}
HttpClient::~HttpClient() = default;

void HttpClient::Send(std::string path, std::optional<std::string> json, OnEnd on_end,
                      OnPiece on_piece) {
  Call call{.request = {json ? http::verb::post : http::verb::get, impl_->url.prefix + path, 11},
            .on_end = std::move(on_end),
            .on_piece = std::move(on_piece)};
  call.request.set(http::field::host, impl_->url.authority);
  if (!impl_->api_key.empty())
    call.request.set(http::field::authorization, "Bearer " + impl_->api_key);
  if (json) {
    call.request.set(http::field::content_type, "application/json");
    call.request.body() = std::move(*json);
  }
  call.request.prepare_payload();
  asio::co_spawn(impl_->io, impl_->Exchange(std::move(call)), [](std::exception_ptr failure) {
    if (failure) std::rethrow_exception(failure);  // out of Run
  });
}

void HttpClient::At(Clock::time_point time, std::function<void()> action) {
  auto timer = std::make_shared<asio::steady_timer>(impl_->io, time);
  timer->async_wait([timer, action = std::move(action)](error_code) { action(); });
}

void HttpClient::Run() {
  impl_->io.restart();
  impl_->io.run();
}

HttpReply HttpClient::Get(const std::string& path) {
  HttpReply reply;
  Send(path, std::nullopt, [&](const HttpReply& got) { reply = got; });
  Run();
  return reply;
}

}  // namespace octavo
