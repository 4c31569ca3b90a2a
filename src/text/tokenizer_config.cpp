#include "text/tokenizer_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "io/json.h"
#include "text/vocabulary.h"

namespace octavo {
namespace {

[[noreturn]] void Expected(const std::string& where, std::string_view what, const Json& found) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected {}, found {}", where, what, Describe(found)));
}

std::string StringAt(const Json& object, const char* key, const std::string& where) {
  const auto value = object.find(key);
  if (value == object.end()) Expected(fmt::format("{}.{}", where, key), "a string", Json());
  if (!value->is_string()) Expected(fmt::format("{}.{}", where, key), "a string", *value);
  return value->get<std::string>();
}

bool FlagAt(const Json& object, const char* key, bool otherwise, const std::string& where) {
  const auto value = object.find(key);
  if (value == object.end() || value->is_null()) return otherwise;
  if (!value->is_boolean()) Expected(fmt::format("{}.{}", where, key), "true or false", *value);
  return value->get<bool>();
}

// A token's name is a string, or an added token of which the content counts.
std::string TokenName(const Json& config, const char* key, const std::string& name) {
  const auto value = config.find(key);
  if (value == config.end() || value->is_null()) return {};
  const std::string where = fmt::format("{}: {}", name, key);
  if (value->is_object()) return StringAt(*value, "content", where);
  if (!value->is_string()) Expected(where, "a token", *value);
  return value->get<std::string>();
}

AddedToken ReadAddedToken(const std::string& key, const Json& value, const std::string& where) {
  int64_t id = -1;
  const char* end = key.data() + key.size();
  const auto [stop, error] = std::from_chars(key.data(), end, id);
  if (error != std::errc() || stop != end || id < 0 || id > kMaxTokenId) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected ids from 0 to {} as keys, found {}", where, kMaxTokenId,
                            Quote(key)));
  }
  const std::string token = fmt::format("{}.{}", where, id);
  if (!value.is_object()) Expected(token, "an object", value);
  const bool special = FlagAt(value, "special", false, token);
  return {.id = static_cast<int32_t>(id),
          .content = StringAt(value, "content", token),
          .single_word = FlagAt(value, "single_word", false, token),
          .lstrip = FlagAt(value, "lstrip", false, token),
          .rstrip = FlagAt(value, "rstrip", false, token),
          .normalized = FlagAt(value, "normalized", !special, token),
          .special = special};
}

}  // namespace

TokenizerConfig ReadTokenizerConfig(std::string_view json, const std::string& name) {
  const Json root = ParseJson(json, name);
  if (!root.is_object()) Expected(name, "an object", root);
  TokenizerConfig config = {.bos_token = TokenName(root, "bos_token", name),
                            .eos_token = TokenName(root, "eos_token", name),
                            .pad_token = TokenName(root, "pad_token", name),
                            .added_tokens = {}};
  const auto added = root.find("added_tokens_decoder");
  if (added == root.end() || added->is_null()) return config;
  const std::string where = name + ": added_tokens_decoder";
  if (!added->is_object()) Expected(where, "an object", *added);
  for (const auto& [key, value] : added->items()) {
    config.added_tokens.push_back(ReadAddedToken(key, value, where));
  }
  std::ranges::sort(config.added_tokens, {}, &AddedToken::id);
  return config;
}

}  // namespace octavo
