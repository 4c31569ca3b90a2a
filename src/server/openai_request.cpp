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
      {"prompt_logprobs", {}},
      {"skip_special_tokens", {true}},
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
      {"echo", {false}},
      {"best_of", {1}},
      {"suffix", {""}},
      {"logprobs", {0}},
      {"add_special_tokens", {true}},
      {"prompt_embeds", {}},
  };
  static const std::vector<Neutral> kChat = {
      {"top_logprobs", {0}},
      {"tools", {kNone}},
      {"tool_choice", {"none", "auto"}},
      {"functions", {kNone}},
      {"function_call", {"none", "auto"}},
      {"chat_template", {}},
      {"continue_final_message", {false}},
      {"add_special_tokens", {false}},
      {"echo", {false}},
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

std::vector<int32_t> TokenIds(const std::string& field, const Json& array) {
  std::vector<int32_t> ids;
  for (const Json& id : array)
    ids.push_back(static_cast<int32_t>(Fields::ToInteger(field, id, 0, kMaxInt)));
  return ids;
}

void ReadPrompt(const Fields& fields, CompletionRequest& request) {
  static constexpr const char* kExpected = "a text or an array of token ids";
  const Json* prompt = fields.Find("prompt");
  if (!prompt) Wrong("prompt", kExpected, nullptr);
  const bool is_list = prompt->is_array() && !prompt->empty() &&
                       (prompt->front().is_string() || prompt->front().is_array());
  if (is_list && prompt->size() > 1)
    Wrong("prompt", "one prompt (several in one request are not supported)", *prompt);
  const Json& one = is_list ? prompt->front() : *prompt;
  if (one.is_string()) {
    request.prompt = one.get<std::string>();
  } else if (one.is_array()) {
    request.prompt = TokenIds("prompt", one);
  } else {
    Wrong("prompt", kExpected, *prompt);
  }
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

void ReadMessages(const Fields& fields, nlohmann::ordered_json& context) {
  const Json* messages = fields.Find("messages");
  if (!messages || !messages->is_array() || messages->empty())
    Wrong("messages", "an array of at least one message", messages ? *messages : Json());
  if (const Json* more = fields.Find("chat_template_kwargs")) {
    if (!more->is_object()) Wrong("chat_template_kwargs", "an object", *more);
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
  bool add_generation_prompt = true;
  fields.Read("add_generation_prompt", add_generation_prompt);
  context["add_generation_prompt"] = add_generation_prompt;
}

// One text, or several.
void ReadStop(const Fields& fields, CompletionRequest& request) {
  constexpr size_t kMost = 16;
  const Json* stop = fields.Find("stop");
  if (!stop) return;
  const Json list = stop->is_array() ? *stop : Json::array({*stop});
  if (list.size() > kMost) Wrong("stop", fmt::format("at most {} texts", kMost), *stop);
  for (const Json& one : list) {
    if (!one.is_string()) Wrong("stop", "a text or an array of texts", *stop);
    if (!one.get<std::string>().empty()) request.stop.push_back(one.get<std::string>());
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
    if (!ids->is_array()) Wrong("stop_token_ids", "an array of token ids", *ids);
    sampling.stop_token_ids = TokenIds("stop_token_ids", *ids);
  }
  if (const auto most = fields.Integer("max_tokens", 1, kMaxInt))
    request.max_tokens = static_cast<int>(*most);
}

}  // namespace

SamplingParams SamplingDefaults(const std::string& model_folder) {
  SamplingParams sampling;
  const std::filesystem::path file = std::filesystem::path(model_folder) / "generation_config.json";
  std::error_code ignored;
  if (!std::filesystem::exists(file, ignored)) return sampling;
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
  if (fields.Find("messages")) {
    nlohmann::ordered_json context;
    ReadMessages(fields, context);
    request.text = std::move(context);
    return request;
  }
  const Json* prompt = fields.Find("prompt");
  if (!prompt || !prompt->is_string()) Wrong("prompt", "a text", prompt ? *prompt : Json());
  request.text = prompt->get<std::string>();
  fields.Read("add_special_tokens", request.add_special_tokens);
  return request;
}

std::vector<int32_t> ParseDetokenize(std::string_view body) {
  const Json json = ParseJson(body, "the request's body", {.max_bytes = kMaxBodyBytes});
  if (!json.is_object()) Wrong("the request's body", "an object", json);
  const Json* tokens = Fields(json).Find("tokens");
  if (!tokens || !tokens->is_array())
    Wrong("tokens", "an array of token ids", tokens ? *tokens : Json());
  return TokenIds("tokens", *tokens);
}

CompletionRequest ParseRequest(Api api, std::string_view body, const SamplingParams& defaults) {
  const Json json = ParseJson(body, "the request's body", {.max_bytes = kMaxBodyBytes});
  if (!json.is_object()) Wrong("the request's body", "an object", json);
  const Fields fields(json);
  CompletionRequest request{.api = api, .sampling = defaults};
  if (const Json* model = fields.Find("model")) {
    if (!model->is_string()) Wrong("model", "a text", *model);
    request.model = model->get<std::string>();
  }
  ReadSampling(fields, request);
  constexpr int64_t kMostChoices = 128;
  if (const auto n = fields.Integer("n", 1, kMostChoices)) request.n = static_cast<int>(*n);
  fields.Read("stream", request.stream);
  if (const Json* options = fields.Find("stream_options")) {
    if (!options->is_object()) Wrong("stream_options", "an object", *options);
    if (!request.stream) Wrong("stream_options", "none without stream: true", *options);
    const Fields stream_fields(*options, "stream_options.");
    stream_fields.Read("include_usage", request.include_usage);
    bool continuous = false;
    stream_fields.Read("continuous_usage_stats", continuous);
    if (continuous) {
      throw Error(ErrorCode::kInvalidArgument,
                  "stream_options.continuous_usage_stats: not supported beyond false");
    }
  }
  if (api == Api::kChat) {
    fields.Read("logprobs", request.logprobs);
    if (const auto most = fields.Integer("max_completion_tokens", 1, kMaxInt))
      request.max_tokens = static_cast<int>(*most);
    RefuseUnsupported(api, fields);
    ReadMessages(fields, request.chat);
  } else {
    request.logprobs = fields.Integer("logprobs", 0, kMaxInt).has_value();
    RefuseUnsupported(api, fields);
    ReadPrompt(fields, request);
  }
  return request;
}

}  // namespace octavo::openai
