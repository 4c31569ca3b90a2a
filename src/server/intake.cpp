#include "server/intake.h"

#include <algorithm>
#include <ctime>
#include <utility>

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"

namespace octavo {

Intake::Intake(const Engine& engine, const ServerOptions& options)
    : engine_(engine),
      model_name_(options.model_name),
      trust_request_chat_template_(options.trust_request_chat_template),
      sampling_defaults_(
          openai::SamplingDefaults(options.generation_config, options.model_folder)) {
  try {
    chat_template_ = ChatTemplate::FromFolder(options.tokenizer_folder, options.chat_template);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound || !options.chat_template.empty()) throw;
    no_chat_template_ = error.message();
  }
}

std::vector<int32_t> Intake::EncodeChat(const openai::Conversation& chat, bool add_special_tokens,
                                        const std::atomic<bool>& abandoned) const {
  // What a template of a request may take: some tenths of a second.
  constexpr jinja::Limits kLimits = {.max_work = 30'000'000};
  if (!chat_template_) {
    throw Error(ErrorCode::kInvalidArgument,
                "chat_template: expected one, since the model has none: " + no_chat_template_);
  }
  const bool own = chat.chat_template.empty();
  if (!own && !trust_request_chat_template_) {
    throw Error(ErrorCode::kInvalidArgument,
                "chat_template: expected none, since this server was started without "
                "--trust-request-chat-template");
  }
  const std::time_t seconds = std::time(nullptr);
  std::tm now;
  localtime_r(&seconds, &now);
  std::string text;
  try {
    text = own ? chat_template_->Render(chat.context, now, &abandoned)
               : chat_template_->RenderBy(jinja::Template(chat.chat_template, "template", kLimits),
                                          chat.context, now, &abandoned);
  } catch (const Error& error) {
    if (own) throw Error(error.code(), "messages: " + error.message());
    throw Error(ErrorCode::kInvalidArgument, "chat_template: " + error.message());
  }
  if (chat.continue_final_message) text = openai::UpToFinalMessage(std::move(text), chat);
  return engine_.Encode(text, add_special_tokens);
}

void Intake::CheckModel(const std::string& asked) const {
  if (asked.empty() || asked == model_name_) return;
  throw Error(ErrorCode::kNotFound,
              fmt::format("model: this server has {}, not {}", Quote(model_name_), Quote(asked)));
}

Generation::Prepared Intake::Completion(openai::Api api, std::string_view body,
                                        const std::atomic<bool>& abandoned) const {
  Generation::Prepared out{.request = openai::ParseRequest(api, body, sampling_defaults_)};
  openai::CompletionRequest& request = out.request;
  CheckModel(request.model);
  const bool special = request.add_special_tokens;
  int64_t by_default = 16;
  if (api == openai::Api::kChat) {
    openai::EncodedPrompt& encoded = out.prompts.emplace_back();
    encoded.tokens = EncodeChat(request.chat, special, abandoned);
    if (request.echo) encoded.text = openai::EchoOf(request);
    by_default = engine_.max_model_len() - std::ssize(encoded.tokens);
    by_default = std::max<int64_t>(by_default, 1);
  }
  for (auto& prompt : request.prompts) {
    openai::EncodedPrompt& encoded = out.prompts.emplace_back();
    if (auto* text = std::get_if<std::string>(&prompt)) {
      encoded.tokens = engine_.Encode(*text, special);
      if (request.echo) encoded.text = std::move(*text);
    } else {
      encoded.tokens = std::move(std::get<std::vector<int32_t>>(prompt));
      if (request.echo) encoded.text = engine_.Decode(encoded.tokens, request.skip_special_tokens);
    }
  }
  request.sampling.max_tokens =
      request.max_tokens.value_or(static_cast<int>(std::min<int64_t>(by_default, INT32_MAX)));
  for (const openai::EncodedPrompt& prompt : out.prompts) {
    openai::CheckRoom(request, std::ssize(prompt.tokens), engine_.max_model_len());
    // Each sequence of the engine needs tokens of its own, which it will add to.
    for (int n = 0; n < request.n; ++n) {
      out.engine_requests.push_back({.prompt = prompt.tokens, .sampling = request.sampling});
      out.engine_requests.back().sampling.choice = static_cast<uint32_t>(n);
    }
  }
  return out;
}

std::string Intake::Tokenize(std::string_view body, const std::atomic<bool>& abandoned) const {
  const openai::TokenizeRequest request = openai::ParseTokenize(body);
  CheckModel(request.model);
  const auto* text = std::get_if<std::string>(&request.text);
  const std::vector<int32_t> tokens = text
                                          ? engine_.Encode(*text, request.add_special_tokens)
                                          : EncodeChat(std::get<openai::Conversation>(request.text),
                                                       request.add_special_tokens, abandoned);
  return openai::TokenizeBody(tokens, engine_.max_model_len());
}

std::string Intake::Detokenize(std::string_view body) const {
  const openai::DetokenizeRequest request = openai::ParseDetokenize(body, engine_.vocab_size());
  CheckModel(request.model);
  return openai::DetokenizeBody(engine_.Decode(request.tokens));
}

}  // namespace octavo
