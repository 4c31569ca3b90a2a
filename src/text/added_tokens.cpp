#include "text/added_tokens.h"

#include <utf8proc.h>

#include "text/unicode.h"

namespace octavo {
namespace {

bool IsWordCharacter(char32_t character) {
  if (character == 0x200C || character == 0x200D) return true;  // join controls
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(character))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

bool TouchesWord(std::string_view text, size_t begin, size_t end) {
  if (begin > 0) {
    size_t at = PreviousCodePoint(text, begin);
    if (IsWordCharacter(NextCodePoint(text, &at))) return true;
  }
  return end < text.size() && IsWordCharacter(NextCodePoint(text, &end));
}

// Moves `begin` left over white space, down to `floor`.
size_t SkipSpaceLeft(std::string_view text, size_t begin, size_t floor) {
  while (begin > floor) {
    const size_t previous = PreviousCodePoint(text, begin);
    size_t at = previous;
    if (!IsWhiteSpace(NextCodePoint(text, &at))) break;
    begin = previous;
  }
  return begin;
}

size_t SkipSpaceRight(std::string_view text, size_t end) {
  while (end < text.size()) {
    size_t at = end;
    if (!IsWhiteSpace(NextCodePoint(text, &at))) break;
    end = at;
  }
  return end;
}

}  // namespace

void AddedTokenFinder::Add(std::string_view content, size_t token_index) {
  if (content.empty()) return;
  uint32_t node = 0;
  for (char byte : content) {
    const uint64_t key = static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
    const auto [child, inserted] =
        children_.try_emplace(key, static_cast<uint32_t>(token_at_.size()));
    if (inserted) token_at_.push_back(-1);
    node = child->second;
  }
  if (token_at_[node] < 0) token_at_[node] = static_cast<int32_t>(token_index);
  starts_[static_cast<uint8_t>(content[0])] = true;
}

AddedTokenFinder::Found AddedTokenFinder::LongestAt(std::string_view text) const {
  Found found = {.length = 0, .token_index = -1};
  uint32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto child =
        children_.find(static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(text[i]));
    if (child == children_.end()) break;
    node = child->second;
    if (token_at_[node] >= 0) found = {.length = i + 1, .token_index = token_at_[node]};
  }
  return found;
}

std::vector<TextSegment> AddedTokenFinder::Split(std::string_view text,
                                                 const std::vector<AddedToken>& tokens,
                                                 bool recognise_special) const {
  std::vector<TextSegment> segments;
  size_t covered = 0;
  for (size_t at = 0; at < text.size();) {
    if (!starts_[static_cast<uint8_t>(text[at])]) {
      ++at;
      continue;
    }
    const Found found = LongestAt(text.substr(at));
    if (found.token_index < 0) {
      ++at;
      continue;
    }
    // A match that is turned down still uses up its text, and the search goes on behind the match
    // itself, not behind the white space it takes along: both as in HF.
    size_t begin = at;
    size_t end = at + found.length;
    at = end;
    const AddedToken& token = tokens[found.token_index];
    if (token.special && !recognise_special) continue;
    if (token.single_word && TouchesWord(text, begin, end)) continue;
    if (token.lstrip) begin = SkipSpaceLeft(text, begin, covered);
    if (token.rstrip) end = SkipSpaceRight(text, end);
    if (covered < begin) segments.push_back({covered, begin, -1});
    segments.push_back({begin, end, token.id});
    covered = end;
  }
  if (covered < text.size()) segments.push_back({covered, text.size(), -1});
  return segments;
}

}  // namespace octavo
