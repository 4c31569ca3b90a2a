// Request bodies to CompletionRequest: see openai.h.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <vector>

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "server/openai.h"

namespace octavo::openai {
namespace {

constexpr size_t kMaxBodyBytes = 8 << 20;

[[noreturn]] void Wrong(std::string_view field, std::string_view expected, const Json& found) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected {}, found {}", field, expected, Describe(found)));
}

// The fields of one object; null counts as absent, as it does for OpenAI.
class Fields {
 public:
  explicit Fields(const Json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  const Json* Find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  std::string Name(const char* name) const { return prefix_ + name; }

  void Read(const char* name, bool& out) const {
    if (const Json* value = Find(name)) {
      if (!value->is_boolean()) Wrong(Name(name), "true or false", *value);
      out = value->get<bool>();
    }
  }

  void Read(const char* name, std::string& out) const {
    if (const Json* value = Find(name)) {
      if (!value->is_string()) Wrong(Name(name), "a text", *value);
      out = value->get<std::string>();
    }
  }

  void Read(const char* name, float& out) const {
    if (const Json* value = Find(name)) {
      const double number = value->is_number() ? value->get<double>() : INFINITY;
      if (!(std::abs(number) <= std::numeric_limits<float>::max()))
        Wrong(Name(name), "a number", *value);
      out = static_cast<float>(number);
    }
  }

  std::optional<int64_t> Integer(const char* name, int64_t least, int64_t most) const {
    const Json* value = Find(name);
    return value ? std::optional(ToInteger(Name(name), *value, least, most)) : std::nullopt;
  }

  static int64_t ToInteger(std::string_view name, const Json& value, int64_t least, int64_t most) {
    const bool fits =
        value.is_number_integer() &&
        !(value.is_number_unsigned() &&
          value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
    const int64_t number = fits ? value.get<int64_t>() : 0;
    if (!fits || number < least || number > most)
      Wrong(name, fmt::format("a whole number from {} to {}", least, most), value);
    return number;
  }

 private:
  const Json& object_;
  std::string prefix_;
};

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// Known, not supported: only values that leave the answer as it would be without the field.
struct Neutral {
  const char* field;
  std::vector<Json> values;
};

void RefuseUnsupported(Api api, const Fields& fields) {
  static const Json kNone = Json::array();
  static const std::vector<Neutral> kBoth = {
      {"truncate_prompt_tokens", {}},
      {"allowed_token_ids", {}},
      {"bad_words", {kNone}},
      {"use_beam_search", {false}},
      {"response_format", {Json::object({{"type", "text"}})}},
      {"structured_outputs", {}},
      {"guided_json", {}},
      {"guided_regex", {}},
      {"guided_choice", {}},
      {"guided_grammar", {}},
      {"return_token_ids", {false}},
      {"return_tokens_as_token_ids", {false}},
      {"cache_salt", {}},
  };
  static const std::vector<Neutral> kCompletions = {
      {"best_of", {1}},
      {"suffix", {""}},
      {"prompt_embeds", {}},
  };
  static const std::vector<Neutral> kChat = {
      {"tools", {kNone}},
      {"tool_choice", {"none", "auto"}},
      {"functions", {kNone}},
      {"function_call", {"none", "auto"}},
      {"documents", {kNone}},
      {"reasoning_effort", {}},
      {"modalities", {Json::array({"text"})}},
      {"audio", {}},
  };
  for (const auto* list : {&kBoth, api == Api::kChat ? &kChat : &kCompletions}) {
    for (const Neutral& neutral : *list) {
      const Json* value = fields.Find(neutral.field);
      if (!value) continue;
      if (std::find(neutral.values.begin(), neutral.values.end(), *value) != neutral.values.end())
        continue;
      std::string allowed;
      for (const Json& one : neutral.values)
        allowed += (allowed.empty() ? "" : " or ") + one.dump();
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: not supported{}, found {}", neutral.field,
                              allowed.empty() ? "" : " beyond " + allowed, Describe(*value)));
    }
  }
}

std::vector<int32_t> TokenIds(const std::string& field, const Json& array, int64_t most = kMaxInt) {
  std::vector<int32_t> ids;
  for (const Json& id : array)
    ids.push_back(static_cast<int32_t>(Fields::ToInteger(field, id, 0, most)));
  return ids;
}

// One, or several.
void ReadPrompts(const Fields& fields, CompletionRequest& request) {
  const auto add = [&](const std::string& field, const Json& prompt) {
    if (prompt.is_string()) {
      request.prompts.emplace_back(prompt.get<std::string>());
    } else if (prompt.is_array()) {
      request.prompts.emplace_back(TokenIds(field, prompt));
    } else {
      Wrong(field, "a text or an array of token ids", prompt);
    }
  };
  const Json* found = fields.Find("prompt");
  const Json prompt = found ? *found : Json();
  if (prompt.is_array() && !prompt.empty() &&
      (prompt.front().is_string() || prompt.front().is_array())) {
    constexpr size_t kMostAnswers = 1024;
    if (prompt.size() * request.n > kMostAnswers)
      Wrong("prompt", fmt::format("at most {} prompts times n", kMostAnswers), prompt);
    for (size_t i = 0; i < prompt.size(); ++i) add(fmt::format("prompt[{}]", i), prompt[i]);
  } else {
    add("prompt", prompt);
  }
}

// What is to be reported of tokens: see the fields of CompletionRequest and SamplingParams.
void ReadLogprobs(const Fields& fields, CompletionRequest& request) {
  constexpr int64_t kMost = 20;  // as OpenAI's, and vLLM's unless it is told otherwise
  const auto count = [&](const char* field) -> std::optional<int> {
    const auto n = fields.Integer(field, 0, kMost);
    return n ? std::optional(static_cast<int>(*n)) : std::nullopt;
  };
  SamplingParams& sampling = request.sampling;
  request.prompt_logprobs = sampling.top_prompt_logprobs = count("prompt_logprobs");
  if (request.api == Api::kChat) {
    bool logprobs = false;
    fields.Read("logprobs", logprobs);
    const std::optional<int> top = count("top_logprobs");
    if (top.value_or(0) > 0 && !logprobs)
      Wrong("top_logprobs", "none without logprobs: true", *fields.Find("top_logprobs"));
    if (logprobs) request.logprobs = top.value_or(0);
  } else {
    request.logprobs = count("logprobs");
    fields.Read("echo", request.echo);
  }
  if (request.logprobs.value_or(0) > 0) sampling.top_logprobs = request.logprobs;
  if (request.echo && request.logprobs) {
    sampling.prompt_logprobs_from = 1;
    sampling.top_prompt_logprobs = std::max(request.prompt_logprobs, sampling.top_logprobs);
  }
  if (request.prompt_logprobs) sampling.prompt_logprobs_from = 1;
}

// A text, or parts of type text, which are joined by newlines.
std::string Content(const std::string& field, const Json& content) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) Wrong(field, "a text or an array of parts", content);
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const std::string at = fmt::format("{}[{}]", field, i);
    const Json& part = content[i];
    if (!part.is_object()) Wrong(at, "an object", part);
    if (part.value("type", Json()) != "text")
      Wrong(at + ".type", "'text' (the only part that is supported)", part.value("type", Json()));
    const Json words = part.value("text", Json());
    if (!words.is_string()) Wrong(at + ".text", "a text", words);
    text += (i ? "\n" : "") + words.get<std::string>();
  }
  return text;
}

