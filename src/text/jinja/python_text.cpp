#include "text/jinja/python_text.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "text/jinja/special_casing.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

constexpr int64_t kAll = -1;

utf8proc_category_t CategoryOf(char32_t point) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(point));
}

bool Between(char32_t point, char32_t first, char32_t last) {
  return point >= first && point <= last;
}

// The properties Lowercase and Uppercase: the categories and what Unicode adds to them.
bool IsLowerPoint(char32_t c) {
  return CategoryOf(c) == UTF8PROC_CATEGORY_LL || c == 0xAA || c == 0xBA ||
         Between(c, 0x2B0, 0x2B8) || Between(c, 0x2170, 0x217F) || Between(c, 0x24D0, 0x24E9);
}

bool IsUpperPoint(char32_t c) {
  return CategoryOf(c) == UTF8PROC_CATEGORY_LU || Between(c, 0x2160, 0x216F) ||
         Between(c, 0x24B6, 0x24CF) || Between(c, 0x1F130, 0x1F149) ||
         Between(c, 0x1F150, 0x1F169) || Between(c, 0x1F170, 0x1F189);
}

bool IsTitlePoint(char32_t c) { return CategoryOf(c) == UTF8PROC_CATEGORY_LT; }

bool IsCased(char32_t c) { return IsLowerPoint(c) || IsUpperPoint(c) || IsTitlePoint(c); }

bool IsCaseIgnorable(char32_t c) {
  switch (CategoryOf(c)) {
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_SK:
      return true;
    default:
      return c == '\'' || c == '.' || c == ':' || c == 0xB7 || c == 0x387 || c == 0x55F ||
             c == 0x5F4 || c == 0x2018 || c == 0x2019 || c == 0x2024 || c == 0x2027 ||
             c == 0xFE13 || c == 0xFE52 || c == 0xFE55 || c == 0xFF07 || c == 0xFF0E || c == 0xFF1A;
  }
}

bool IsLetter(char32_t c) {
  const utf8proc_category_t category = CategoryOf(c);
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

// Numeric_Type=Digit: superscripts, circled digits and the like.
constexpr std::pair<char32_t, char32_t> kDigitsWithoutDecimal[] = {
    {0xB2, 0xB3},       {0xB9, 0xB9},       {0x1369, 0x1371},   {0x19DA, 0x19DA},
    {0x2070, 0x2070},   {0x2074, 0x2079},   {0x2080, 0x2089},   {0x2460, 0x2468},
    {0x2474, 0x247C},   {0x2488, 0x2490},   {0x24EA, 0x24EA},   {0x24F5, 0x24FD},
    {0x24FF, 0x24FF},   {0x2776, 0x277E},   {0x2780, 0x2788},   {0x278A, 0x2792},
    {0x10A40, 0x10A43}, {0x10E60, 0x10E68}, {0x11052, 0x1105A}, {0x1F100, 0x1F10A}};

bool IsDecimal(char32_t c) { return CategoryOf(c) == UTF8PROC_CATEGORY_ND; }

bool IsDigit(char32_t c) {
  if (IsDecimal(c)) return true;
  return std::ranges::any_of(kDigitsWithoutDecimal,
                             [c](auto range) { return Between(c, range.first, range.second); });
}

// Ideographs that stand for numbers are left out.
bool IsNumeric(char32_t c) {
  const utf8proc_category_t category = CategoryOf(c);
  return category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO;
}

const SpecialCase* FindSpecial(char32_t c) {
  const auto found =
      std::ranges::lower_bound(kSpecialCases, c, std::ranges::less(), &SpecialCase::point);
  return found != std::end(kSpecialCases) && found->point == c ? &*found : nullptr;
}

void AppendUpper(char32_t c, std::string* out) {
  if (c < 0x80) {
    out->push_back(static_cast<char>(c >= 'a' && c <= 'z' ? c - 0x20 : c));
  } else if (const SpecialCase* special = FindSpecial(c)) {
    *out += special->upper;
  } else {
    AppendUtf8(utf8proc_toupper(static_cast<utf8proc_int32_t>(c)), out);
  }
}

void AppendTitle(char32_t c, std::string* out) {
  const SpecialCase* special = c < 0x80 ? nullptr : FindSpecial(c);
  if (special != nullptr && *special->title != '\0') {
    *out += special->title;
  } else {
    AppendUtf8(utf8proc_totitle(static_cast<utf8proc_int32_t>(c)), out);
  }
}

// A sigma at the end of a word: a cased letter before it, none after it, not counting marks.
bool IsFinalSigma(std::string_view text, size_t begin, size_t end) {
  bool cased = false;
  for (size_t at = begin; at > 0;) {
    at = PreviousCodePoint(text, at);
    size_t next = at;
    const char32_t c = NextCodePoint(text, &next);
    if (IsCaseIgnorable(c)) continue;
    cased = IsCased(c);
    break;
  }
  if (!cased) return false;
  for (size_t at = end; at < text.size();) {
    const char32_t c = NextCodePoint(text, &at);
    if (!IsCaseIgnorable(c)) return !IsCased(c);
  }
  return true;
}

// `begin` and `end` are where c stands in `text`.
void AppendLower(char32_t c, std::string_view text, size_t begin, size_t end, std::string* out) {
  constexpr char32_t kCapitalSigma = 0x3A3, kDottedI = 0x130;
  if (c < 0x80) {
    out->push_back(static_cast<char>(c >= 'A' && c <= 'Z' ? c + 0x20 : c));
  } else if (c == kCapitalSigma) {
    *out += IsFinalSigma(text, begin, end) ? "\u03C2" : "\u03C3";
  } else if (c == kDottedI) {
    *out += "i\u0307";
  } else {
    AppendUtf8(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)), out);
  }
}

