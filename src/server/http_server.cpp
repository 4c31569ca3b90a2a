#include "server/http_server.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <ctime>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <set>

#include <fmt/format.h>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>

#include "base/error.h"
#include "base/log.h"
#include "io/json.h"
#include "server/generation.h"
#include "server/http_messages.h"
#include "server/intake.h"
#include "server/metrics.h"
#include "server/openai.h"

// GCC 12 destroys a capturing lambda inside a co_await expression twice: what is awaited here is
// always a named coroutine or an operation of Asio's, and its arguments are named too.
namespace octavo {

extern const std::string_view kServerPage;  // page.html

namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::awaitable;
using asio::use_awaitable;
using asio::ip::tcp;
using boost::system::error_code;

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kHealthInterval{1};  // how often saturation is looked for
constexpr size_t kEventsPerTurn = 256;              // with 20 alternatives each some 3 ms
constexpr std::chrono::seconds kAskInterval{1};     // of a client who says no more
constexpr const char* kGoOn = "HTTP/1.1 100 Continue\r\n\r\n";

// What the engine and the client's socket have to say to the coroutine that answers a request. All
// of it lives on the I/O thread.
struct Mailbox {
  explicit Mailbox(asio::io_context& io) : wake(io) {}

  std::vector<Event> events;
  size_t open = 0;            // requests of the engine whose final event has not come
  bool half_closed = false;   // the client will send no more, or is gone:
  Clock::time_point asked{};  // when he was last asked which
  bool client_gone = false;
  bool unread = false;      // more has come from the client already, which hides its end
  bool answered = false;    // nobody reads any more
  asio::steady_timer wake;  // cancelled when there is news
};

struct Connection {
  Connection(tcp::socket socket, const ServerOptions& options)
      : stream(std::move(socket)), buffer(options.max_header_bytes + options.max_body_bytes) {}

