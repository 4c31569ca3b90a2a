// OpenAI's completions API, with vLLM's extensions, as text in and text out: JSON to engine
// requests, engine events to JSON and server-sent events. No sockets, no threads, no clock.
//
// Every complaint is an octavo::Error whose message begins with the field ("top_p: expected ...");
// ErrorBody turns it into OpenAI's error object. A field that nobody knows is ignored; one that is
// known but not supported is refused by name unless its value leaves the answer as it is (best_of:
// 1).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "octavo/engine.h"

namespace octavo::openai {

enum class Api { kCompletions, kChat };

struct CompletionRequest {
  Api api = Api::kCompletions;
  std::string model;                                       // empty: not named
  std::variant<std::string, std::vector<int32_t>> prompt;  // kCompletions
  nlohmann::ordered_json chat;                             // kChat: what the chat template is given
  SamplingParams sampling;                                 // max_tokens as in the field below
  std::optional<int> max_tokens;
  int n = 1;  // answers
  bool stream = false;
  bool include_usage = false;
  bool logprobs = false;  // of the chosen tokens
  std::vector<std::string> stop;
  bool include_stop_str_in_output = false;
};

// `defaults`: of the sampling fields that the body does not have.
CompletionRequest ParseRequest(Api api, std::string_view body, const SamplingParams& defaults = {});

// What a model's generation_config.json says of temperature, top_p, top_k, min_p and
// repetition_penalty; OpenAI's defaults for what it does not, or if it is not there.
SamplingParams SamplingDefaults(const std::string& model_folder);

// POST /tokenize: {"prompt": text, "add_special_tokens": true} or {"messages": [...]}. /detokenize:
// {"tokens": [ids]}.
struct TokenizeRequest {
  std::variant<std::string, nlohmann::ordered_json> text;  // or what the chat template is given
  bool add_special_tokens = true;
};
TokenizeRequest ParseTokenize(std::string_view body);
std::vector<int32_t> ParseDetokenize(std::string_view body);
std::string TokenizeBody(std::span<const int32_t> tokens, int64_t max_model_len);
std::string DetokenizeBody(std::string_view text);

// An answer in the making, of request.n choices. Begin, then, of each choice, Token for every
// kToken event and Finish, each returning what is to be sent now. Streaming: server-sent events;
// otherwise nothing until the last Finish, which returns the body.
class Answer {
 public:
  Answer(const CompletionRequest& request, std::string id, std::string model, int64_t created,
         int64_t prompt_tokens);

  std::string Begin() const;
  // `text`: what TextStream made of the token; `token_text`: the token alone, for logprobs.
  std::string Token(const Event& event, std::string_view text, std::string_view token_text,
                    size_t choice = 0);
  // `text`: the rest of it. A request that failed: only when streaming.
  std::string Finish(const Event& event, std::string_view text, size_t choice = 0);

 private:
  nlohmann::json Envelope(nlohmann::json choices) const;
  nlohmann::json Choice(size_t index, std::string_view text, nlohmann::json finish_reason,
                        bool is_first) const;
  nlohmann::json TakeLogprobs(size_t choice);
  nlohmann::json Usage() const;

  Api api_;
  bool stream_, include_usage_, logprobs_;
  std::string id_, model_;
  int64_t created_;
  int64_t prompt_tokens_;
  int64_t completion_tokens_ = 0, cached_tokens_ = 0;
  struct TokenLogprob {
    std::string text;
    float logprob;
    int64_t offset;  // in characters of the answer
  };
  struct Part {        // of one choice
    std::string text;  // not streaming: all of it
    std::vector<TokenLogprob> pending;
    int64_t characters = 0;
    nlohmann::json choice;  // not streaming: once it is finished
  };
  std::vector<Part> parts_;
  size_t finished_ = 0;  // parts
};

struct ModelCard {
  std::string name;
  std::string folder;
  int64_t created = 0;  // Unix time
  int64_t max_model_len = 0;
  std::vector<std::string> cache_policy;  // the engine's start-up report
};
std::string ModelsBody(const ModelCard& card);

// OpenAI's error object; `param` is the field that `message` begins with, if it does.
std::string ErrorBody(int http_status, std::string_view message);
// 400, 404, 501: what an Error means to the one who asked. Too long a prompt is his to mend, too.
int HttpStatus(ErrorCode code);

}  // namespace octavo::openai
