// tokenizer_config.json, of which Octavo needs the names of control tokens and the added tokens
// that tokenizer.json may lack. The chat template is text/chat_template's.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "text/added_tokens.h"

namespace octavo {

struct TokenizerConfig {
  std::string bos_token, eos_token, pad_token;  // empty: not named
  std::vector<AddedToken> added_tokens;         // in the order of their ids
};

// `name` begins every error. Throws Error.
TokenizerConfig ReadTokenizerConfig(std::string_view json, const std::string& name);

}  // namespace octavo
