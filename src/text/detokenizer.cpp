#include "text/detokenizer.h"

namespace octavo {

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(&tokenizer),
      skip_special_tokens_(skip_special_tokens),
      stream_(tokenizer.decoder()) {}

void Detokenizer::Push(int32_t id, std::string* out) {
  if (skip_special_tokens_ && tokenizer_->IsSpecial(id)) return;
  const std::string_view token = tokenizer_->TokenOf(id);
  if (!token.empty()) stream_.Push(token, out);
}

std::string Detokenizer::Push(int32_t id) {
  std::string out;
  Push(id, &out);
  return out;
}

std::string Detokenizer::Flush() {
  std::string out;
  stream_.Finish(&out);
  return out;
}

}  // namespace octavo
