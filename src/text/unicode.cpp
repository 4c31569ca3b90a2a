#include "text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <span>
#include <vector>

#include "base/error.h"

namespace octavo {
namespace {

// What may follow a lead byte: how many continuation bytes, and the range of the first of them (the
// ranges exclude overlong forms, surrogates and what lies above U+10FFFF). length 0: not a lead
// byte.
struct Lead {
  int length;
  uint8_t low, high;
};

Lead LeadOf(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte >= 0xC2 && byte <= 0xDF) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// Below U+0300 there are no combining marks and nothing that composition changes.
constexpr char32_t kFirstCombining = 0x300;

// Hugging Face normalises by Unicode 9, utf8proc 2.8 by Unicode 15: these characters have a
// combining class or a decomposition in the one only. Left alone, the two agree on all others.
struct CodePointRange {
  utf8proc_int32_t first, last;
};
constexpr CodePointRange kAfterUnicode9[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
    {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},
    {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785}, {0x10787, 0x107B0},
    {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11938, 0x11938}, {0x1193D, 0x1193E},
    {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
    {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E030, 0x1E06D}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
    {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}};

// A character that neither changes nor combines with its neighbours.
bool IsInert(utf8proc_int32_t code_point) {
  const auto range =
      std::ranges::lower_bound(kAfterUnicode9, code_point, {}, &CodePointRange::last);
  return range != std::end(kAfterUnicode9) && range->first <= code_point;
}

bool AllBelow(std::string_view text, char32_t limit) {
  for (size_t at = 0; at < text.size();) {
    if (NextCodePoint(text, &at) >= limit) return false;
  }
  return true;
}

int CombiningClass(utf8proc_int32_t code_point) {
  const int value = utf8proc_get_property(code_point)->combining_class;
  return value != 0 && IsInert(code_point) ? 0 : value;
}

// Marks after one base are put in the order of their classes. utf8proc_decompose does this too, but
// in quadratic time, and a text may hold a million marks.
void SortMarks(std::vector<utf8proc_int32_t>* points) {
  for (size_t begin = 0; begin < points->size();) {
    if (CombiningClass((*points)[begin]) == 0) {
      ++begin;
      continue;
    }
    size_t end = begin + 1;
    while (end < points->size() && CombiningClass((*points)[end]) != 0) ++end;
    std::stable_sort(points->begin() + begin, points->begin() + end,
                     [](auto a, auto b) { return CombiningClass(a) < CombiningClass(b); });
    begin = end;
  }
}

// utf8proc swallows this one after a Hangul syllable; in truth it composes with nothing.
constexpr utf8proc_int32_t kHangulTrailingBase = 0x11A7;

bool EndsComposition(utf8proc_int32_t code_point) {
  return code_point == kHangulTrailingBase || IsInert(code_point);
}

// Composes in place, between the characters that end composition, and returns the new size.
size_t Compose(std::vector<utf8proc_int32_t>* points) {
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
  size_t written = 0;
  for (size_t begin = 0; begin < points->size();) {
    const auto barrier = std::find_if(points->begin() + begin, points->end(), EndsComposition);
    const size_t end = barrier - points->begin();
    const utf8proc_ssize_t size =
        utf8proc_normalize_utf32(points->data() + begin, end - begin, kOptions);
    OCTAVO_CHECK(size >= 0, size);
    std::copy_n(points->begin() + begin, size, points->begin() + written);
    written += size;
    if (end < points->size()) (*points)[written++] = *barrier;
    begin = end + 1;
  }
  return written;
}

}  // namespace

size_t ValidUtf8Length(std::string_view bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    const Lead lead = LeadOf(bytes[at]);
    if (lead.length == 0 || at + lead.length > bytes.size()) return at;
    for (int i = 1; i < lead.length; ++i) {
      const uint8_t byte = bytes[at + i];
      const bool first = i == 1;
      if (byte < (first ? lead.low : 0x80) || byte > (first ? lead.high : 0xBF)) return at;
    }
    at += lead.length;
  }
  return at;
}

bool IsUtf8Beginning(std::string_view bytes) {
  if (bytes.empty()) return true;
  const Lead lead = LeadOf(bytes[0]);
  if (bytes.size() >= static_cast<size_t>(lead.length)) return false;
  for (size_t i = 1; i < bytes.size(); ++i) {
    const uint8_t byte = bytes[i];
    if (byte < (i == 1 ? lead.low : 0x80) || byte > (i == 1 ? lead.high : 0xBF)) return false;
  }
  return true;
}

char32_t NextCodePoint(std::string_view text, size_t* at) {
  const uint8_t lead = text[(*at)++];
  if (lead < 0x80) return lead;
  const int extra = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  char32_t point = lead & (0x3F >> extra);
  for (int i = 0; i < extra; ++i) point = point << 6 | (text[(*at)++] & 0x3F);
  return point;
}

size_t PreviousCodePoint(std::string_view text, size_t at) {
  do {
    --at;
  } while (at > 0 && (text[at] & 0xC0) == 0x80);
  return at;
}

void AppendUtf8(char32_t code_point, std::string* out) {
  if (code_point < 0x80) {
    out->push_back(static_cast<char>(code_point));
  } else if (code_point < 0x800) {
    out->push_back(static_cast<char>(0xC0 | code_point >> 6));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  } else if (code_point < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | code_point >> 12));
    out->push_back(static_cast<char>(0x80 | (code_point >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | code_point >> 18));
    out->push_back(static_cast<char>(0x80 | (code_point >> 12 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code_point >> 6 & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  }
}

bool IsWhiteSpace(char32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

std::string Normalize(std::string_view text, NormalForm form) {
  // Latin-1 has compatibility forms and decompositions, so only NFC may skip more than ASCII.
  if (AllBelow(text, form == NormalForm::kNfc ? kFirstCombining : 0x80)) return std::string(text);

  const bool compatible = form == NormalForm::kNfkc || form == NormalForm::kNfkd;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE |
                                                      (compatible ? UTF8PROC_COMPAT : 0));
  constexpr int kLongestDecomposition = 32;  // 18 in Unicode 15 (U+FDFA)
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const auto point = static_cast<utf8proc_int32_t>(NextCodePoint(text, &at));
    if (IsInert(point)) {
      points.push_back(point);
      continue;
    }
    utf8proc_int32_t parts[kLongestDecomposition];
    int boundary = 0;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(point, parts, kLongestDecomposition, options, &boundary);
    OCTAVO_CHECK(count >= 0 && count <= kLongestDecomposition, point, count);
    points.insert(points.end(), parts, parts + count);
  }
  SortMarks(&points);
  size_t size = points.size();
  if (form == NormalForm::kNfc || form == NormalForm::kNfkc) size = Compose(&points);

  std::string out;
  out.reserve(text.size());
  for (utf8proc_int32_t point : std::span(points).first(size)) AppendUtf8(point, &out);
  return out;
}

std::string Lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const char32_t point = NextCodePoint(text, &at);
    if (point == 0x130) {  // İ is the only one whose lower case is two code points
      out += "i\u0307";
    } else {
      AppendUtf8(utf8proc_tolower(static_cast<utf8proc_int32_t>(point)), &out);
    }
  }
  return out;
}

void Utf8Assembler::Push(uint8_t byte, std::string* out) {
  if (missing_ > 0) {
    if (byte >= low_ && byte <= high_) {
      pending_[pending_size_++] = static_cast<char>(byte);
      low_ = 0x80;
      high_ = 0xBF;
      if (--missing_ == 0) {
        out->append(pending_, pending_size_);
        pending_size_ = 0;
      }
      return;
    }
    Finish(out);
  }
  const Lead lead = LeadOf(byte);
  if (lead.length == 0) {
    out->append(kReplacementCharacter);
  } else if (lead.length == 1) {
    out->push_back(static_cast<char>(byte));
  } else {
    pending_[0] = static_cast<char>(byte);
    pending_size_ = 1;
    missing_ = lead.length - 1;
    low_ = lead.low;
    high_ = lead.high;
  }
}

void Utf8Assembler::Finish(std::string* out) {
  if (missing_ > 0) out->append(kReplacementCharacter);
  pending_size_ = 0;
  missing_ = 0;
}

}  // namespace octavo