  beast::tcp_stream stream;
  beast::flat_buffer buffer;
  bool busy = false;       // a request has been read and its answer is not complete
  size_t body_bytes = 0;   // of the request that is being read
  bool head_only = false;  // the request is a HEAD
  Clock::time_point idle_since = Clock::now();  // while it is not: since its last answer
  std::shared_ptr<Mailbox> mailbox;             // while something works for it
};

using Prepared = Generation::Prepared;

// Of the calling thread.
double CpuSeconds() {
  timespec time;
  OCTAVO_CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Also with bytes still unread.
bool IsHalfClosed(tcp::socket& socket) {
  pollfd state{.fd = socket.native_handle(), .events = POLLRDHUP, .revents = 0};
  return poll(&state, 1, 0) > 0;
}

}  // namespace

struct HttpServer::Impl {
  Impl(std::unique_ptr<Engine> the_engine, ServerOptions the_options)
      : options(std::move(the_options)),
        metrics(options.model_name, the_engine->max_model_len()),
        engine(std::move(the_engine)),
        intake(*engine, options) {
    card = {.name = options.model_name,
            .folder = options.model_folder,
            .created = Now(),
            .max_model_len = engine->max_model_len(),
            .cache_policy = engine->StartupReport()};
    // One by one they would wake the I/O thread so often that it and the loop wait for each other.
    engine->AfterCallbacks([this] {
      if (arrived.empty()) return;
      asio::post(io,
                 [this, arrivals = std::exchange(arrived, {})]() mutable { Deliver(arrivals); });
    });
    try {
      tcp::resolver resolver(io);
      const auto found = resolver.resolve(options.host, std::to_string(options.port),
                                          tcp::resolver::passive | tcp::resolver::numeric_service);
      const tcp::endpoint endpoint = found.begin()->endpoint();
      acceptor.open(endpoint.protocol());
      acceptor.set_option(tcp::acceptor::reuse_address(true));
      acceptor.bind(endpoint);
      acceptor.listen();
    } catch (const boost::system::system_error& error) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--host, --port: cannot listen on {} port {}: {}", options.host,
                              options.port, error.code().message()));
    }
  }

  static int64_t Now() {
    return std::chrono::duration_cast<std::chrono::seconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
  }

  awaitable<void> Accept();
  bool CloseAnIdleOne(size_t least_body_bytes = 0);
  awaitable<error_code> ReadBody(Connection& connection,
                                 http::request_parser<http::string_body>& parser);
  void ForgetBody(Connection& connection);
  awaitable<void> HandleSignals();
  awaitable<void> Serve(tcp::socket socket);
  awaitable<bool> ServeOne(Connection& connection);  // whether another request may follow
  class Watched;
  awaitable<bool> ServeCompletion(Connection& connection, const HttpRequest& message,
                                  openai::Api api);
  awaitable<bool> Generate(Connection& connection, const HttpRequest& message, Prepared& prepared,
                           std::optional<Watched>& watched);
  class Running;
  awaitable<bool> Send(Connection& connection, HttpResponse& response, bool keep_alive);
  awaitable<void> LingerAndClose(Connection& connection);

  HttpResponse AnswerGet(std::string_view path);
  using Job = std::function<void(const std::atomic<bool>& abandoned)>;
  awaitable<std::optional<HttpResponse>> OnWorker(Job job, const std::atomic<bool>& abandoned);
  awaitable<std::optional<HttpResponse>> Prepare(Connection& connection, const HttpRequest& message,
                                                 Job job);
  awaitable<bool> ServeTokens(Connection& connection, const HttpRequest& message);
  struct Arrival {
    Mailbox* mailbox;
    Event event;
  };
  void Deliver(std::vector<Arrival>& arrivals);
  void WatchForHangUp(Connection& connection, const std::shared_ptr<Mailbox>& mailbox);
  awaitable<void> FindOutWhetherGone(Connection& connection, std::string_view question);
  awaitable<void> Sleep(Mailbox& mailbox);
  bool KeepAlive(const HttpRequest& message) const { return message.keep_alive() && !draining; }

  ServerOptions options;
  openai::ModelCard card;
  Metrics metrics;
  std::vector<LayerCacheReport> seen_health;  // when saturation was last looked for:
  Clock::time_point health_seen{};

  asio::io_context io{1};
  // Large bodies take turns on one thread, so that the other is always there for small ones.
  asio::thread_pool workers{2};
  asio::any_io_executor small{workers.get_executor()};
  asio::any_io_executor large{asio::make_strand(workers)};
  std::atomic<double> worker_cpu_seconds = 0;
  tcp::acceptor acceptor{io};
  asio::signal_set signals{io, SIGTERM, SIGINT};
  std::set<Connection*> connections;
  size_t body_bytes = 0;          // of all that are being read
  int requests = 0, choices = 0;  // in the worker; in the engine
  // Until the engine's final event, however the coroutine that reads them ends.
  std::map<Mailbox*, std::shared_ptr<Mailbox>> mailboxes;
  std::vector<Arrival> arrived;             // the engine's loop's, until the end of a step
  bool draining = false, stopping = false;  // since the first and the second signal
  const uint64_t id_base = std::random_device{}();
  uint64_t next_id = 0;

  // Behind all that its callbacks post to, so that it is gone before.
  std::unique_ptr<Engine> engine;
  const Intake intake;  // the worker's
};

namespace {

// What ends a coroutine otherwise than by returning is ours to mend.
struct LogFailure {
  void operator()(std::exception_ptr failure) const {
    if (!failure) return;
    try {
      std::rethrow_exception(failure);
    } catch (const std::exception& error) {
      Log(LogLevel::kError, fmt::format("a connection ended with: {}", error.what()));
    }
  }
};

// Removes from `bytes` what the socket takes at once: most often all of it, which then costs
// neither a timer nor a turn of the loop.
error_code WriteNow(tcp::socket& socket, std::string* bytes) {
  error_code error;
  bytes->erase(0, socket.write_some(asio::buffer(*bytes), error));
  return error == asio::error::would_block ? error_code() : error;
}

// While it lives, on the worker.
class WorkerTime {
 public:
  explicit WorkerTime(std::atomic<double>& seconds) : seconds_(seconds), begin_(CpuSeconds()) {}
  ~WorkerTime() { seconds_ += CpuSeconds() - begin_; }
  WorkerTime(const WorkerTime&) = delete;