template <typename Predicate>
std::string_view StripIf(std::string_view text, Side side, Predicate strip) {
  if (side != Side::kRight) {
    for (size_t at = 0; !text.empty(); at = 0) {
      if (!strip(NextCodePoint(text, &at))) break;
      text.remove_prefix(at);
    }
  }
  if (side != Side::kLeft) {
    while (!text.empty()) {
      const size_t last = PreviousCodePoint(text, text.size());
      size_t at = last;
      if (!strip(NextCodePoint(text, &at))) break;
      text = text.substr(0, last);
    }
  }
  return text;
}

template <typename Predicate>
bool AllAre(std::string_view text, Predicate predicate) {
  for (size_t at = 0; at < text.size();) {
    if (!predicate(NextCodePoint(text, &at))) return false;
  }
  return !text.empty();
}

// At least one cased character, and every one of them as `wanted` says.
template <typename Predicate>
bool CasedAre(std::string_view text, Predicate wanted) {
  bool any = false;
  for (size_t at = 0; at < text.size();) {
    const char32_t c = NextCodePoint(text, &at);
    if (!IsCased(c)) continue;
    if (!wanted(c)) return false;
    any = true;
  }
  return any;
}

bool IsTitleCased(std::string_view text) {
  bool any = false, in_word = false;
  for (size_t at = 0; at < text.size();) {
    const char32_t c = NextCodePoint(text, &at);
    if (IsUpperPoint(c) || IsTitlePoint(c)) {
      if (in_word) return false;
      in_word = any = true;
    } else if (IsLowerPoint(c)) {
      if (!in_word) return false;
      any = true;
    } else {
      in_word = false;
    }
  }
  return any;
}

// str.splitlines knows more line ends than "\n".
bool IsLineEnd(char32_t c) {
  return Between(c, 0xA, 0xD) || Between(c, 0x1C, 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
}

}  // namespace

bool IsSpace(char32_t c) { return IsWhiteSpace(c) || Between(c, 0x1C, 0x1F); }

bool IsPrintable(char32_t c) {
  if (c == ' ') return true;
  switch (CategoryOf(c)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
      return false;
    default:
      return true;
  }
}

bool IsIdentifierStart(char32_t c) {
  return c == '_' || IsLetter(c) || CategoryOf(c) == UTF8PROC_CATEGORY_NL;
}

bool IsIdentifierPart(char32_t c) {
  if (IsIdentifierStart(c)) return true;
  switch (CategoryOf(c)) {
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return c == 0xB7;
  }
}

std::string_view StripSpace(std::string_view text, Side side) {
  return StripIf(text, side, IsSpace);
}

std::string_view StripSpace(std::string_view text) { return StripSpace(text, Side::kBoth); }

std::string_view Strip(std::string_view text, std::string_view set, Side side) {
  std::u32string members;
  for (size_t at = 0; at < set.size();) members += NextCodePoint(set, &at);
  std::ranges::sort(members);
  return StripIf(text, side, [&](char32_t c) { return std::ranges::binary_search(members, c); });
}

