#include "server/completion_stream.h"

#include "base/error.h"
#include "io/json.h"

namespace octavo {
namespace {

constexpr size_t kMaxEventBytes = 1 << 20;

// A string member of an object; empty if it is anything else.
std::string StringIn(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

std::optional<int64_t> CountIn(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_number_integer()) return std::nullopt;
  return found->get<int64_t>();
}

}  // namespace

std::vector<std::string> SseReader::Push(std::string_view bytes) {
  std::vector<std::string> events;
  for (const char c : bytes) {  // a line ends with \n, \r or \r\n
    const bool second_half = c == '\n' && after_return_;
    after_return_ = c == '\r';
    if (second_half) continue;
    if (c == '\n' || c == '\r') {
      Line(events);
      line_.clear();
    } else {
      line_ += c;
    }
    if (line_.size() + data_.size() > kMaxEventBytes) {
      throw Error(ErrorCode::kResourceExhausted, "the server sent an event of more than 1 MiB");
    }
  }
  return events;
}

void SseReader::Line(std::vector<std::string>& events) {
  if (line_.empty()) {
    if (has_data_) events.push_back(std::move(data_));
    data_.clear();
    has_data_ = false;
  } else if (line_.starts_with("data:")) {
    if (has_data_) data_ += '\n';
    data_ += std::string_view(line_).substr(line_.starts_with("data: ") ? 6 : 5);
    has_data_ = true;
  }
}

void CompletionStream::Push(std::string_view bytes, double now) {
  for (const std::string& data : events_.Push(bytes)) OnEvent(data, now);
}

void CompletionStream::OnEvent(const std::string& data, double now) {
  if (data == "[DONE]") {
    done_ = true;
    return;
  }
  const Json chunk = ParseJson(data, "an event of the answer");
  if (!chunk.is_object() || chunk.contains("error"))
    throw Error(ErrorCode::kInvalidArgument, ErrorMessage(data));
  const auto usage = chunk.find("usage");
  if (usage != chunk.end() && usage->is_object()) {
    prompt_tokens_ = CountIn(*usage, "prompt_tokens");
    completion_tokens_ = CountIn(*usage, "completion_tokens");
  }
  const auto choices = chunk.find("choices");
  if (choices == chunk.end() || !choices->is_array() || choices->empty()) return;
  const Json& choice = choices->front();
  if (!choice.is_object()) return;
  const auto delta = choice.find("delta");
  const bool is_chat = delta != choice.end() && delta->is_object();
  std::string text = StringIn(choice, "text");
  if (is_chat) {
    for (const char* key : {"reasoning_content", "reasoning", "content"})
      text += StringIn(*delta, key);
  }
  // Without text it may be a token that has none; but not the beginning of a chat, nor an end
  // that comes on its own.
  const bool is_end = !StringIn(choice, "finish_reason").empty();
  if (!text.empty() || !(is_end || is_chat)) times_.push_back(now);
  text_ += text;
}

std::string ErrorMessage(std::string_view body) {
  try {
    const Json json = ParseJson(body, "the reply");
    const Json& error = json.is_object() && json.contains("error") ? json["error"] : json;
    if (error.is_string()) return Quote(error.get<std::string>());
    if (error.is_object() && !StringIn(error, "message").empty())
      return Quote(StringIn(error, "message"));
  } catch (const Error&) {
    // Not JSON: as it stands.
  }
  return Quote(body);
}

}  // namespace octavo
