// The client's side of a streamed completion: server-sent events of /v1/completions or
// /v1/chat/completions, in whatever pieces they come. No I/O, no clock.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace octavo {

// Puts server-sent events together again.
class SseReader {
 public:
  // The data of the events that are complete with these bytes. Throws Error if one exceeds 1 MiB.
  std::vector<std::string> Push(std::string_view bytes);

 private:
  void Line(std::vector<std::string>& events);

  std::string line_, data_;
  bool has_data_ = false, after_return_ = false;
};

class CompletionStream {
 public:
  // Bytes that came at `now`, in seconds of any clock. Throws Error for what is not such a stream,
  // and with the server's message if it reports an error.
  void Push(std::string_view bytes, double now);

  bool done() const { return done_; }  // [DONE] has come
  const std::string& text() const { return text_; }
  // When something of the answer came: a token each, where the server sends tokens one by one.
  const std::vector<double>& times() const { return times_; }
  // From `usage`, if the server sent it.
  std::optional<int64_t> prompt_tokens() const { return prompt_tokens_; }
  std::optional<int64_t> completion_tokens() const { return completion_tokens_; }

 private:
  void OnEvent(const std::string& data, double now);

  SseReader events_;
  bool done_ = false;
  std::string text_;
  std::vector<double> times_;
  std::optional<int64_t> prompt_tokens_, completion_tokens_;
};

// A server's own words about a refusal: OpenAI's error.message, or what else the body says.
std::string ErrorMessage(std::string_view body);

}  // namespace octavo
