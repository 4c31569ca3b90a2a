// OpenAI's completions API, with vLLM's extensions, as text in and text out: JSON to engine
// requests, engine events to JSON and server-sent events. No sockets, no threads, no clock.
//
// Every complaint is an octavo::Error whose message begins with the field ("top_p: expected ...");
// ErrorBody turns it into OpenAI's error object. A field that nobody knows is ignored; one that is
// known but not supported is refused by name unless its value leaves the answer as it is (best_of:
// 1).
#pragma once

#include <cstdint>
#include <functional>
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

// Messages on their way to be a prompt.
struct Conversation {
  nlohmann::ordered_json context;       // what the chat template is given
  std::string chat_template;            // instead of the model's; empty: that
  bool continue_final_message = false;  // the answer goes on where the last message ends
};
// What a template made of a conversation whose last message is to go on, up to that message's end.
// Throws Error if the template has left it out.
std::string UpToFinalMessage(std::string rendered, const Conversation& conversation);

struct CompletionRequest {
  Api api = Api::kCompletions;
  std::string model;                                                     // empty: not named
  std::vector<std::variant<std::string, std::vector<int32_t>>> prompts;  // kCompletions
  Conversation chat;                                                     // kChat
  bool add_special_tokens = true;
  std::string role = "assistant";  // kChat: whose the answer is
  SamplingParams sampling;  // max_tokens as in the field below; with all that is to be reported
  std::optional<int> max_tokens;
  const char* max_tokens_field = "max_tokens";  // which of its names the request used
  int n = 1;                                    // answers to each prompt
  bool stream = false;
  bool include_usage = false, continuous_usage = false;
  std::optional<int> logprobs;         // of the chosen tokens, and of so many alternatives
  std::optional<int> prompt_logprobs;  // of the prompt's tokens, and of so many alternatives
  bool echo = false;  // the prompt begins the answer; kChat: the last message, if of the same role
  bool skip_special_tokens = true;
  std::vector<std::string> stop;
  bool include_stop_str_in_output = false;
};

// `defaults`: of the sampling fields that the body does not have.
CompletionRequest ParseRequest(Api api, std::string_view body, const SamplingParams& defaults = {});

// What a generation_config.json says of temperature, top_p, top_k, min_p and repetition_penalty;
// OpenAI's defaults for what it does not. `generation_config`: the folder that has it; "auto": the
// model's, if it is there; "vllm": none.
SamplingParams SamplingDefaults(const std::string& generation_config,
                                const std::string& model_folder);

// POST /tokenize: {"prompt": text, "add_special_tokens": true} or {"messages": [...]}. /detokenize:
// {"tokens": [ids]}.
struct TokenizeRequest {
  std::string model;
  std::variant<std::string, Conversation> text;
  bool add_special_tokens = true;
};
TokenizeRequest ParseTokenize(std::string_view body);
struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
};
// `vocab`: ids are below it.
DetokenizeRequest ParseDetokenize(std::string_view body, int64_t vocab);
std::string TokenizeBody(std::span<const int32_t> tokens, int64_t max_model_len);
std::string DetokenizeBody(std::string_view text);

// Refuses a max_tokens that was asked for and that a prompt leaves no room for. One that leaves no
// room at all is for the engine to refuse.
void CheckRoom(const CompletionRequest& request, int64_t prompt_tokens, int64_t max_model_len);
// kChat, with echo: what begins the answer.
std::string EchoOf(const CompletionRequest& request);
// What the engine says of a prompt, said of the field that a request of `api` has instead.
Error AboutField(Api api, const Error& error);

struct EncodedPrompt {
  std::vector<int32_t> tokens;
  std::string text;  // where it is echoed
};

// An answer in the making, of request.n choices for each prompt, those of one prompt side by side.
// Begin, then, of each choice, PromptToken for every kPromptLogprob event, Token for every kToken
// event and Finish, each returning what is to be sent now. Streaming: server-sent events; otherwise
// nothing until the last Finish, which returns the body. What is asked of the prompt is part of
// the first event that has something of the choice.
class Answer {
 public:
  using TokenText = std::function<std::string(std::span<const int32_t> tokens, bool skip_special)>;
  // `token_text`: of tokens alone; `skip_special`: as part of a text that leaves special ones out.
  Answer(const CompletionRequest& request, std::string id, std::string model, int64_t created,
         std::span<const EncodedPrompt> prompts, TokenText token_text);

  std::string Begin() const;
  void PromptToken(const Event& event, size_t choice = 0);
  // `text`: what TextStream made of the token.
  std::string Token(const Event& event, std::string_view text, size_t choice = 0);
  // `text`: the rest of it. A request that failed: only when streaming.
  std::string Finish(const Event& event, std::string_view text, size_t choice = 0);

 private:
  // Tokens since the last whole character.
  using Unfinished = std::vector<int32_t>;
  struct Logprobs {      // the insides of JSON arrays, which grow with every token
    std::string tokens;  // kChat: all there is of each
    std::string logprobs, top, offsets;
  };
  struct Part {         // of one choice
    std::string text;   // not sent yet
    Logprobs logprobs;  // not sent yet
    int64_t characters = 0;
    Unfinished unfinished, unfinished_prompt;
    std::string prompt_logprobs;  // the inside of an array; empty: not asked for, or sent
    int64_t cached_tokens = 0;
    const char* finish_reason = nullptr;  // not streaming: as JSON
  };

  // All of these are parts of JSON texts. An event for every token is put together from pieces,
  // since a document would cost more than all else that is done for it; and what is to be said of a
  // long prompt's tokens grows with them, lest its end should keep the thread from all others.
  std::string Envelope(std::string_view choices, std::string_view more) const;
  std::string Content(std::string_view text) const;  // a choice's field that has the text
  // With all that is not sent yet of it.
  void AppendChoice(std::string& out, size_t index, std::string_view content,
                    std::string_view finish_reason);
  std::string Chunk(size_t index, std::string_view text, std::string_view finish_reason);
  // A token's text after those, which is all of a character that it ends; none while it is
  // unfinished. So it is in vLLM.
  std::optional<std::string> TextAfter(const Unfinished& unfinished, int32_t token) const;
  // Characters of the text that are whole with this token.
  int64_t Advance(Unfinished& unfinished, int32_t token) const;
  // `logprob`: none for the first token of a prompt.
  void AddLogprobs(Part& part, int32_t token, std::optional<float> logprob,
                   std::span<const TokenLogprob> top);
  void AppendLogprobs(std::string& out, Part& part) const;
  static void AppendPromptLogprobs(std::string& out, Part& part);  // a field, or nothing
  std::string Usage() const;                                       // a field
  std::string StreamedUsage() const;  // of every event; a field, or nothing
  std::string Body();

  Api api_;
  bool stream_, include_usage_, continuous_usage_, echo_logprobs_;
  std::optional<int> alternatives_, prompt_alternatives_;
  int choices_per_prompt_;
  std::string head_;  // the envelope up to its choices
  std::string role_;  // as JSON
  bool skip_special_tokens_;
  TokenText token_text_;
  int64_t prompt_tokens_ = 0, completion_tokens_ = 0;
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
