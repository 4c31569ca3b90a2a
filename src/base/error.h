// Errors a user can cause, and checks for errors we cause.
//
// Error: anything a user can get wrong (files, config, HTTP, template, command line). The message
// is one line that names the file and field, what was expected and what was found. Three seams
// catch it: the command line (exit code 2), the HTTP handler, the engine loop (the one request
// fails). OCTAVO_CHECK: what we got wrong ourselves. Always on; prints the values and aborts.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

namespace octavo {

enum class ErrorCode {
  kInvalidArgument,   // a value the user gave is wrong: 400
  kNotFound,          // a file, tensor or route that is not there: 404
  kUnsupported,       // valid, but Octavo cannot do it: 501
  kResourceExhausted  // too long, too many, out of memory: 429 / 503
};

class Error : public std::exception {
 public:
  Error(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}

  ErrorCode code() const { return code_; }
  const std::string& message() const { return message_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorCode code_;
  std::string message_;
};

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition,
                              const std::string& values);

namespace internal {
template <typename... Ts>
std::string JoinValues(const Ts&... values) {
  std::ostringstream out;
  ((out << ' ' << values), ...);
  return out.str();
}
}  // namespace internal

// Throws Error unless `condition`: "name: expected ..., found ...".
template <typename T>
void Require(bool condition, const std::string& name, const std::string& expected, const T& found) {
  if (condition) return;
  throw Error(ErrorCode::kInvalidArgument,
              name + ": expected " + expected + ", found" + internal::JoinValues(found));
}
}  // namespace octavo

// OCTAVO_CHECK(a == b, a, b): aborts with file, line, condition and the values if the condition is
// false.
#define OCTAVO_CHECK(condition, ...)                           \
  (static_cast<bool>(condition)                                \
       ? void()                                                \
       : ::octavo::CheckFailed(__FILE__, __LINE__, #condition, \
                               ::octavo::internal::JoinValues(__VA_ARGS__)))
