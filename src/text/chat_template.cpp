#include "text/chat_template.h"

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"
#include "io/mapped_file.h"

namespace octavo {
namespace {

constexpr char kTemplateFile[] = "chat_template.jinja";
constexpr char kConfigFile[] = "tokenizer_config.json";

[[noreturn]] void Expected(const std::string& where, std::string_view what, const Json& found) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected {}, found {}", where, what, Describe(found)));
}

std::string_view TextAt(const Json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  const std::string place = fmt::format("{}.{}", where, key);
  if (found == object.end()) Expected(place, "a string", Json());
  if (!found->is_string()) Expected(place, "a string", *found);
  return found->get_ref<const std::string&>();
}

// The names that transformers gives to control tokens. A token is a string, or an added token of
// which the content counts.
nlohmann::ordered_json ReadSpecialTokens(const Json& config, const std::string& name) {
  nlohmann::ordered_json tokens = nlohmann::ordered_json::object();
  for (const char* key : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
                          "cls_token", "mask_token"}) {
    const auto found = config.find(key);
    if (found == config.end() || found->is_null()) continue;
    const std::string where = fmt::format("{}: {}", name, key);
    if (found->is_object()) {
      tokens[key] = TextAt(*found, "content", where);
    } else if (found->is_string()) {
      tokens[key] = found->get_ref<const std::string&>();
    } else {
      Expected(where, "a token", *found);
    }
  }
  return tokens;
}

}  // namespace

ChatTemplate::ChatTemplate(std::string_view source, std::string name)
    : default_(jinja::Template(source, std::move(name))) {}

ChatTemplate ChatTemplate::FromFolder(const std::filesystem::path& folder,
                                      const std::filesystem::path& template_file) {
  const std::filesystem::path config_path = folder / kConfigFile;
  const bool given = !template_file.empty();
  const std::filesystem::path template_path = given ? template_file : folder / kTemplateFile;
  const std::string name = config_path.string();
  const Json config = IsThere(config_path) ? ReadJsonFile(config_path) : Json::object();
  if (!config.is_object()) Expected(name, "an object", config);

  ChatTemplate chat;
  chat.special_tokens_ = ReadSpecialTokens(config, name);
  if (given || IsThere(template_path)) {
    const MappedFile file(template_path);
    chat.default_.emplace(file.bytes(), template_path.string());
    return chat;
  }
  const std::string where = name + ": chat_template";
  const auto found = config.find("chat_template");
  if (found == config.end() || found->is_null()) {
    throw Error(ErrorCode::kNotFound,
                fmt::format("{}: expected a chat template in {} or {}, found none", folder.string(),
                            kTemplateFile, kConfigFile));
  }
  if (found->is_string()) {
    chat.default_.emplace(found->get_ref<const std::string&>(), where);
    return chat;
  }
  if (!found->is_array()) Expected(where, "a string or a list of named templates", *found);
  for (size_t i = 0; i < found->size(); ++i) {
    const Json& entry = (*found)[i];
    const std::string place = fmt::format("{}[{}]", where, i);
    if (!entry.is_object()) Expected(place, "an object with name and template", entry);
    const std::string_view kind = TextAt(entry, "name", place);
    const std::string_view source = TextAt(entry, "template", place);
    if (kind == "default") chat.default_.emplace(source, place);
    if (kind == "tool_use") chat.tool_use_.emplace(source, place);
  }
  if (!chat.default_ && !chat.tool_use_) {
    throw Error(ErrorCode::kNotFound,
                fmt::format("{}: expected a template named 'default', found none among {}", where,
                            found->size()));
  }
  return chat;
}

nlohmann::ordered_json ChatTemplate::Variables(const nlohmann::ordered_json& context) const {
  if (!context.is_object()) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("chat: expected an object with messages, found {}", context.type_name()));
  }
  nlohmann::ordered_json variables = special_tokens_;
  variables["tools"] = nullptr;
  variables["documents"] = nullptr;
  variables["add_generation_prompt"] = false;
  for (const auto& [key, value] : context.items()) variables[key] = value;
  return variables;
}

std::string ChatTemplate::RenderBy(const jinja::Template& other,
                                   const nlohmann::ordered_json& context, const std::tm& now,
                                   const std::atomic<bool>* abandoned) const {
  return other.Render(Variables(context), now, abandoned);
}

std::string ChatTemplate::Render(const nlohmann::ordered_json& context, const std::tm& now,
                                 const std::atomic<bool>* abandoned) const {
  const nlohmann::ordered_json variables = Variables(context);
  const bool has_tools = !variables.at("tools").is_null();
  if (has_tools && tool_use_) return tool_use_->Render(variables, now, abandoned);
  if (!default_) {
    throw Error(ErrorCode::kInvalidArgument,
                "chat: this model has a template for conversations with tools only, found none");
  }
  return default_->Render(variables, now, abandoned);
}

}  // namespace octavo