size_t ByteOffset(std::string_view text, size_t index, bool ascii) {
  if (ascii) return index;
  size_t at = 0;
  for (; index > 0; --index) NextCodePoint(text, &at);
  return at;
}

std::string Upper(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) AppendUpper(NextCodePoint(text, &at), &out);
  return out;
}

std::string Lower(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const char32_t c = NextCodePoint(text, &at);
    AppendLower(c, text, begin, at, &out);
  }
  return out;
}

std::string Capitalize(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const char32_t c = NextCodePoint(text, &at);
    if (begin == 0) {
      AppendTitle(c, &out);
    } else {
      AppendLower(c, text, begin, at, &out);
    }
  }
  return out;
}

std::string Title(std::string_view text) {
  std::string out;
  bool in_word = false;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const char32_t c = NextCodePoint(text, &at);
    if (in_word) {
      AppendLower(c, text, begin, at, &out);
    } else {
      AppendTitle(c, &out);
    }
    in_word = IsCased(c);
  }
  return out;
}

std::string SwapCase(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const char32_t c = NextCodePoint(text, &at);
    if (IsUpperPoint(c)) {
      AppendLower(c, text, begin, at, &out);
    } else if (IsLowerPoint(c)) {
      AppendUpper(c, &out);
    } else {
      AppendUtf8(c, &out);
    }
  }
  return out;
}

std::string CaseFold(std::string_view text) {
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_CASEFOLD | UTF8PROC_STABLE);
  constexpr int kLongest = 4;
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const auto c = static_cast<utf8proc_int32_t>(NextCodePoint(text, &at));
    utf8proc_int32_t folded[kLongest] = {c};
    int boundary = 0;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(c, folded, kLongest, kOptions, &boundary);
    for (utf8proc_ssize_t i = 0; i < std::clamp<utf8proc_ssize_t>(count, 1, kLongest); ++i) {
      AppendUtf8(folded[i], &out);
    }
  }
  return out;
}

bool IsAll(TextClass what, std::string_view text) {
  switch (what) {
    case TextClass::kAlnum:
      return AllAre(text, [](char32_t c) { return IsLetter(c) || IsDigit(c) || IsNumeric(c); });
    case TextClass::kAlpha:
      return AllAre(text, IsLetter);
    case TextClass::kAscii:
      return std::ranges::all_of(text, [](char c) { return (c & 0x80) == 0; });
    case TextClass::kDecimal:
      return AllAre(text, IsDecimal);
    case TextClass::kDigit:
      return AllAre(text, IsDigit);
    case TextClass::kIdentifier: {
      size_t at = 0;
      return !text.empty() && IsIdentifierStart(NextCodePoint(text, &at)) &&
             AllAre(text, IsIdentifierPart);
    }
    case TextClass::kLower:
      return CasedAre(text, IsLowerPoint);
    case TextClass::kNumeric:
      return AllAre(text, IsNumeric);
    case TextClass::kPrintable:
      return text.empty() || AllAre(text, IsPrintable);
    case TextClass::kSpace:
      return AllAre(text, IsSpace);
    case TextClass::kTitle:
      return IsTitleCased(text);
    case TextClass::kUpper:
      return CasedAre(text, IsUpperPoint);
  }
  return false;
}

std::vector<std::string_view> SplitSpace(std::string_view text, int64_t most) {
  std::vector<std::string_view> parts;
  for (text = StripSpace(text, Side::kLeft); !text.empty();) {
    if (most != kAll && most >= 0 && static_cast<int64_t>(parts.size()) == most) {
      parts.push_back(text);
      break;
    }
    size_t end = 0, next = 0;
    while (end < text.size() && !IsSpace(NextCodePoint(text, &next))) end = next;
    parts.push_back(text.substr(0, end));
    text = StripSpace(text.substr(end), Side::kLeft);
  }
  return parts;
}

std::vector<std::string_view> SplitSpaceFromRight(std::string_view text, int64_t most) {
  std::vector<std::string_view> parts;
  for (text = StripSpace(text, Side::kRight); !text.empty();) {
    if (most >= 0 && static_cast<int64_t>(parts.size()) == most) {
      parts.push_back(text);
      break;
    }
    size_t begin = text.size();
    while (begin > 0) {
      const size_t before = PreviousCodePoint(text, begin);
      size_t at = before;
      if (IsSpace(NextCodePoint(text, &at))) break;
      begin = before;
    }
    parts.push_back(text.substr(begin));
    text = StripSpace(text.substr(0, begin), Side::kRight);
  }
  std::ranges::reverse(parts);
  return parts;
}

