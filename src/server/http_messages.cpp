#include "server/http_messages.h"

#include <algorithm>
#include <initializer_list>

#include <fmt/format.h>

#include "io/json.h"
#include "server/authorization.h"
#include "server/openai.h"

namespace octavo {

namespace beast = boost::beast;
namespace http = beast::http;

HttpResponse Respond(http::status status, std::string body, std::string_view type) {
  HttpResponse response(status, 11);
  response.set(http::field::content_type, beast::string_view(type.data(), type.size()));
  response.body() = std::move(body);
  return response;
}

HttpResponse Refuse(http::status status, std::string_view message) {
  return Respond(status, openai::ErrorBody(static_cast<int>(status), message));
}

HttpResponse Refuse(const Error& error) {
  return Refuse(static_cast<http::status>(openai::HttpStatus(error.code())), error.message());
}

std::string Chunk(std::string_view text) {
  return fmt::format("{:x}\r\n{}\r\n", text.size(), text);
}

// Also of the absolute form, which is meant for proxies but every server has to take.
Target TargetOf(const http::request_header<>& header) {
  std::string_view target(header.target().data(), header.target().size());
  if (const size_t scheme = target.find("://"); !target.starts_with('/') && scheme != target.npos) {
    target.remove_prefix(std::min(target.find_first_of("/?", scheme + 3), target.size()));
  }
  const size_t end = std::min(target.find('?'), target.size());
  const std::string_view path = target.substr(0, end);
  return {.path = path.empty() ? "/" : path,
          .query = target.substr(std::min(end + 1, target.size()))};
}

std::optional<HttpResponse> CheckHeader(const http::request_header<>& header, bool chunked,
                                        std::string_view api_key) {
  const auto [path, query] = TargetOf(header);
  const bool is_get = header.method() == http::verb::get || header.method() == http::verb::head;
  const bool is_post = header.method() == http::verb::post;
  const auto is_one_of = [&](std::initializer_list<const char*> paths) {
    return std::find(paths.begin(), paths.end(), path) != paths.end();
  };
  const size_t hosts = header.count(http::field::host);
  if (header.version() >= 11 && hosts != 1) {
    return Refuse(http::status::bad_request,
                  fmt::format("the Host header: expected one, found {}", hosts));
  }
  const beast::string_view shown = header[http::field::authorization];
  const bool is_page = path == "/";
  const bool open = path == "/health" || (is_page && IsAuthorizedByQuery(query, api_key));
  if (!open && !IsAuthorized({shown.data(), shown.size()}, api_key)) {
    HttpResponse response = Refuse(http::status::unauthorized,
                                   is_page ? "the API key is missing: open /?key=KEY"
                                           : "the Authorization header does not hold the API key");
    response.set(http::field::www_authenticate, "Bearer");
    return response;
  }
  const beast::string_view transfer = header[http::field::transfer_encoding];
  if (!transfer.empty() && !(chunked && beast::iequals(transfer, "chunked"))) {
    return Refuse(http::status::not_implemented, "a Transfer-Encoding other than chunked");
  }
  const beast::string_view encoding = header[http::field::content_encoding];
  if (!encoding.empty() && !beast::iequals(encoding, "identity")) {
    return Refuse(http::status::unsupported_media_type, "a Content-Encoding other than identity");
  }
  const bool gets = is_one_of({"/", "/health", "/version", "/v1/models", "/metrics"});
  const bool posts =
      is_one_of({"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"});
  if ((gets && is_get) || (posts && is_post)) return std::nullopt;
  if (!gets && !posts) {
    return Refuse(http::status::not_found, "no such route: " + Quote(path));
  }
  HttpResponse response = Refuse(http::status::method_not_allowed,
                                 gets ? "this route takes GET" : "this route takes POST");
  response.set(http::field::allow, gets ? "GET, HEAD" : "POST");
  return response;
}

}  // namespace octavo