 private:
  std::atomic<double>& seconds_;
  const double begin_;
};

class Counted {
 public:
  Counted(int& count, int more) : count_(count), more_(more) { count_ += more_; }
  ~Counted() { count_ -= more_; }
  Counted(const Counted&) = delete;

 private:
  int& count_;
  const int more_;
};

}  // namespace

awaitable<void> HttpServer::Impl::Accept() {
  for (;;) {
    error_code error;
    tcp::socket socket = co_await acceptor.async_accept(asio::redirect_error(use_awaitable, error));
    if (draining) co_return;
    if (error) {  // out of file descriptors, most likely: connections that end give some back
      Log(LogLevel::kWarning, fmt::format("cannot accept a connection: {}", error.message()));
      asio::steady_timer pause(io, std::chrono::milliseconds(100));
      co_await pause.async_wait(asio::redirect_error(use_awaitable, error));
      if (draining) co_return;
      continue;
    }
    const bool full = static_cast<int>(connections.size()) >= options.max_connections;
    if (full && !CloseAnIdleOne()) continue;        // closes the new one
    socket.set_option(tcp::no_delay(true), error);  // of a client that is gone: reading will tell
    socket.non_blocking(true, error);
    asio::co_spawn(io, Serve(std::move(socket)), LogFailure());
  }
}

// The connection that has been waiting for a request, or the rest of one, the longest; false if
// none does.
bool HttpServer::Impl::CloseAnIdleOne(size_t least_body_bytes) {
  Connection* idle = nullptr;
  for (Connection* connection : connections) {
    if (!connection->busy && connection->body_bytes >= least_body_bytes &&
        (!idle || connection->idle_since < idle->idle_since))
      idle = connection;
  }
  if (!idle) return false;
  idle->busy = true;  // with its end
  ForgetBody(*idle);
  idle->stream.cancel();
  return true;
}

awaitable<void> HttpServer::Impl::HandleSignals() {
  error_code error;
  co_await signals.async_wait(asio::redirect_error(use_awaitable, error));
  draining = true;
  acceptor.close(error);
  Log(LogLevel::kInfo, fmt::format("draining {} connections", connections.size()));
  for (Connection* connection : connections) {
    if (!connection->busy) connection->stream.cancel();
  }
  if (connections.empty()) co_return;
  co_await signals.async_wait(asio::redirect_error(use_awaitable, error));
  if (error) co_return;  // drained
  stopping = true;
  Log(LogLevel::kInfo, fmt::format("closing {} connections", connections.size()));
  for (Connection* connection : connections) {
    connection->stream.close();
    if (connection->mailbox) connection->mailbox->wake.cancel();
  }
}

awaitable<void> HttpServer::Impl::Serve(tcp::socket socket) {
  Connection connection(std::move(socket), options);
  connections.insert(&connection);
  std::exception_ptr failure;
  try {
    while (!draining) {
      connection.busy = false;
      const bool again = co_await ServeOne(connection);
      if (!again) break;
    }
  } catch (...) {
    failure = std::current_exception();
  }
  connections.erase(&connection);
  ForgetBody(connection);
  if (draining && connections.empty()) signals.cancel();
  if (failure) std::rethrow_exception(failure);
}

