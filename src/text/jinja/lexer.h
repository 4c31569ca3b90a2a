// Template source to tokens, as Jinja2 does it with trim_blocks and lstrip_blocks.
//
// A newline after a block tag and the white space before one on its line go; "-" in a tag strips
// all white space on its side, "+" keeps it. Newlines become "\n", and one at the end of the source
// is dropped.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja/value.h"

namespace octavo::jinja {

enum class TokenKind : uint8_t {
  kData,  // text between tags
  kBlockBegin,
  kBlockEnd,
  kVariableBegin,
  kVariableEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd,
  kMistake  // text says what is wrong with the source here; the last token
};

struct Token {
  TokenKind kind;
  int line;
  std::string text;  // data, a name, an operator, an unescaped string
  Int integer = 0;
  double real = 0;

  bool IsOperator(std::string_view op) const { return kind == TokenKind::kOperator && text == op; }
  bool IsName(std::string_view name) const { return kind == TokenKind::kName && text == name; }
};

// Does not throw for mistakes in the source: they come as tokens, so that what the parser finds
// wrong before them is told first. The last token is kEnd or kMistake.
std::vector<Token> Tokenize(std::string_view source);

// As errors name a token.
std::string Describe(const Token& token);

// A mistake in the source, at a line.
class SyntaxFault : public Fault {
 public:
  SyntaxFault(std::string message, int line, Kind kind = Kind::kError,
              std::string type = "TemplateSyntaxError")
      : Fault(std::move(type), std::move(message), kind), line_(line) {}
  int line() const { return line_; }

 private:
  int line_;
};

}  // namespace octavo::jinja
