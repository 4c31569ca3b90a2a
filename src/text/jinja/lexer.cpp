#include "text/jinja/lexer.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "io/json.h"
#include "text/jinja/numbers.h"
#include "text/jinja/python_text.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

constexpr std::string_view kOperators[] = {"**", "//", "==", "!=", ">=", "<=", "+", "-", "/",
                                           "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                           ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

std::string NormalizeNewlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
      out += '\n';
    } else {
      out += source[i];
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(NormalizeNewlines(source)) {}

  std::vector<Token> Run() {
    try {
      while (at_ < source_.size()) LexData();
      Add(TokenKind::kEnd, "");
    } catch (const Mistake& mistake) {
      Add(TokenKind::kMistake, mistake.message);
    }
    return std::move(tokens_);
  }

 private:
  struct Mistake {
    std::string message;
  };

  [[noreturn]] void Fail(std::string message) const { throw Mistake{std::move(message)}; }

  std::string_view Rest(size_t at) const { return std::string_view(source_).substr(at); }
  std::string_view Rest() const { return Rest(at_); }

  void Add(TokenKind kind, std::string text) {
    tokens_.push_back({.kind = kind, .line = line_, .text = std::move(text)});
  }

  // Moves on to `end`, counting lines.
  void Advance(size_t end) {
    line_ += static_cast<int>(std::count(source_.begin() + at_, source_.begin() + end, '\n'));
    if (end > at_) line_starting_ = source_[end - 1] == '\n';
    at_ = end;
  }

  size_t AfterSpace(size_t at) const {
    const std::string_view rest = Rest(at);
    return source_.size() - StripSpace(rest, Side::kLeft).size();
  }

  // After the tag end at `at` ("%}", "-%}", "+%}"), or npos if there is none. A block takes one
  // newline with it.
  size_t AfterEnd(size_t at, std::string_view end, bool plus, bool newline) const {
    const std::string_view rest = Rest(at);
    if (rest.starts_with('-') && rest.substr(1).starts_with(end)) {
      return AfterSpace(at + 1 + end.size());
    }
    if (plus && rest.starts_with('+') && rest.substr(1).starts_with(end)) {
      return at + 1 + end.size();
    }
    if (!rest.starts_with(end)) return rest.npos;
    const size_t after = at + end.size();
    return newline && after < source_.size() && source_[after] == '\n' ? after + 1 : after;
  }

  char SignAt(size_t at) const {
    return at < source_.size() && (source_[at] == '-' || source_[at] == '+') ? source_[at] : '\0';
  }

  // Emits the text up to `tag`, stripped as the tag wants it, and moves to the tag.
  void EmitData(size_t tag, char sign, bool is_variable) {
    std::string_view text = Rest().substr(0, tag - at_);
    if (sign == '-') {
      text = StripSpace(text, Side::kRight);
    } else if (sign != '+' && !is_variable) {
      const size_t newline = text.rfind('\n');
      const size_t line_begin = newline == text.npos ? 0 : newline + 1;
      const bool at_line_begin = newline != text.npos || line_starting_;
      if (at_line_begin && StripSpace(text.substr(line_begin)).empty()) {
        text = text.substr(0, line_begin);
      }
    }
    if (!text.empty()) Add(TokenKind::kData, std::string(text));
    Advance(tag);
  }

  void LexData() {
    size_t tag = at_;
    for (;; ++tag) {
      tag = source_.find('{', tag);
      if (tag == source_.npos || tag + 1 == source_.size()) {
        Add(TokenKind::kData, std::string(Rest()));
        Advance(source_.size());
        return;
      }
      const char kind = source_[tag + 1];
      if (kind == '{' || kind == '%' || kind == '#') break;
    }
    const char sign = SignAt(tag + 2);
    const size_t inside = tag + 2 + (sign != '\0');
    switch (source_[tag + 1]) {
      case '#':
        EmitData(tag, sign, false);
        LexComment(inside);
        return;
      case '{':
        EmitData(tag, sign, true);
        Add(TokenKind::kVariableBegin, "");
        Advance(inside);
        LexTag("}}", TokenKind::kVariableEnd);
        return;
      default:
        EmitData(tag, sign, false);
        if (const size_t raw = AfterRawBegin(inside); raw != source_.npos) {
          Advance(raw);
          LexRaw();
          return;
        }
        Add(TokenKind::kBlockBegin, "");
        Advance(inside);
        LexTag("%}", TokenKind::kBlockEnd);
    }
  }

  void LexComment(size_t inside) {
    const size_t close = source_.find("#}", inside);
    if (close == source_.npos) {
      Advance(inside);
      if (inside == source_.size()) return;  // nothing to comment on
      Fail("Missing end of comment tag");
    }
    const bool signed_end = close > inside && SignAt(close - 1) != '\0';
    Advance(AfterEnd(signed_end ? close - 1 : close, "#}", true, true));
  }

  size_t AfterRawBegin(size_t inside) const {
    const size_t word = AfterSpace(inside);
    if (!Rest(word).starts_with("raw")) return source_.npos;
    return AfterEnd(AfterSpace(word + 3), "%}", false, false);
  }

  void LexRaw() {
    for (size_t tag = at_;; ++tag) {
      tag = source_.find("{%", tag);
      if (tag == source_.npos) {
        if (at_ == source_.size()) return;
        Fail("Missing end of raw directive");
      }
      const char sign = SignAt(tag + 2);
      const size_t word = AfterSpace(tag + 2 + (sign != '\0'));
      if (!Rest(word).starts_with("endraw")) continue;
      const size_t after = AfterEnd(AfterSpace(word + 6), "%}", true, true);
      if (after == source_.npos) continue;
      EmitData(tag, sign, false);
      Advance(after);
      return;
    }
  }

  // Tokens up to the end of the tag.
  void LexTag(std::string_view end, TokenKind end_kind) {
    std::string open;  // what each bracket wants to be closed by
    const bool block = end_kind == TokenKind::kBlockEnd;
    while (at_ < source_.size()) {
      if (open.empty()) {
        const size_t after = AfterEnd(at_, end, block, block);
        if (after != source_.npos) {
          Add(end_kind, "");
          Advance(after);
          return;
        }
      }
      if (const size_t after = AfterSpace(at_); after != at_) {
        Advance(after);
      } else if (IsDigit(source_[at_])) {
        LexNumber();
      } else if (source_[at_] == '\'' || source_[at_] == '"') {
        LexString();
      } else if (!LexName()) {
        LexOperator(&open);
      }
    }
  }

  // Digits with single underscores between them, from `at`.
  size_t AfterDigits(size_t at) const {
    while (at < source_.size() &&
           (IsDigit(source_[at]) ||
            (source_[at] == '_' && at + 1 < source_.size() && IsDigit(source_[at + 1])))) {
      ++at;
    }
    return at;
  }

  // Where the float that begins here ends, or 0 if it is none. After a dot there is none: x.0.1.
  size_t AfterFloat() const {
    if (at_ > 0 && source_[at_ - 1] == '.') return 0;
    size_t end = AfterDigits(at_);
    bool is_float = false;
    if (end + 1 < source_.size() && source_[end] == '.' && IsDigit(source_[end + 1])) {
      end = AfterDigits(end + 1);
      is_float = true;
    }
    if (end < source_.size() && (source_[end] | 0x20) == 'e') {
      const size_t digits = end + 1 + (SignAt(end + 1) != '\0');
      if (digits < source_.size() && IsDigit(source_[digits])) return AfterDigits(digits);
    }
    return is_float ? end : 0;
  }

  size_t AfterInteger() const {
    if (source_[at_] != '0') return AfterDigits(at_);
    const char mark = at_ + 1 < source_.size() ? static_cast<char>(source_[at_ + 1] | 0x20) : '\0';
    const std::string_view digits = mark == 'x'   ? "0123456789abcdefABCDEF"
                                    : mark == 'o' ? "01234567"
                                    : mark == 'b' ? "01"
                                                  : "";
    const auto is_digit = [&](size_t at) {
      return at < source_.size() && digits.find(source_[at]) != digits.npos;
    };
    if (!digits.empty()) {
      size_t end = at_ + 2;
      while (is_digit(end) || (end < source_.size() && source_[end] == '_' && is_digit(end + 1))) {
        ++end;
      }
      if (end > at_ + 2) return end;
    }
    size_t end = at_ + 1;  // any zeros
    while (end < source_.size() &&
           (source_[end] == '0' ||
            (source_[end] == '_' && end + 1 < source_.size() && source_[end + 1] == '0'))) {
      ++end;
    }
    return end;
  }

  void LexNumber() {
    const size_t float_end = AfterFloat();
    const size_t end = float_end != 0 ? float_end : AfterInteger();
    const std::string_view text = Rest().substr(0, end - at_);
    Token token = {.kind = float_end != 0 ? TokenKind::kFloat : TokenKind::kInteger,
                   .line = line_,
                   .text = std::string(text)};
    if (float_end != 0) {
      token.real = ParseFloat(text).value_or(0);
    } else {
      token.integer = ParseInt(text, 0).value_or(0);
    }
    tokens_.push_back(std::move(token));
    Advance(end);
  }

  bool LexName() {
    size_t end = at_;
    for (size_t next = at_; next < source_.size(); end = next) {
      if (!IsIdentifierPart(NextCodePoint(source_, &next))) break;
    }
    if (end == at_) return false;
    const std::string_view name = Rest().substr(0, end - at_);
    if (!IsAll(TextClass::kIdentifier, name)) Fail("Invalid character in identifier");
    Add(TokenKind::kName, std::string(name));
    Advance(end);
    return true;
  }

  void LexOperator(std::string* open) {
    const auto found = std::ranges::find_if(
        kOperators, [&](std::string_view op) { return Rest().starts_with(op); });
    if (found == std::end(kOperators)) {
      const size_t begin = at_;
      size_t end = at_;
      NextCodePoint(source_, &end);
      Fail(fmt::format("unexpected char {} at {}", Quote(Rest().substr(0, end - begin)), begin));
    }
    const std::string op(*found);
    if (op == "(" || op == "[" || op == "{") {
      open->push_back(op == "(" ? ')' : op == "[" ? ']' : '}');
    } else if (op == ")" || op == "]" || op == "}") {
      if (open->empty()) Fail(fmt::format("unexpected '{}'", op));
      if (open->back() != op[0]) {
        Fail(fmt::format("unexpected '{}', expected '{}'", op, open->back()));
      }
      open->pop_back();
    }
    Add(TokenKind::kOperator, op);
    Advance(at_ + op.size());
  }

  void LexString() {
    const char quote = source_[at_];
    size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) {
      Fail(fmt::format("unexpected char {} at {}", Quote(Rest().substr(0, 1)), at_));
    }
    Add(TokenKind::kString, Unescape(Rest().substr(1, end - at_ - 1)));
    Advance(end + 1);
  }

  // Exactly `digits` hexadecimal digits of `text` from `at`.
  char32_t HexEscape(std::string_view text, size_t at, size_t digits) const {
    uint32_t point = 0;
    const char* begin = text.data() + std::min(at, text.size());
    const char* end = text.data() + std::min(at + digits, text.size());
    const auto [stop, error] = std::from_chars(begin, end, point, 16);
    if (stop != begin + digits) Fail("truncated escape of a character in a string");
    if (point > 0x10FFFF) Fail("illegal Unicode character in a string");
    if (point >= 0xD800 && point < 0xE000) Fail("a surrogate in a string is no character");
    return point;
  }

  std::string Unescape(std::string_view text) const {
    constexpr std::string_view kPlain = "\\'\"abfnrtv";
    constexpr std::string_view kMeant = "\\'\"\a\b\f\n\r\t\v";
    std::string out;
    for (size_t i = 0; i < text.size();) {
      const char c = text[i++];
      if (c != '\\') {
        out += c;
        continue;
      }
      const char escape = text[i++];
      if (const size_t plain = kPlain.find(escape); plain != kPlain.npos) {
        out += kMeant[plain];
      } else if (escape == '\n') {
        // A line goes on.
      } else if (escape == 'x' || escape == 'u' || escape == 'U') {
        const size_t digits = escape == 'x' ? 2 : escape == 'u' ? 4 : 8;
        AppendUtf8(HexEscape(text, i, digits), &out);
        i += digits;
      } else if (escape >= '0' && escape <= '7') {
        uint32_t point = escape - '0';
        for (int n = 0; n < 2 && i < text.size() && text[i] >= '0' && text[i] <= '7'; ++n) {
          point = point * 8 + (text[i++] - '0');
        }
        AppendUtf8(point, &out);
      } else if (escape == 'N') {
        Fail("characters by name (\\N) are not supported");
      } else {
        out += '\\';
        out += escape;
      }
    }
    return out;
  }

  const std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // whether what was read so far ends a line
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> Tokenize(std::string_view source) { return Lexer(source).Run(); }

std::string Describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::kData:
      return "template data / text";
    case TokenKind::kBlockBegin:
      return "begin of statement block";
    case TokenKind::kBlockEnd:
      return "end of statement block";
    case TokenKind::kVariableBegin:
      return "begin of print statement";
    case TokenKind::kVariableEnd:
      return "end of print statement";
    case TokenKind::kString:
      return "string";
    case TokenKind::kInteger:
      return "integer";
    case TokenKind::kFloat:
      return "float";
    case TokenKind::kEnd:
      return "end of template";
    case TokenKind::kName:
    case TokenKind::kOperator:
    case TokenKind::kMistake:
      return token.text;
  }
  return token.text;
}

}  // namespace octavo::jinja
