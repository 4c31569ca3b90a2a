// The chat template of a model: messages to the prompt that the model was trained on.
//
//   ChatTemplate chat = ChatTemplate::FromFolder("path/to/model");
//   nlohmann::ordered_json context = {{"messages", ...}, {"add_generation_prompt", true}};
//   std::string prompt = chat.Render(context, jinja::LocalTime());
//
// Templates are rendered exactly as Hugging Face transformers renders them (text/jinja/template.h
// says with what limits). The prompt contains the special tokens in writing: encode it with
// SpecialTokens::kRecognise and without adding special tokens. Immutable: Render may be called from
// any number of threads.
#pragma once

#include <atomic>
#include <ctime>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "text/jinja/template.h"

namespace octavo {

class ChatTemplate {
 public:
  // chat_template.jinja in `folder`, else chat_template in its tokenizer_config.json: a text, or a
  // list of named ones, of which "default" counts, and "tool_use" when tools are given. Instead of
  // these `template_file`, if it is not empty. Throws Error; kNotFound if the folder has no
  // template.
  static ChatTemplate FromFolder(const std::filesystem::path& folder,
                                 const std::filesystem::path& template_file = {});

  // A template alone, without special tokens. `name` begins every error.
  ChatTemplate(std::string_view source, std::string name);

  // `context`: messages; optionally tools, documents, add_generation_prompt and whatever else the
  // template knows, enable_thinking for one. What it does not give are the special tokens of the
  // model (bos_token, eos_token, ...), tools and documents (none) and add_generation_prompt
  // (false). Throws Error: a context that is no object, or what the template raises.
  // `abandoned`, unless null, ends it early once another thread sets it.
  std::string Render(const nlohmann::ordered_json& context, const std::tm& now,
                     const std::atomic<bool>* abandoned = nullptr) const;
  // By another template, with this one's special tokens.
  std::string RenderBy(const jinja::Template& other, const nlohmann::ordered_json& context,
                       const std::tm& now, const std::atomic<bool>* abandoned = nullptr) const;

 private:
  ChatTemplate() = default;
  nlohmann::ordered_json Variables(const nlohmann::ordered_json& context) const;

  std::optional<jinja::Template> default_, tool_use_;
  nlohmann::ordered_json special_tokens_ = nlohmann::ordered_json::object();
};

}  // namespace octavo
