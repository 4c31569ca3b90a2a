// What Split and Replace look for: a literal string or a regular expression.
//
// tokenizer.json carries regular expressions in Oniguruma's dialect; they are run by PCRE2.
// Constructs that mean the same in both pass, those that PCRE2 spells differently are rewritten
// (\s, \w, \h, \p{Han}, {,3}), all others are refused by name when the file is loaded. Matching is
// thread-safe.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace octavo {

struct Match {
  size_t begin;
  size_t end;
};

class Pattern {
 public:
  // Both throw Error naming `where` for what cannot be matched: an empty literal, a faulty or
  // unsupported regex.
  static Pattern Literal(std::string text, const std::string& where);
  static Pattern Regex(std::string_view oniguruma, const std::string& where);

  // Appends all matches in `text` (valid UTF-8), left to right, none overlapping; an empty match
  // where another one just ended is left out. Throws Error if the expression needs more than its
  // step or memory limit.
  void FindAll(std::string_view text, std::vector<Match>* matches) const;

  // The string to find if this is a literal, empty if it is a regex.
  const std::string& literal() const { return literal_; }

 private:
  struct Compiled;

  std::string literal_;
  std::shared_ptr<const Compiled> regex_;
};

// The PCRE2 (UTF, UCP, MULTILINE) spelling of a pattern in Oniguruma's default syntax. Throws
// Error.
std::string TranslateOniguruma(std::string_view pattern, const std::string& where);

}  // namespace octavo
