// Oniguruma -> PCRE2. The two agree on most of what tokenizers use; this file is the list of where
// they do not.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>

#include "base/error.h"
#include "text/pattern.h"

namespace octavo {
namespace {

// PCRE2's own \s contains U+180E and its \w lacks marks and connectors, so both are spelled out.
// All sets were compared with Oniguruma's, character by character, over Unicode 14.
constexpr std::string_view kSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029})"
    R"(\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kNotSpace =
    R"(\x{0}-\x{8}\x{e}-\x{1f}\x{21}-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff})"
    R"(\x{200b}-\x{2027}\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff})";
constexpr std::string_view kWord =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kHexDigit = "0-9a-fA-F";

// Letters that mean the same after a backslash in both dialects, inside and outside a class.
constexpr std::string_view kSameEscapes = "rntfaedD";
// The same for assertions, which stand outside classes only.
constexpr std::string_view kSameAssertions = "Az";
constexpr std::array<std::string_view, 7> kSameGroups = {
    "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where)
      : pattern_(pattern), where_(where) {}

  std::string Run() {
    // At the start of a pattern (?i) covers all of it in both dialects; elsewhere they differ.
    if (pattern_.starts_with("(?i)")) Copy(4);
    while (at_ < pattern_.size()) {
      switch (pattern_[at_]) {
        case '\\':
          Escape(/*in_class=*/false);
          break;
        case '[':
          Class();
          break;
        case '(':
          Group();
          break;
        case '{':
          Interval();
          break;
        default:
          Copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void Refuse(std::string_view what) const {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{}: expected a regular expression Octavo can run, found {} at byte {}",
                            where_, what, at_));
  }

  char Peek(size_t ahead) const {
    return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0';
  }

  void Copy(size_t count) {
    count = std::min(count, pattern_.size() - at_);
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }

  void Emit(std::string_view text, size_t consumed) {
    out_ += text;
    at_ += consumed;
  }

  void EmitSet(std::string_view members, bool in_class) {
    Emit(in_class ? std::string(members) : fmt::format("[{}]", members), 2);
  }

  void EmitComplement(std::string_view members, bool in_class) {
    if (in_class) Refuse(fmt::format("\\{} inside a class", Peek(1)));
    Emit(fmt::format("[^{}]", members), 2);
  }

  void Escape(bool in_class) {
    const char letter = Peek(1);
    if (letter == '\0') Refuse("a lone backslash");
    const bool ascii = static_cast<unsigned char>(letter) < 0x80;
    if (!ascii || std::ispunct(static_cast<unsigned char>(letter)) || letter == ' ' ||
        kSameEscapes.find(letter) != std::string_view::npos ||
        (!in_class && kSameAssertions.find(letter) != std::string_view::npos)) {
      // A backslash before a character that is no ASCII letter or digit makes it literal in both.
      return ascii ? Copy(2) : Emit("", 1);
    }
    switch (letter) {
      case 's':
        return EmitSet(kSpace, in_class);
      case 'S':
        return EmitSet(kNotSpace, in_class);
      case 'w':
        return EmitSet(kWord, in_class);
      case 'W':
        return EmitComplement(kWord, in_class);
      case 'h':
        return EmitSet(kHexDigit, in_class);
      case 'H':
        return EmitComplement(kHexDigit, in_class);
      case 'v':
        return Emit(R"(\x{b})", 2);
      case 'u':
        return CodePoint();
      case 'x':
        return HexCode();
      case 'p':
      case 'P':
        return Property();
      default:
        Refuse(fmt::format("\\{}", letter));
    }
  }

  size_t HexDigits(size_t from, size_t most) const {
    size_t count = 0;
    while (count < most && std::isxdigit(static_cast<unsigned char>(Peek(from + count)))) ++count;
    return count;
  }

  void CodePoint() {  // \uHHHH
    if (HexDigits(2, 4) != 4) Refuse("\\u without four digits");
    Emit(fmt::format("\\x{{{}}}", pattern_.substr(at_ + 2, 4)), 6);
  }

  void HexCode() {  // \x{H...}, and \xHH below 0x80 (above, Oniguruma means a byte)
    if (Peek(2) == '{') {
      const size_t digits = HexDigits(3, 8);
      if (digits == 0 || Peek(3 + digits) != '}') Refuse("an unfinished \\x{...}");
      return Copy(digits + 4);
    }
    const size_t digits = HexDigits(2, 2);
    if (digits == 0 || (digits == 2 && Peek(2) > '7')) Refuse("\\x of a byte above 7F");
    Copy(2 + digits);
  }

  void Property() {
    if (Peek(2) != '{') Refuse("\\p without braces");
    const size_t close = pattern_.find('}', at_);
    if (close == std::string_view::npos) Refuse("an unfinished \\p{...}");
    std::string_view name = pattern_.substr(at_ + 3, close - at_ - 3);
    bool negated = Peek(1) == 'P';
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    const bool plain = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
      return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '&';
    });
    if (!plain) Refuse(fmt::format("the property \\p{{{}}}", name));
    // One or two letters are a general category. A bare script name would mean Script_Extensions to
    // PCRE2.
    const bool same = name.size() <= 2 || name == "Any" || name == "Alphabetic";
    Emit(fmt::format("\\{}{{{}{}}}", negated ? 'P' : 'p', same ? "" : "sc:", name), 0);
    at_ = close + 1;
  }

  void Class() {
    Copy(1);
    if (Peek(0) == '^') Copy(1);
    if (Peek(0) == ']') Refuse("an empty class");
    while (Peek(0) != ']') {
      if (at_ >= pattern_.size()) Refuse("a class without its ]");
      if (pattern_[at_] == '\\') {
        Escape(/*in_class=*/true);
      } else if (pattern_[at_] == '[') {
        if (Peek(1) != ':') Refuse("a class inside a class");
        Refuse("a POSIX bracket");
      } else if (pattern_[at_] == '&' && Peek(1) == '&') {
        Refuse("the class operator &&");
      } else {
        Copy(1);
      }
    }
    Copy(1);
  }

  void Group() {
    if (Peek(1) == '*') Refuse("the verb (*");
    if (Peek(1) != '?') return Copy(1);
    for (std::string_view opening : kSameGroups) {
      if (pattern_.substr(at_).starts_with(opening)) return Copy(opening.size());
    }
    Refuse(fmt::format("the group {}", pattern_.substr(at_, 3)));
  }

  // {n}, {n,}, {,m}, {n,m}
  void Interval() {
    size_t end = 1;
    while (std::isdigit(static_cast<unsigned char>(Peek(end)))) ++end;
    const bool has_least = end > 1;
    bool has_most = false;
    const bool fixed = Peek(end) == '}';
    if (Peek(end) == ',') {
      ++end;
      const size_t digits = end;
      while (std::isdigit(static_cast<unsigned char>(Peek(end)))) ++end;
      has_most = end > digits;
    }
    if (Peek(end) != '}' || (!has_least && !has_most)) Refuse("a { that is no interval");
    // x{1,3}+ repeats x{1,3} in Oniguruma and is possessive in PCRE2; x{3}? is optional in one and
    // lazy in the other.
    if (Peek(end + 1) == '+') Refuse("an interval followed by +");
    if (fixed && Peek(end + 1) == '?') Refuse("a fixed interval followed by ?");
    if (!has_least) {
      Emit("{0", 1);
      --end;
    }
    Copy(end + 1);
  }

  const std::string_view pattern_;
  const std::string& where_;
  size_t at_ = 0;
  std::string out_;
};

}  // namespace

std::string TranslateOniguruma(std::string_view pattern, const std::string& where) {
  return Translator(pattern, where).Run();
}

}  // namespace octavo