HttpResponse HttpServer::Impl::AnswerGet(std::string_view path) {
  if (path == "/health") return Respond(http::status::ok, "");
  if (path == "/version")
    return Respond(http::status::ok, Json{{"version", options.version}}.dump());
  if (path == "/") {
    HttpResponse page =
        Respond(http::status::ok, std::string(kServerPage), "text/html; charset=utf-8");
    page.set("Content-Security-Policy",
             "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
             "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
    page.set("Referrer-Policy", "no-referrer");  // its address may hold the key
    return page;
  }
  if (path == "/metrics") {
    metrics.SetCpuSeconds(CpuSeconds() + worker_cpu_seconds);  // of both threads
    return Respond(http::status::ok,
                   metrics.Text(engine->options(), engine->stats(), engine->CacheReport()),
                   "text/plain; version=0.0.4; charset=utf-8");
  }
  return Respond(http::status::ok, openai::ModelsBody(card));
}

void HttpServer::Impl::WatchForHangUp(Connection& connection,
                                      const std::shared_ptr<Mailbox>& mailbox) {
  tcp::socket& socket = connection.stream.socket();
  socket.async_wait(tcp::socket::wait_read, [&connection, mailbox](error_code error) {
    if (error || mailbox->answered) return;
    mailbox->half_closed = IsHalfClosed(connection.stream.socket());
    // Otherwise it is the next request already, which would wake this at once for ever: Generate
    // asks at every event.
    mailbox->unread = !mailbox->half_closed;
    if (mailbox->half_closed) mailbox->wake.cancel();
  });
}

// A client who has shut down his sending side (`nc -N`) looks like one who is gone until he is sent
// something: only the latter's machine answers with a reset. So he is sent what means nothing to
// him, at once and then every second, since he may leave later: a comment in a stream, an interim
// response before a whole answer. No reset, and he is served. That is more than uvicorn does, and
// vLLM with it, which drop both, and no less for whoever is gone: he is found out after one round
// trip, or a second. HTTP/1.0 has nothing that could be sent
// before a whole answer, so that there he counts as gone.
awaitable<void> HttpServer::Impl::FindOutWhetherGone(Connection& connection,
                                                     std::string_view question) {
  const std::shared_ptr<Mailbox> mailbox = connection.mailbox;
  mailbox->half_closed |= mailbox->unread && IsHalfClosed(connection.stream.socket());
  const Clock::time_point now = Clock::now();
  if (!mailbox->half_closed || mailbox->client_gone || now < mailbox->asked + kAskInterval)
    co_return;
  mailbox->client_gone = question.empty();
  if (mailbox->client_gone) co_return;
  if (mailbox->asked == Clock::time_point{}) {
    connection.stream.socket().async_wait(tcp::socket::wait_error, [mailbox](error_code failed) {
      if (failed || mailbox->answered) return;
      mailbox->client_gone = true;
      mailbox->wake.cancel();
    });
  }
  mailbox->asked = now;
  error_code error;
  connection.stream.expires_after(options.write_timeout);
  co_await asio::async_write(connection.stream, asio::buffer(question),
                             asio::redirect_error(use_awaitable, error));
  connection.stream.expires_never();
  if (error) mailbox->client_gone = true;
}

// Until there is news, or it is time to ask again.
awaitable<void> HttpServer::Impl::Sleep(Mailbox& mailbox) {
  const bool was_asked = mailbox.asked != Clock::time_point{};
  mailbox.wake.expires_at(was_asked ? mailbox.asked + kAskInterval : Clock::time_point::max());
  error_code ignored;
  co_await mailbox.wake.async_wait(asio::redirect_error(use_awaitable, ignored));
}

// Of a client whose request is being worked on. While it lives he is listened to, and the
// connection has a mailbox.
class HttpServer::Impl::Watched {
 public:
  Watched(Impl& server, Connection& connection) : connection_(connection) {
    connection.mailbox = std::make_shared<Mailbox>(server.io);
    connection.stream.expires_never();
    server.WatchForHangUp(connection, connection.mailbox);
  }
  ~Watched() {
    connection_.mailbox->answered = true;
    connection_.mailbox = nullptr;
    error_code ignored;  // nothing to cancel
    connection_.stream.socket().cancel(ignored);
  }
  Watched(const Watched&) = delete;

 private:
  Connection& connection_;
};

// A coroutine for the worker: what refuses a request whose job throws. The exception ends where it
// was thrown: were it handed on, one thread could read it and the other free it, by a count inside
// libstdc++ that ThreadSanitizer does not see.
awaitable<std::optional<HttpResponse>> HttpServer::Impl::OnWorker(
    Job job, const std::atomic<bool>& abandoned) {
  const WorkerTime counted(worker_cpu_seconds);
  try {
    if (!abandoned) job(abandoned);  // the client may have left while it waited
    co_return std::nullopt;
  } catch (const Error& error) {
    co_return Refuse(error);
  } catch (const std::exception& error) {
    co_return Refuse(http::status::internal_server_error, error.what());
  }
}

// Has the job done, unless the client leaves before: the connection's mailbox tells. Returns what
// refuses the request.
awaitable<std::optional<HttpResponse>> HttpServer::Impl::Prepare(Connection& connection,
                                                                 const HttpRequest& message,
                                                                 Job job) {
  constexpr size_t kSmallBody = 64 << 10;  // milliseconds, whatever is in it
  // So is a template of the request's own, unless its key is spelled with escapes: those who may
  // bring one are trusted not to.
  const bool is_small = message.body().size() <= kSmallBody &&
                        message.body().find("\"chat_template\"") == std::string::npos;
  Mailbox& mailbox = *connection.mailbox;
  std::atomic<bool> abandoned = false;
  std::optional<std::optional<HttpResponse>> result;
  asio::co_spawn(
      is_small ? small : large, OnWorker(std::move(job), abandoned),
      asio::bind_executor(io, [&](std::exception_ptr failure, std::optional<HttpResponse> refusal) {
        OCTAVO_CHECK(!failure);  // OnWorker lets none through
        result = std::move(refusal);
        mailbox.wake.cancel();
      }));
  while (!result) {
    if (message.version() >= 11) co_await FindOutWhetherGone(connection, kGoOn);
    abandoned = mailbox.client_gone || stopping;
    if (result) break;
    co_await Sleep(mailbox);
  }
  co_return std::move(*result);
}

awaitable<bool> HttpServer::Impl::ServeTokens(Connection& connection, const HttpRequest& message) {
  std::optional<Watched> watched(std::in_place, *this, connection);
  std::string body;
  const bool there = TargetOf(message).path == "/tokenize";
  Job job = [&](const std::atomic<bool>& abandoned) {
    body = there ? intake.Tokenize(message.body(), abandoned) : intake.Detokenize(message.body());
  };
  std::optional<HttpResponse> response = co_await Prepare(connection, message, std::move(job));
  if (connection.mailbox->client_gone || stopping) co_return false;
  watched.reset();
  if (!response) response = Respond(http::status::ok, std::move(body));
  co_return co_await Send(connection, *response, KeepAlive(message));
}

awaitable<bool> HttpServer::Impl::ServeOne(Connection& connection) {
  http::request_parser<http::string_body> parser;
  parser.header_limit(options.max_header_bytes);
  parser.body_limit(options.max_body_bytes);
  error_code error;
  connection.idle_since = Clock::now();
  connection.head_only = false;
  connection.stream.expires_after(options.read_timeout);
  co_await http::async_read_header(connection.stream, connection.buffer, parser,
                                   asio::redirect_error(use_awaitable, error));
  std::optional<HttpResponse> refusal;
  if (!error) {
    connection.head_only = parser.get().method() == http::verb::head;
    refusal = CheckHeader(parser.get(), parser.chunked(), options.api_key);
    if (!refusal && beast::iequals(parser.get()[http::field::expect], "100-continue")) {
      http::response<http::empty_body> go_on(http::status::continue_, 11);
      co_await http::async_write(connection.stream, go_on,
                                 asio::redirect_error(use_awaitable, error));
    }
  }
  if (!error && !refusal) {
    error = co_await ReadBody(connection, parser);
    if (connection.busy) co_return false;  // it was its turn to be closed
  }
  connection.busy = true;
  if (error == http::error::body_limit) {
    refusal = Refuse(http::status::payload_too_large,
                     fmt::format("the body is larger than {} bytes", options.max_body_bytes));
  } else if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    refusal = Refuse(http::status::request_header_fields_too_large,
                     fmt::format("the header is larger than {} bytes", options.max_header_bytes));
  } else if (error &&
             error.category() == http::make_error_code(http::error::bad_method).category() &&
             error != http::error::end_of_stream && error != http::error::partial_message) {
    refusal = Refuse(http::status::bad_request, "not an HTTP request: " + error.message());
  } else if (error) {
    co_return false;  // hung up, or too slow
  }
  if (refusal) {
    co_await Send(connection, *refusal, /*keep_alive=*/false);
    co_await LingerAndClose(connection);
    co_return false;
  }

  const HttpRequest message = parser.release();
  const std::string_view path = TargetOf(message).path;
  if (path == "/tokenize" || path == "/detokenize")
    co_return co_await ServeTokens(connection, message);
  if (message.method() == http::verb::post) {
    const openai::Api api =
        path == "/v1/completions" ? openai::Api::kCompletions : openai::Api::kChat;
    co_return co_await ServeCompletion(connection, message, api);
  }
  HttpResponse response = AnswerGet(path);
  co_return co_await Send(connection, response, KeepAlive(message));
}

