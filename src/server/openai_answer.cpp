// Engine events to response bodies and server-sent events: see openai.h.
#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"
#include "server/openai.h"

namespace octavo::openai {
namespace {

using OrderedJson = nlohmann::ordered_json;

// What is not UTF-8 becomes U+FFFD rather than an exception.
std::string Dump(const OrderedJson& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string Sse(std::string_view data) { return fmt::format("data: {}\n\n", data); }

// As JSON.
const char* Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return R"("stop")";
    case FinishReason::kLength:
      return R"("length")";
    case FinishReason::kCancelled:
      return R"("abort")";
    case FinishReason::kNone:
    case FinishReason::kError:
      break;
  }
  OCTAVO_CHECK(false, static_cast<int>(reason));
  return nullptr;
}

int64_t Characters(std::string_view utf8) {
  return std::count_if(utf8.begin(), utf8.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

// JSON has no infinity; vLLM's choice.
float Finite(float logprob) { return std::max(logprob, -9999.0f); }

constexpr std::string_view kReplacement = "\uFFFD";

bool IsWhole(std::string_view text) { return text.find(kReplacement) == text.npos; }

std::string Quoted(std::string_view text) { return Dump(text); }

std::string Number(float logprob) {
  std::string text = fmt::format("{}", Finite(logprob));
  if (text.find_first_of(".e") == text.npos) text += ".0";  // no client should take it for an int
  return text;
}

// One more element of the inside of an array or object.
template <class... Ts>
void Append(std::string& list, fmt::format_string<Ts...> format, Ts&&... values) {
  if (!list.empty()) list += ',';
  fmt::format_to(std::back_inserter(list), format, std::forward<Ts>(values)...);
}

// A token of a chat up to its alternatives. OpenAI has no bytes where the text stands for part of a
// character.
std::string ChatToken(const std::string& text, float logprob) {
  std::string bytes;
  for (const char c : text) Append(bytes, "{}", static_cast<unsigned char>(c));
  return fmt::format(R"({{"token":{},"logprob":{},"bytes":{})", Quoted(text), Number(logprob),
                     IsWhole(text) ? "[" + bytes + "]" : "null");
}

}  // namespace

Answer::Answer(const CompletionRequest& request, std::string id, std::string model, int64_t created,
               std::span<const EncodedPrompt> prompts, TokenText token_text)
    : api_(request.api),
      stream_(request.stream),
      include_usage_(request.include_usage),
      continuous_usage_(request.continuous_usage),
      echo_logprobs_(request.api == Api::kCompletions && request.echo && request.logprobs),
      alternatives_(request.logprobs),
      prompt_alternatives_(request.prompt_logprobs),
      choices_per_prompt_(request.n),
      role_(Quoted(request.role)),
      skip_special_tokens_(request.skip_special_tokens),
      token_text_(std::move(token_text)) {
  for (const EncodedPrompt& prompt : prompts) {
    prompt_tokens_ += std::ssize(prompt.tokens);
    Part part;
    if (request.echo) part.text = prompt.text;
    if (prompt_alternatives_) {
      part.prompt_logprobs = "null";
      Advance(part.unfinished_prompt, prompt.tokens.front());
    }
    if (echo_logprobs_) AddLogprobs(part, prompt.tokens.front(), std::nullopt, {});
    parts_.insert(parts_.end(), request.n, part);
  }
  const char* object = api_ == Api::kCompletions ? "text_completion"
                       : stream_                 ? "chat.completion.chunk"
                                                 : "chat.completion";
  head_ = Dump({{"id", id}, {"object", object}, {"created", created}, {"model", model}});
  head_.pop_back();  // more fields follow
}

std::string Answer::Envelope(std::string_view choices, std::string_view more) const {
  return fmt::format(R"({},"choices":[{}]{}}})", head_, choices, more);
}

std::string Answer::Content(std::string_view text) const {
  if (stream_ && api_ == Api::kChat && text.empty()) return R"("delta":{})";
  const std::string quoted = Dump(text);
  if (api_ == Api::kCompletions) return R"("text":)" + quoted;
  if (stream_) return fmt::format(R"("delta":{{"content":{}}})", quoted);
  return fmt::format(R"("message":{{"role":{},"content":{}}})", role_, quoted);
}

void Answer::AppendChoice(std::string& out, size_t index, std::string_view content,
                          std::string_view finish_reason) {
  Part& part = parts_[index];
  fmt::format_to(std::back_inserter(out), R"({{"index":{},"logprobs":)", index);
  AppendLogprobs(out, part);
  fmt::format_to(std::back_inserter(out), R"(,"finish_reason":{},{})", finish_reason, content);
  if (api_ == Api::kCompletions) AppendPromptLogprobs(out, part);
  out += '}';
}

std::optional<std::string> Answer::TextAfter(const Unfinished& unfinished, int32_t token) const {
  constexpr size_t kMostBytes = 4;  // of a character; a token brings at least one
  std::string alone = token_text_({&token, 1}, false);
  if (IsWhole(alone)) return alone;
  Unfinished tokens = unfinished;
  tokens.push_back(token);
  std::string text = token_text_(tokens, false);
  if (text.ends_with(kReplacement) && tokens.size() < kMostBytes) return std::nullopt;
  return text;
}

int64_t Answer::Advance(Unfinished& unfinished, int32_t token) const {
  const bool is_whole = TextAfter(unfinished, token).has_value();
  unfinished.push_back(token);
  if (!is_whole) return 0;
  return Characters(token_text_(std::exchange(unfinished, {}), skip_special_tokens_));
}

void Answer::AddLogprobs(Part& part, int32_t token, std::optional<float> logprob,
                         std::span<const TokenLogprob> top) {
  const auto text_of = [&](int32_t id) { return TextAfter(part.unfinished, id).value_or(""); };
  top = top.first(std::min<size_t>(top.size(), *alternatives_));
  const std::string text = text_of(token);
  Logprobs& out = part.logprobs;
  std::string others;
  if (api_ == Api::kChat) {
    for (const TokenLogprob& one : top)
      Append(others, "{}}}", ChatToken(text_of(one.token), one.logprob));
    Append(out.tokens, R"({},"top_logprobs":[{}]}})", ChatToken(text, *logprob), others);
    part.characters += Advance(part.unfinished, token);
    return;
  }
  if (logprob) Append(others, "{}:{}", Quoted(text), Number(*logprob));
  std::vector<std::string> seen = {text};
  for (const TokenLogprob& one : top) {  // of tokens with one text the first
    std::string other = text_of(one.token);
    if (std::count(seen.begin(), seen.end(), other)) continue;
    Append(others, "{}:{}", Quoted(other), Number(one.logprob));
    seen.push_back(std::move(other));
  }
  Append(out.tokens, "{}", Quoted(text));
  Append(out.logprobs, "{}", logprob ? Number(*logprob) : "null");
  Append(out.top, "{}", logprob ? "{" + others + "}" : "null");
  Append(out.offsets, "{}", part.characters);
  part.characters += Advance(part.unfinished, token);
}

void Answer::AppendPromptLogprobs(std::string& out, Part& part) {
  const std::string taken = std::exchange(part.prompt_logprobs, "");
  if (!taken.empty()) out.append(R"(,"prompt_logprobs":[)").append(taken).append("]");
}

void Answer::AppendLogprobs(std::string& out, Part& part) const {
  const Logprobs taken = std::exchange(part.logprobs, {});
  if (taken.tokens.empty()) {
    out += "null";
  } else if (api_ == Api::kChat) {
    out.append(R"({"content":[)").append(taken.tokens).append("]}");
  } else {
    out.append(R"({"tokens":[)").append(taken.tokens);
    out.append(R"(],"token_logprobs":[)").append(taken.logprobs).append(R"(],"top_logprobs":)");
    if (*alternatives_ > 0) out.append("[").append(taken.top).append("]");
    if (*alternatives_ == 0) out += "null";
    out.append(R"(,"text_offset":[)").append(taken.offsets).append("]}");
  }
}

std::string Answer::Usage() const {
  int64_t cached = 0;
  for (size_t i = 0; i < parts_.size(); i += choices_per_prompt_) {
    int64_t of_prompt = 0;
    for (int n = 0; n < choices_per_prompt_; ++n)
      of_prompt = std::max(of_prompt, parts_[i + n].cached_tokens);
    cached += of_prompt;
  }
  return R"(,"usage":)" + Dump({{"prompt_tokens", prompt_tokens_},
                                {"completion_tokens", completion_tokens_},
                                {"total_tokens", prompt_tokens_ + completion_tokens_},
                                {"prompt_tokens_details", {{"cached_tokens", cached}}}});
}

std::string Answer::StreamedUsage() const {
  if (!include_usage_) return "";
  return continuous_usage_ ? Usage() : R"(,"usage":null)";
}

std::string Answer::Begin() const {
  if (!stream_ || api_ != Api::kChat) return "";
  std::string out;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const std::string choice = fmt::format(
        R"({{"index":{},"logprobs":null,"finish_reason":null,"delta":{{"role":{},"content":""}}}})",
        i, role_);
    out += Sse(Envelope(choice, StreamedUsage()));
  }
  return out;
}

void Answer::PromptToken(const Event& event, size_t choice) {
  Part& part = parts_[choice];
  if (echo_logprobs_) AddLogprobs(part, event.token, event.logprob, event.top);
  if (!prompt_alternatives_) return;
  std::string entry;  // clients take the first for the token itself
  const auto add = [&](int32_t token, float logprob, int32_t rank) {
    Append(entry, R"("{}":{{"logprob":{},"rank":{},"decoded_token":{}}})", token, Number(logprob),
           rank, Quoted(TextAfter(part.unfinished_prompt, token).value_or("")));
  };
  add(event.token, event.logprob, event.rank);
  const int top = std::min(*prompt_alternatives_, static_cast<int>(event.top.size()));
  for (int i = 0; i < top; ++i) {
    if (event.top[i].token != event.token) add(event.top[i].token, event.top[i].logprob, i + 1);
  }
  Append(part.prompt_logprobs, "{{{}}}", entry);
  Advance(part.unfinished_prompt, event.token);
}

std::string Answer::Chunk(size_t index, std::string_view text, std::string_view finish_reason) {
  Part& part = parts_[index];
  std::string out = "data: " + head_ + R"(,"choices":[)";
  AppendChoice(out, index, Content(std::exchange(part.text, "") + std::string(text)),
               finish_reason);
  out += ']' + StreamedUsage();
  if (api_ == Api::kChat && index == 0) AppendPromptLogprobs(out, part);
  return out + "}\n\n";
}

std::string Answer::Token(const Event& event, std::string_view text, size_t choice) {
  Part& part = parts_[choice];
  ++completion_tokens_;
  if (alternatives_) AddLogprobs(part, event.token, event.logprob, event.top);
  if (!stream_) {
    part.text += text;
    return "";
  }
  if (text.empty() && part.logprobs.tokens.empty()) return "";  // a character that is not whole yet
  return Chunk(choice, text, "null");
}

std::string Answer::Finish(const Event& event, std::string_view text, size_t choice) {
  Part& part = parts_[choice];
  const bool last = ++finished_ == parts_.size();
  part.cached_tokens = event.cached_tokens;
  if (event.finish_reason == FinishReason::kError) {
    OCTAVO_CHECK(stream_);  // otherwise the status says it
    return "data: " + ErrorBody(500, event.error) + "\n\n" + (last ? "data: [DONE]\n\n" : "");
  }
  if (!stream_) {
    part.text += text;
    part.finish_reason = Name(event.finish_reason);
    return last ? Body() : "";
  }
  std::string out = Chunk(choice, text, Name(event.finish_reason));
  if (!last) return out;
  if (include_usage_) out += Sse(Envelope("", Usage()));
  return out + "data: [DONE]\n\n";
}

std::string Answer::Body() {
  size_t bytes = 4096;
  for (const Part& part : parts_) {
    const Logprobs& l = part.logprobs;
    bytes += 256 + part.text.size() + part.prompt_logprobs.size() + l.tokens.size() +
             l.logprobs.size() + l.top.size() + l.offsets.size();
  }
  std::string out;
  out.reserve(bytes);  // of tens of megabytes every copy is felt
  out.append(head_).append(R"(,"choices":[)");
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (i > 0) out += ',';
    AppendChoice(out, i, Content(parts_[i].text), parts_[i].finish_reason);
  }
  out += ']';
  if (api_ == Api::kChat) AppendPromptLogprobs(out, parts_[0]);
  return out.append(Usage()).append("}");
}

