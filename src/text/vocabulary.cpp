#include "text/vocabulary.h"

#include "base/error.h"

namespace octavo {

bool Vocabulary::Add(std::string_view token, int32_t id) {
  OCTAVO_CHECK(id >= 0 && id <= kMaxTokenId, id);
  if (!TokenOf(id).empty() || ids_.contains(token)) return false;
  if (id >= size()) tokens_.resize(id + 1);
  tokens_[id] = storage_.emplace_back(token);
  ids_.emplace(tokens_[id], id);
  return true;
}

std::optional<int32_t> Vocabulary::IdOf(std::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

std::string_view Vocabulary::TokenOf(int32_t id) const {
  return id >= 0 && id < size() ? tokens_[id] : std::string_view();
}

void Vocabulary::Reserve(size_t tokens) {
  ids_.reserve(tokens);
  tokens_.reserve(tokens);
}

}  // namespace octavo
