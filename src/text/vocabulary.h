// Vocabulary: tokens by id and ids by token. Filled once, then read by any thread.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace octavo {

// Ids index tables, so they are bounded; the largest published vocabulary has 262,144 tokens.
inline constexpr int64_t kMaxTokenId = (1 << 22) - 1;

class Vocabulary {
 public:
  // False if the token or the id is taken. 0 <= id <= kMaxTokenId.
  bool Add(std::string_view token, int32_t id);

  std::optional<int32_t> IdOf(std::string_view token) const;
  // Empty if no token has this id.
  std::string_view TokenOf(int32_t id) const;
  // One more than the largest id. There may be ids without a token.
  int32_t size() const { return static_cast<int32_t>(tokens_.size()); }

  void Reserve(size_t tokens);

 private:
  std::deque<std::string> storage_;  // a deque does not move the strings that the views point to
  std::vector<std::string_view> tokens_;
  std::unordered_map<std::string_view, int32_t> ids_;
};

}  // namespace octavo