awaitable<error_code> HttpServer::Impl::ReadBody(Connection& connection,
                                                 http::request_parser<http::string_body>& parser) {
  error_code error;
  connection.stream.expires_after(options.body_timeout);
  parser.eager(true);
  while (!error && !parser.is_done() && !connection.busy) {
    co_await http::async_read_some(connection.stream, connection.buffer, parser,
                                   asio::redirect_error(use_awaitable, error));
    const size_t more = parser.get().body().size() - connection.body_bytes;
    if (connection.busy) break;
    connection.body_bytes += more;
    body_bytes += more;
    while (body_bytes > options.max_unfinished_bytes && CloseAnIdleOne(1)) continue;
  }
  ForgetBody(connection);
  co_return error;
}

void HttpServer::Impl::ForgetBody(Connection& connection) {
  body_bytes -= std::exchange(connection.body_bytes, 0);
}

awaitable<bool> HttpServer::Impl::Send(Connection& connection, HttpResponse& response,
                                       bool keep_alive) {
  response.keep_alive(keep_alive);
  response.prepare_payload();
  if (connection.head_only) response.body().clear();  // not its length
  error_code error;
  connection.stream.expires_after(options.write_timeout);
  co_await http::async_write(connection.stream, response,
                             asio::redirect_error(use_awaitable, error));
  co_return !error && keep_alive;
}