Conversation ReadConversation(const Fields& fields) {
  Conversation conversation;
  nlohmann::ordered_json& context = conversation.context;
  const Json* messages = fields.Find("messages");
  if (!messages || !messages->is_array() || messages->empty())
    Wrong("messages", "an array of at least one message", messages ? *messages : Json());
  if (const Json* more = fields.Find("chat_template_kwargs")) {
    constexpr size_t kMost = 256;
    if (!more->is_object()) Wrong("chat_template_kwargs", "an object", *more);
    if (more->size() > kMost)
      Wrong("chat_template_kwargs", fmt::format("at most {} fields", kMost), more->size());
    context = *more;
  }
  auto out = nlohmann::ordered_json::array();
  for (size_t i = 0; i < messages->size(); ++i) {
    const std::string at = fmt::format("messages[{}]", i);
    const Json& message = (*messages)[i];
    if (!message.is_object()) Wrong(at, "an object", message);
    const Json role = message.value("role", Json()), content = message.value("content", Json());
    if (!role.is_string()) Wrong(at + ".role", "a text", role);
    nlohmann::ordered_json copy = message;
    if (!(content.is_null() && role == "assistant"))
      copy["content"] = Content(at + ".content", content);
    out.push_back(std::move(copy));
  }
  context["messages"] = std::move(out);
  bool& go_on = conversation.continue_final_message;
  fields.Read("continue_final_message", go_on);
  bool add_generation_prompt = !go_on;
  fields.Read("add_generation_prompt", add_generation_prompt);
  if (go_on && add_generation_prompt)
    Wrong("continue_final_message", "false with add_generation_prompt: true", true);
  if (go_on && !context["messages"].back().value("content", Json()).is_string())
    Wrong("continue_final_message", "a last message with content", true);
  context["add_generation_prompt"] = add_generation_prompt;
  fields.Read("chat_template", conversation.chat_template);
  return conversation;
}

