// Text as Python's str sees it: in code points, with Unicode's full case mappings. Text is valid
// UTF-8 throughout; indices count code points, from 0 to the length.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace octavo::jinja {

// str.isspace: Unicode's white space, and the four separators from U+001C.
bool IsSpace(char32_t code_point);
bool IsPrintable(char32_t code_point);
bool IsIdentifierStart(char32_t code_point);
bool IsIdentifierPart(char32_t code_point);

std::string_view StripSpace(std::string_view text);
enum class Side { kLeft, kRight, kBoth };
std::string_view StripSpace(std::string_view text, Side side);
// Strips whatever characters are in `set`.
std::string_view Strip(std::string_view text, std::string_view set, Side side);

// The byte at which code point `index` begins.
size_t ByteOffset(std::string_view text, size_t index, bool ascii);

std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Capitalize(std::string_view text);
std::string Title(std::string_view text);  // str.title, not the filter
std::string SwapCase(std::string_view text);
std::string CaseFold(std::string_view text);

// One of str's predicates, such as "isdigit"; false for the empty text except isascii and
// isprintable.
enum class TextClass {
  kAlnum,
  kAlpha,
  kAscii,
  kDecimal,
  kDigit,
  kIdentifier,
  kLower,
  kNumeric,
  kPrintable,
  kSpace,
  kTitle,
  kUpper
};
bool IsAll(TextClass what, std::string_view text);

// str.split without and with a separator (not empty); at most `most` splits, or all if negative.
// string_view's find and rfind, in time that grows with the lengths' sum and not their product:
// both texts are a stranger's.
size_t Find(std::string_view text, std::string_view part, size_t from = 0);
size_t FindFromRight(std::string_view text, std::string_view part);

std::vector<std::string_view> SplitSpace(std::string_view text, int64_t most);
std::vector<std::string_view> Split(std::string_view text, std::string_view separator,
                                    int64_t most);
std::vector<std::string_view> SplitSpaceFromRight(std::string_view text, int64_t most);
std::vector<std::string_view> SplitFromRight(std::string_view text, std::string_view separator,
                                             int64_t most);
std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends);

// How often `part` occurs without overlap; one more than the code points if it is empty.
size_t Count(std::string_view text, std::string_view part);
// The first `most` occurrences, or all if negative. `size` of the result is what Replaced tells
// beforehand.
size_t ReplacedSize(std::string_view text, std::string_view from, std::string_view to,
                    int64_t most);
std::string Replace(std::string_view text, std::string_view from, std::string_view to,
                    int64_t most);

// repr() of a str.
void AppendRepr(std::string_view text, std::string* out);

}  // namespace octavo::jinja