size_t Find(std::string_view text, std::string_view part, size_t from) {
  if (from > text.size()) return text.npos;
  // glibc's is the two-way algorithm.
  const void* at = memmem(text.data() + from, text.size() - from, part.data(), part.size());
  return at ? static_cast<const char*>(at) - text.data() : text.npos;
}

size_t FindFromRight(std::string_view text, std::string_view part) {
  const std::string backwards(text.rbegin(), text.rend()),
      part_backwards(part.rbegin(), part.rend());
  const size_t at = Find(backwards, part_backwards);
  return at == text.npos ? at : text.size() - at - part.size();
}

std::vector<std::string_view> Split(std::string_view text, std::string_view separator,
                                    int64_t most) {
  std::vector<std::string_view> parts;
  while (most < 0 || static_cast<int64_t>(parts.size()) < most) {
    const size_t at = Find(text, separator);
    if (at == text.npos) break;
    parts.push_back(text.substr(0, at));
    text.remove_prefix(at + separator.size());
  }
  parts.push_back(text);
  return parts;
}

std::vector<std::string_view> SplitFromRight(std::string_view text, std::string_view separator,
                                             int64_t most) {
  std::vector<std::string_view> parts;
  const std::string backwards(text.rbegin(), text.rend());
  const std::string separator_backwards(separator.rbegin(), separator.rend());
  size_t done = 0;  // bytes, from the right
  while (most < 0 || static_cast<int64_t>(parts.size()) < most) {
    const size_t at = Find(backwards, separator_backwards, done);
    if (at == text.npos) break;
    parts.push_back(text.substr(text.size() - at, at - done));
    done = at + separator.size();
  }
  parts.push_back(text.substr(0, text.size() - done));
  std::ranges::reverse(parts);
  return parts;
}

std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = at;
    const char32_t c = NextCodePoint(text, &at);
    if (!IsLineEnd(c)) continue;
    if (c == '\r' && at < text.size() && text[at] == '\n') ++at;
    lines.push_back(text.substr(begin, (keep_ends ? at : end) - begin));
    begin = at;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

size_t Count(std::string_view text, std::string_view part) {
  if (part.empty()) {
    return 1 + std::ranges::count_if(text, [](char c) { return (c & 0xC0) != 0x80; });
  }
  size_t count = 0;
  for (size_t at = Find(text, part); at != text.npos; at = Find(text, part, at + part.size())) {
    ++count;
  }
  return count;
}

size_t ReplacedSize(std::string_view text, std::string_view from, std::string_view to,
                    int64_t most) {
  size_t count = Count(text, from);
  if (most >= 0) count = std::min(count, static_cast<size_t>(most));
  return text.size() - count * from.size() + count * to.size();
}

std::string Replace(std::string_view text, std::string_view from, std::string_view to,
                    int64_t most) {
  std::string out;
  if (from.empty()) {
    size_t at = 0;
    for (int64_t done = 0; most < 0 || done < most; ++done) {
      out += to;
      if (at == text.size()) return out;
      const size_t begin = at;
      NextCodePoint(text, &at);
      out += text.substr(begin, at - begin);
    }
    return out.append(text.substr(at));
  }
  size_t begin = 0;
  for (int64_t done = 0; most < 0 || done < most; ++done) {
    const size_t at = Find(text, from, begin);
    if (at == text.npos) break;
    out += text.substr(begin, at - begin);
    out += to;
    begin = at + from.size();
  }
  return out.append(text.substr(begin));
}

void AppendRepr(std::string_view text, std::string* out) {
  const bool has_single = text.find('\'') != text.npos;
  const char quote = has_single && text.find('"') == text.npos ? '"' : '\'';
  out->push_back(quote);
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const char32_t c = NextCodePoint(text, &at);
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      *out += '\\';
      *out += static_cast<char>(c);
    } else if (c == '\n') {
      *out += "\\n";
    } else if (c == '\r') {
      *out += "\\r";
    } else if (c == '\t') {
      *out += "\\t";
    } else if (IsPrintable(c)) {
      out->append(text.substr(begin, at - begin));
    } else {
      const uint32_t number = c;
      *out += c < 0x100     ? fmt::format("\\x{:02x}", number)
              : c < 0x10000 ? fmt::format("\\u{:04x}", number)
                            : fmt::format("\\U{:08x}", number);
    }
  }
  out->push_back(quote);
}

}  // namespace octavo::jinja