// Closing on top of unread bytes would reset the connection and could take the answer with it.
awaitable<void> HttpServer::Impl::LingerAndClose(Connection& connection) {
  error_code error;
  connection.stream.socket().shutdown(tcp::socket::shutdown_send, error);
  connection.stream.expires_after(std::chrono::seconds(2));
  std::vector<char> waste(64 << 10);
  while (!error)
    co_await connection.stream.async_read_some(asio::buffer(waste),
                                               asio::redirect_error(use_awaitable, error));
}

awaitable<bool> HttpServer::Impl::ServeCompletion(Connection& connection,
                                                  const HttpRequest& message, openai::Api api) {
  std::optional<HttpResponse> refusal;
  Prepared prepared;
  const Clock::time_point arrival = prepared.arrival;
  const auto full = [&] {
    HttpResponse response =
        Refuse(http::status::service_unavailable,
               fmt::format("{} requests and choices are waiting already", requests + choices));
    response.set(http::field::retry_after, "1");
    return response;
  };
  if (requests + choices >= options.max_requests) {
    refusal = full();
    co_return co_await Send(connection, *refusal, KeepAlive(message));
  }
  std::optional<Watched> watched(std::in_place, *this, connection);
  {
    const Counted counted(requests, 1);
    Job job = [&](const std::atomic<bool>& abandoned) {
      prepared = intake.Completion(api, message.body(), abandoned);
    };
    refusal = co_await Prepare(connection, message, std::move(job));
  }
  if (connection.mailbox->client_gone || stopping) co_return false;
  prepared.arrival = arrival;
  const int more = static_cast<int>(prepared.engine_requests.size());
  // Whoever is alone may have more than that.
  if (!refusal && choices > 0 && choices + more > options.max_requests) refusal = full();
  if (refusal) {
    watched.reset();
    co_return co_await Send(connection, *refusal, KeepAlive(message));
  }
  const Counted counted(choices, more);
  co_return co_await Generate(connection, message, prepared, watched);
}