// One text, or several.
void ReadStop(const Fields& fields, CompletionRequest& request) {
  constexpr size_t kMost = 16, kMostBytes = 4096;
  const Json* stop = fields.Find("stop");
  if (!stop) return;
  const Json list = stop->is_array() ? *stop : Json::array({*stop});
  if (list.size() > kMost) Wrong("stop", fmt::format("at most {} texts", kMost), *stop);
  for (const Json& one : list) {
    if (!one.is_string()) Wrong("stop", "a text or an array of texts", *stop);
    const auto& text = one.get_ref<const std::string&>();
    if (text.size() > kMostBytes)
      Wrong("stop", fmt::format("texts of at most {} bytes", kMostBytes), text.size());
    if (text.empty()) Wrong("stop", "texts that are not empty", *stop);
    request.stop.push_back(text);
  }
}

void ReadLogitBias(const Fields& fields, SamplingParams& sampling) {
  const Json* biases = fields.Find("logit_bias");
  if (!biases) return;
  if (!biases->is_object()) Wrong("logit_bias", "an object of token ids and numbers", *biases);
  for (const auto& [key, value] : biases->items()) {
    int32_t id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0)
      Wrong("logit_bias", "token ids as keys", key);
    if (!value.is_number()) Wrong("logit_bias", "numbers", value);
    sampling.logit_bias[id] = value.get<float>();
  }
}

// None at all is of use to those who ask for the prompt.
void ReadMaxTokens(const char* name, const Fields& fields, CompletionRequest& request) {
  const int64_t least = request.echo || request.prompt_logprobs ? 0 : 1;
  if (const auto most = fields.Integer(name, least, kMaxInt)) {
    request.max_tokens = static_cast<int>(*most);
    request.max_tokens_field = name;
  }
}

void ReadSampling(const Fields& fields, CompletionRequest& request) {
  SamplingParams& sampling = request.sampling;
  fields.Read("presence_penalty", sampling.presence_penalty);
  fields.Read("frequency_penalty", sampling.frequency_penalty);
  if (const auto least = fields.Integer("min_tokens", 0, kMaxInt))
    sampling.min_tokens = static_cast<int>(*least);
  ReadLogitBias(fields, sampling);
  ReadStop(fields, request);
  fields.Read("include_stop_str_in_output", request.include_stop_str_in_output);
  fields.Read("temperature", sampling.temperature);
  fields.Read("top_p", sampling.top_p);
  fields.Read("min_p", sampling.min_p);
  fields.Read("repetition_penalty", sampling.repetition_penalty);
  fields.Read("ignore_eos", sampling.ignore_eos);
  if (const auto top_k = fields.Integer("top_k", -1, kMaxInt))
    sampling.top_k = static_cast<int>(*top_k);
  if (const auto seed = fields.Integer("seed", std::numeric_limits<int64_t>::min(),
                                       std::numeric_limits<int64_t>::max()))
    sampling.seed = static_cast<uint64_t>(*seed);
  if (const Json* ids = fields.Find("stop_token_ids")) {
    constexpr size_t kMost = 1024;
    if (!ids->is_array() || ids->size() > kMost)
      Wrong("stop_token_ids", fmt::format("an array of at most {} token ids", kMost), *ids);
    sampling.stop_token_ids = TokenIds("stop_token_ids", *ids);
  }
  ReadMaxTokens("max_tokens", fields, request);
}

}  // namespace

std::string UpToFinalMessage(std::string rendered, const Conversation& conversation) {
  constexpr const char* kSpace = " \t\r\n";
  const auto& last = conversation.context.at("messages").back();
  const std::string content = last.at("content").get<std::string>();
  const size_t begin = content.find_first_not_of(kSpace);
  if (begin == content.npos)
    throw Error(ErrorCode::kInvalidArgument, "continue_final_message: the last message is empty");
  // Templates may trim it, at either end.
  const size_t end = content.find_last_not_of(kSpace) + 1;
  const size_t at = rendered.rfind(content.substr(begin, end - begin));
  if (at == rendered.npos) {
    throw Error(ErrorCode::kInvalidArgument,
                "continue_final_message: the chat template does not write the last message");
  }
  const bool trimmed = rendered.compare(at, content.size() - begin, content, begin) != 0;
  rendered.resize(at + (trimmed ? end - begin : content.size() - begin));
  return rendered;
}

SamplingParams SamplingDefaults(const std::string& generation_config,
                                const std::string& model_folder) {
  SamplingParams sampling;
  if (generation_config == "vllm") return sampling;
  const bool is_auto = generation_config == "auto";
  const std::filesystem::path folder = is_auto ? model_folder : generation_config;
  const std::filesystem::path file = folder / "generation_config.json";
  if (is_auto && !IsThere(file)) return sampling;
  const Json json = ReadJsonFile(file);
  const Fields fields(json, file.string() + ": ");
  fields.Read("temperature", sampling.temperature);
  fields.Read("top_p", sampling.top_p);
  fields.Read("min_p", sampling.min_p);
  fields.Read("repetition_penalty", sampling.repetition_penalty);
  if (const auto top_k = fields.Integer("top_k", -1, kMaxInt))
    sampling.top_k = static_cast<int>(*top_k);
  return sampling;
}

