// HTTP without sockets: what is answered to a request of which the header is known, and answers in
// the API's terms.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include <boost/beast/http.hpp>

#include "base/error.h"

namespace octavo {

using HttpRequest = boost::beast::http::request<boost::beast::http::string_body>;
using HttpResponse = boost::beast::http::response<boost::beast::http::string_body>;

HttpResponse Respond(boost::beast::http::status status, std::string body,
                     std::string_view type = "application/json");
// With OpenAI's error object.
HttpResponse Refuse(boost::beast::http::status status, std::string_view message);
HttpResponse Refuse(const Error& error);

// Of a chunked body.
std::string Chunk(std::string_view text);

struct Target {
  std::string_view path, query;
};
Target TargetOf(const boost::beast::http::request_header<>& header);

// Before any of the body is read: the refusal of what is not authorised, has no route, or cannot be
// read. `chunked`: that is its transfer encoding.
std::optional<HttpResponse> CheckHeader(const boost::beast::http::request_header<>& header,
                                        bool chunked, std::string_view api_key);

}  // namespace octavo
