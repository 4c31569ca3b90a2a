// Engine events to response bodies and server-sent events: see openai.h.
#include <algorithm>
#include <utility>

#include "base/error.h"
#include "io/json.h"
#include "server/openai.h"

namespace octavo::openai {
namespace {

// What is not UTF-8 becomes U+FFFD rather than an exception.
std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string Sse(const Json& json) { return "data: " + Dump(json) + "\n\n"; }

const char* Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "abort";
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

Json Error500(std::string_view message) { return Json::parse(ErrorBody(500, message)); }

}  // namespace

Answer::Answer(const CompletionRequest& request, std::string id, std::string model, int64_t created,
               int64_t prompt_tokens)
    : api_(request.api),
      stream_(request.stream),
      include_usage_(request.include_usage),
      logprobs_(request.logprobs),
      id_(std::move(id)),
      model_(std::move(model)),
      created_(created),
      prompt_tokens_(prompt_tokens),
      parts_(request.n) {}

Json Answer::Envelope(Json choices) const {
  const char* object = api_ == Api::kCompletions ? "text_completion"
                       : stream_                 ? "chat.completion.chunk"
                                                 : "chat.completion";
  Json json = {{"id", id_},
               {"object", object},
               {"created", created_},
               {"model", model_},
               {"choices", std::move(choices)}};
  if (stream_ && include_usage_) json["usage"] = nullptr;
  return json;
}

Json Answer::Choice(size_t index, std::string_view text, Json finish_reason, bool is_first) const {
  Json choice = {
      {"index", index}, {"logprobs", nullptr}, {"finish_reason", std::move(finish_reason)}};
  if (api_ == Api::kCompletions) {
    choice["text"] = text;
  } else if (!stream_) {
    choice["message"] = {{"role", "assistant"}, {"content", text}};
  } else {
    choice["delta"] = Json::object();
    if (is_first) choice["delta"]["role"] = "assistant";
    if (is_first || !text.empty()) choice["delta"]["content"] = text;
  }
  return choice;
}

Json Answer::TakeLogprobs(size_t choice) {
  if (!logprobs_) return nullptr;
  std::vector<TokenLogprob> pending = std::exchange(parts_[choice].pending, {});
  Json result;
  if (api_ == Api::kChat) {
    result = {{"content", Json::array()}};
    for (const TokenLogprob& token : pending) {
      result["content"].push_back({{"token", token.text},
                                   {"logprob", token.logprob},
                                   {"bytes", nullptr},
                                   {"top_logprobs", Json::array()}});
    }
  } else {
    result = {{"tokens", Json::array()},
              {"token_logprobs", Json::array()},
              {"top_logprobs", nullptr},
              {"text_offset", Json::array()}};
    for (const TokenLogprob& token : pending) {
      result["tokens"].push_back(token.text);
      result["token_logprobs"].push_back(token.logprob);
      result["text_offset"].push_back(token.offset);
    }
  }
  return result;
}

Json Answer::Usage() const {
  return {{"prompt_tokens", prompt_tokens_},
          {"completion_tokens", completion_tokens_},
          {"total_tokens", prompt_tokens_ + completion_tokens_},
          {"prompt_tokens_details", {{"cached_tokens", cached_tokens_}}}};
}

std::string Answer::Begin() const {
  if (!stream_ || api_ != Api::kChat) return "";
  std::string out;
  for (size_t i = 0; i < parts_.size(); ++i)
    out += Sse(Envelope(Json::array({Choice(i, "", nullptr, /*is_first=*/true)})));
  return out;
}

std::string Answer::Token(const Event& event, std::string_view text, std::string_view token_text,
                          size_t choice) {
  Part& part = parts_[choice];
  ++completion_tokens_;
  if (logprobs_) {
    constexpr float kLeast = -9999;  // JSON has no infinity; vLLM's choice
    part.pending.push_back(
        {std::string(token_text), std::max(event.logprob, kLeast), part.characters});
    part.characters += Characters(token_text);
  }
  if (!stream_) {
    part.text += text;
    return "";
  }
  if (text.empty() && part.pending.empty()) return "";  // a character that is not whole yet
  Json json = Choice(choice, text, nullptr, /*is_first=*/false);
  json["logprobs"] = TakeLogprobs(choice);
  return Sse(Envelope(Json::array({std::move(json)})));
}

std::string Answer::Finish(const Event& event, std::string_view text, size_t choice) {
  Part& part = parts_[choice];
  const bool last = ++finished_ == parts_.size();
  cached_tokens_ = std::max(cached_tokens_, event.cached_tokens);
  if (event.finish_reason == FinishReason::kError) {
    OCTAVO_CHECK(stream_);  // otherwise the status says it
    return Sse(Error500(event.error)) + (last ? "data: [DONE]\n\n" : "");
  }
  if (!stream_) {
    part.choice = Choice(choice, part.text + std::string(text), Name(event.finish_reason), false);
    part.choice["logprobs"] = TakeLogprobs(choice);
    if (!last) return "";
    Json choices = Json::array();
    for (Part& one : parts_) choices.push_back(std::move(one.choice));
    Json body = Envelope(std::move(choices));
    body["usage"] = Usage();
    return Dump(body);
  }
  std::string out = Sse(
      Envelope(Json::array({Choice(choice, text, Name(event.finish_reason), /*is_first=*/false)})));
  if (!last) return out;
  if (include_usage_) {
    Json usage = Envelope(Json::array());
    usage["usage"] = Usage();
    out += Sse(usage);
  }
  return out + "data: [DONE]\n\n";
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