void HttpServer::Impl::Deliver(std::vector<Arrival>& arrivals) {
  for (Arrival& arrival : arrivals) {
    Mailbox* const mailbox = arrival.mailbox;
    const bool is_last = arrival.event.kind == Event::Kind::kFinished;
    mailbox->events.push_back(std::move(arrival.event));
    mailbox->wake.cancel();
    if (is_last && --mailbox->open == 0) mailboxes.erase(mailbox);
  }
}

// Requests in the engine for one of a client's. Its end, also by an exception, ends what was
// started for it.
class HttpServer::Impl::Running {
 public:
  Running(Impl& server, const std::shared_ptr<Mailbox>& mailbox, std::vector<Request> requests)
      : server_(server) {
    Mailbox* const box = mailbox.get();
    server_.mailboxes.emplace(box, mailbox);
    try {
      for (Request& request : requests) {
        // Raw pointers: the engine's loop must not be the one who lets go of a timer.
        ids_.push_back(
            server_.engine->Submit(std::move(request), [&server, box](const Event& event) {
              server.arrived.push_back({box, event});
            }));
        ++box->open;  // on this thread, as Deliver is
      }
    } catch (...) {
      for (const RequestId id : ids_) server_.engine->Cancel(id);
      if (ids_.empty()) server_.mailboxes.erase(box);
      throw;
    }
  }
  ~Running() { Cancel(); }
  Running(const Running&) = delete;

  // The client is gone, or there is no more time for him.
  void Cancel() {
    if (cancelled_) return;
    for (const RequestId id : ids_) server_.engine->Cancel(id);
    cancelled_ = true;
  }
  bool cancelled() const { return cancelled_; }
  // A choice is complete.
  void Stop(size_t choice) { server_.engine->Cancel(ids_[choice]); }
  size_t ChoiceOf(const Event& event) const {
    return std::find(ids_.begin(), ids_.end(), event.request) - ids_.begin();
  }

 private:
  Impl& server_;
  std::vector<RequestId> ids_;  // of the choices
  bool cancelled_ = false;
};

