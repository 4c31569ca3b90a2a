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

// OpenAI's: none where the text stands for part of a character.
OrderedJson Bytes(const std::string& text) {
  if (text.find("\uFFFD") != text.npos) return nullptr;
  OrderedJson bytes = OrderedJson::array();
  for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

}  // namespace

Answer::Answer(const CompletionRequest& request, std::string id, std::string model, int64_t created,
               std::span<const EncodedPrompt> prompts, TokenText token_text)
    : api_(request.api),
      stream_(request.stream),
      include_usage_(request.include_usage),
      continuous_usage_(request.continuous_usage),
      echo_(request.echo),
      alternatives_(request.logprobs),
      prompt_alternatives_(request.prompt_logprobs),
      choices_per_prompt_(request.n),
      skip_special_tokens_(request.skip_special_tokens),
      token_text_(std::move(token_text)) {
  for (const EncodedPrompt& prompt : prompts) {
    prompt_tokens_ += std::ssize(prompt.tokens);
    Part part;
    if (echo_) part.text = prompt.text;
    if (prompt_alternatives_) part.prompt_logprobs = Json::array({nullptr});
    if (echo_ && alternatives_) AddLogprobs(part, prompt.tokens.front(), std::nullopt, {});
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
  return fmt::format(R"("message":{{"role":"assistant","content":{}}})", quoted);
}

std::string Answer::Choice(size_t index, std::string_view content, std::string_view finish_reason) {
  Part& part = parts_[index];
  std::string more;
  if (api_ == Api::kCompletions) more = TakePromptLogprobs(part);
  return fmt::format(R"({{"index":{},"logprobs":{},"finish_reason":{},{}{}}})", index,
                     TakeLogprobs(part), finish_reason, content, more);
}

void Answer::AddLogprobs(Part& part, int32_t token, std::optional<float> logprob,
                         std::vector<TokenLogprob> top) {
  top.resize(std::min<size_t>(top.size(), *alternatives_));
  part.pending.push_back({token_text_(token, false), logprob, std::move(top), part.characters});
  part.characters += Characters(token_text_(token, skip_special_tokens_));
}

std::string Answer::TakePromptLogprobs(Part& part) {
  if (part.prompt_logprobs.is_null()) return "";
  return R"(,"prompt_logprobs":)" + Dump(std::exchange(part.prompt_logprobs, nullptr));
}

std::string Answer::TakeLogprobs(Part& part) const {
  if (part.pending.empty()) return "null";
  const std::vector<TokenLogprobs> pending = std::exchange(part.pending, {});
  if (api_ == Api::kChat) {
    Json content = Json::array();
    const auto entry = [](const std::string& text, float logprob) {
      return Json{{"token", text}, {"logprob", Finite(logprob)}, {"bytes", Bytes(text)}};
    };
    for (const TokenLogprobs& token : pending) {
      Json top = Json::array();
      for (const TokenLogprob& one : token.top)
        top.push_back(entry(token_text_(one.token, false), one.logprob));
      content.push_back(entry(token.text, *token.logprob));
      content.back()["top_logprobs"] = std::move(top);
    }
    return Dump({{"content", std::move(content)}});
  }
  Json result = {{"tokens", Json::array()},
                 {"token_logprobs", Json::array()},
                 {"top_logprobs", *alternatives_ > 0 ? Json::array() : Json()},
                 {"text_offset", Json::array()}};
  for (const TokenLogprobs& token : pending) {
    result["tokens"].push_back(token.text);
    result["token_logprobs"].push_back(token.logprob ? Json(Finite(*token.logprob)) : Json());
    result["text_offset"].push_back(token.offset);
    if (*alternatives_ == 0) continue;
    Json top;
    if (token.logprob) {
      top = {{token.text, Finite(*token.logprob)}};
      for (const TokenLogprob& one : token.top)  // of tokens with one text the first
        top.emplace(token_text_(one.token, false), Finite(one.logprob));
    }
    result["top_logprobs"].push_back(std::move(top));
  }
  return Dump(result);
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
        R"({{"index":{},"logprobs":null,"finish_reason":null,"delta":{{"role":"assistant","content":""}}}})",
        i);
    out += Sse(Envelope(choice, StreamedUsage()));
  }
  return out;
}

void Answer::PromptToken(const Event& event, size_t choice) {
  Part& part = parts_[choice];
  if (echo_ && alternatives_) AddLogprobs(part, event.token, event.logprob, event.top);
  if (!prompt_alternatives_) return;
  Json entry = Json::object();
  const auto add = [&](int32_t token, float logprob, int32_t rank) {
    entry.emplace(std::to_string(token), Json{{"logprob", Finite(logprob)},
                                              {"rank", rank},
                                              {"decoded_token", token_text_(token, false)}});
  };
  add(event.token, event.logprob, event.rank);
  const int top = std::min(*prompt_alternatives_, static_cast<int>(event.top.size()));
  for (int i = 0; i < top; ++i) add(event.top[i].token, event.top[i].logprob, i + 1);
  part.prompt_logprobs.push_back(std::move(entry));
}

std::string Answer::Chunk(size_t index, std::string_view text, std::string_view finish_reason) {
  Part& part = parts_[index];
  const std::string choice =
      Choice(index, Content(std::exchange(part.text, "") + std::string(text)), finish_reason);
  std::string more = StreamedUsage();
  if (api_ == Api::kChat && index == 0) more += TakePromptLogprobs(part);
  return Sse(Envelope(choice, more));
}

std::string Answer::Token(const Event& event, std::string_view text, size_t choice) {
  Part& part = parts_[choice];
  ++completion_tokens_;
  if (alternatives_) AddLogprobs(part, event.token, event.logprob, event.top);
  if (!stream_) {
    part.text += text;
    return "";
  }
  if (text.empty() && part.pending.empty()) return "";  // a character that is not whole yet
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
    part.choice = Choice(choice, Content(part.text + std::string(text)), Name(event.finish_reason));
    return last ? Body() : "";
  }
  std::string out = Chunk(choice, text, Name(event.finish_reason));
  if (!last) return out;
  if (include_usage_) out += Sse(Envelope("", Usage()));
  return out + "data: [DONE]\n\n";
}

std::string Answer::Body() {
  std::string choices;
  for (const Part& one : parts_) choices += (choices.empty() ? "" : ",") + one.choice;
  std::string more;
  if (api_ == Api::kChat) more = TakePromptLogprobs(parts_[0]);
  return Envelope(choices, more + Usage());
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