TokenizeRequest ParseTokenize(std::string_view body) {
  const Json json = ParseJson(body, "the request's body", {.max_bytes = kMaxBodyBytes});
  if (!json.is_object()) Wrong("the request's body", "an object", json);
  const Fields fields(json);
  TokenizeRequest request;
  fields.Read("model", request.model);
  request.add_special_tokens = !fields.Find("messages");  // a chat template writes them
  fields.Read("add_special_tokens", request.add_special_tokens);
  if (fields.Find("messages")) {
    request.text = ReadConversation(fields);
    return request;
  }
  const Json* prompt = fields.Find("prompt");
  if (!prompt || !prompt->is_string()) Wrong("prompt", "a text", prompt ? *prompt : Json());
  request.text = prompt->get<std::string>();
  return request;
}

DetokenizeRequest ParseDetokenize(std::string_view body, int64_t vocab) {
  const Json json = ParseJson(body, "the request's body", {.max_bytes = kMaxBodyBytes});
  if (!json.is_object()) Wrong("the request's body", "an object", json);
  const Fields fields(json);
  DetokenizeRequest request;
  fields.Read("model", request.model);
  const Json* tokens = fields.Find("tokens");
  if (!tokens || !tokens->is_array())
    Wrong("tokens", "an array of token ids", tokens ? *tokens : Json());
  request.tokens = TokenIds("tokens", *tokens, vocab - 1);
  return request;
}

void CheckRoom(const CompletionRequest& request, int64_t prompt_tokens, int64_t max_model_len) {
  const int64_t room = max_model_len - prompt_tokens;
  if (room > 0 && request.max_tokens.value_or(0) > room) {
    Wrong(request.max_tokens_field,
          fmt::format("at most the {} that a prompt of {} tokens leaves of max_model_len, {}", room,
                      prompt_tokens, max_model_len),
          *request.max_tokens);
  }
}

std::string EchoOf(const CompletionRequest& request) {
  const auto& last = request.chat.context.at("messages").back();
  const auto content = last.value("content", nlohmann::ordered_json());
  const bool is_same = content.is_string() && last.at("role") == request.role;
  return is_same ? content.get<std::string>() : "";
}

Error AboutField(Api api, const Error& error) {
  constexpr std::string_view kPrompt = "prompt: ";
  if (api != Api::kChat || !error.message().starts_with(kPrompt)) return error;
  return Error(error.code(), "messages: " + error.message().substr(kPrompt.size()));
}

CompletionRequest ParseRequest(Api api, std::string_view body, const SamplingParams& defaults) {
  const Json json = ParseJson(body, "the request's body", {.max_bytes = kMaxBodyBytes});
  if (!json.is_object()) Wrong("the request's body", "an object", json);
  const Fields fields(json);
  CompletionRequest request{.api = api, .sampling = defaults};
  fields.Read("model", request.model);
  std::string user;
  fields.Read("user", user);  // for logs, which there are none of
  ReadLogprobs(fields, request);
  ReadSampling(fields, request);
  constexpr int64_t kMostChoices = 128;
  if (const auto n = fields.Integer("n", 1, kMostChoices)) request.n = static_cast<int>(*n);
  fields.Read("stream", request.stream);
  if (const Json* options = fields.Find("stream_options")) {
    if (!options->is_object()) Wrong("stream_options", "an object", *options);
    if (!request.stream) Wrong("stream_options", "none without stream: true", *options);
    const Fields stream_fields(*options, "stream_options.");
    stream_fields.Read("include_usage", request.include_usage);
    stream_fields.Read("continuous_usage_stats", request.continuous_usage);
  }
  request.add_special_tokens = api == Api::kCompletions;  // a chat template writes them
  fields.Read("add_special_tokens", request.add_special_tokens);
  fields.Read("skip_special_tokens", request.skip_special_tokens);
  if (api == Api::kChat) {
    ReadMaxTokens("max_completion_tokens", fields, request);
    RefuseUnsupported(api, fields);
    fields.Read("echo", request.echo);
    request.chat = ReadConversation(fields);
    const auto& context = request.chat.context;
    if (!context["add_generation_prompt"]) request.role = context["messages"].back()["role"];
  } else {
    RefuseUnsupported(api, fields);
    ReadPrompts(fields, request);
  }
  return request;
}

}  // namespace octavo::openai