std::string TokenizeBody(std::span<const int32_t> tokens, int64_t max_model_len) {
  return Dump({{"count", tokens.size()}, {"max_model_len", max_model_len}, {"tokens", tokens}});
}

std::string DetokenizeBody(std::string_view text) { return Dump({{"prompt", text}}); }

std::string ModelsBody(const ModelCard& card) {
  const Json model = {{"id", card.name},
                      {"object", "model"},
                      {"created", card.created},
                      {"owned_by", "octavo"},
                      {"root", card.folder},
                      {"max_model_len", card.max_model_len},
                      {"kv_cache_policy", card.cache_policy}};
  return Dump({{"object", "list"}, {"data", Json::array({model})}});
}

std::string ErrorBody(int http_status, std::string_view message) {
  const std::string_view field = message.substr(0, message.find(": "));
  const bool is_field = field.size() < message.size() && !field.empty() &&
                        std::all_of(field.begin(), field.end(), [](char c) {
                          return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
                                 c == '.' || c == '[' || c == ']';
                        });
  const char* type = http_status == 401   ? "authentication_error"
                     : http_status == 404 ? "not_found_error"
                     : http_status >= 500 ? "server_error"
                                          : "invalid_request_error";
  return Dump({{"error",
                {{"message", message},
                 {"type", type},
                 {"param", is_field ? Json(field) : Json()},
                 {"code", http_status}}}});
}

int HttpStatus(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
    case ErrorCode::kResourceExhausted:
      return 400;
    case ErrorCode::kNotFound:
      return 404;
    case ErrorCode::kUnsupported:
      return 501;
  }
  OCTAVO_CHECK(false, static_cast<int>(code));
  return 500;
}

}  // namespace octavo::openai