awaitable<bool> HttpServer::Impl::Generate(Connection& connection, const HttpRequest& message,
                                           Prepared& prepared, std::optional<Watched>& watched) {
  const openai::CompletionRequest& request = prepared.request;
  const bool chunked = message.version() >= 11;
  const bool keep_alive = KeepAlive(message) && (chunked || !request.stream);
  const char* prefix = request.api == openai::Api::kChat ? "chatcmpl" : "cmpl";
  std::optional<HttpResponse> response;
  std::optional<Running> running;
  std::optional<Generation> generation;
  try {
    running.emplace(*this, connection.mailbox, std::move(prepared.engine_requests));
    generation.emplace(*engine, prepared,
                       fmt::format("{}-{:08x}{:08x}", prefix, id_base, next_id++), card.name, Now(),
                       metrics);
  } catch (const Error& error) {
    response = Refuse(openai::AboutField(request.api, error));
  }
  if (response) {
    watched.reset();
    co_return co_await Send(connection, *response, keep_alive);
  }

  error_code error;
  if (request.stream) {
    http::response<http::empty_body> head(http::status::ok, message.version());
    head.set(http::field::content_type, "text/event-stream; charset=utf-8");
    head.set(http::field::cache_control, "no-cache");
    head.chunked(chunked);
    head.keep_alive(keep_alive);
    http::response_serializer<http::empty_body> serializer(head);
    connection.stream.expires_after(options.write_timeout);
    co_await http::async_write_header(connection.stream, serializer,
                                      asio::redirect_error(use_awaitable, error));
  }

  Mailbox& mailbox = *connection.mailbox;
  std::string out = generation->Begin();
  std::vector<Event> events;
  const std::string comment = ":\n\n";
  const std::string question = !request.stream ? (chunked ? kGoOn : "")
                               : chunked       ? Chunk(comment)
                                               : comment;
  bool look_at_health = false;
  while (!generation->finished()) {
    if (!error) co_await FindOutWhetherGone(connection, question);
    if (error || stopping || mailbox.client_gone) running->Cancel();
    if (mailbox.events.empty()) co_await Sleep(mailbox);
    events.clear();
    events.swap(mailbox.events);
    for (size_t i = 0; i < events.size(); ++i) {
      const size_t choice = running->ChoiceOf(events[i]);
      const bool is_last = events[i].kind == Event::Kind::kFinished;
      std::string more = generation->Push(std::move(events[i]), choice);
      if (out.empty()) {
        out = std::move(more);  // it may be large
      } else {
        out += more;
      }
      look_at_health |= is_last;
      if (!is_last && generation->stopped(choice)) running->Stop(choice);
      // A step's worth of prompt_logprobs takes a while: others have their turn.
      if (i % kEventsPerTurn == kEventsPerTurn - 1) co_await asio::post(io, use_awaitable);
    }
    const Clock::time_point now = Clock::now();
    if (look_at_health || now - health_seen >= kHealthInterval) {
      for (const std::string& line : SaturationWarnings(seen_health, engine->CacheReport()))
        Log(LogLevel::kWarning, line);
      health_seen = now;
      look_at_health = false;
    }
    if (request.stream && !out.empty() && !running->cancelled()) {
      if (chunked) out = Chunk(out);
      error = WriteNow(connection.stream.socket(), &out);
      if (!error && !out.empty()) {
        connection.stream.expires_after(options.write_timeout);
        co_await asio::async_write(connection.stream, asio::buffer(out),
                                   asio::redirect_error(use_awaitable, error));
      }
      out.clear();
    }
  }
  const bool lost = error || running->cancelled();
  running.reset();
  watched.reset();
  if (lost) co_return false;
  if (!request.stream) {
    response = generation->error().empty()
                   ? Respond(http::status::ok, std::move(out))
                   : Refuse(http::status::internal_server_error, generation->error());
    co_return co_await Send(connection, *response, keep_alive);
  }
  if (chunked) {
    const auto last = http::make_chunk_last();
    co_await asio::async_write(connection.stream, last, asio::redirect_error(use_awaitable, error));
  }
  co_return !error && keep_alive;
}

HttpServer::HttpServer(std::unique_ptr<Engine> engine, ServerOptions options)
    : impl_(std::make_unique<Impl>(std::move(engine), std::move(options))) {}
HttpServer::~HttpServer() = default;

std::string HttpServer::url() const {
  const tcp::endpoint endpoint = impl_->acceptor.local_endpoint();
  std::string address = endpoint.address().to_string();
  if (endpoint.address().is_v6()) address = "[" + address + "]";
  return fmt::format("http://{}:{}", address, endpoint.port());
}

void HttpServer::Run() {
  asio::co_spawn(impl_->io, impl_->Accept(), LogFailure());
  asio::co_spawn(impl_->io, impl_->HandleSignals(), LogFailure());
  impl_->io.run();
}

}  // namespace octavo
