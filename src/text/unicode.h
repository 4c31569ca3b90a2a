// UTF-8 and the few Unicode properties that tokenizers need.
//
// Functions that take text expect valid UTF-8 unless they say otherwise: whoever lets bytes in
// checks them once with ValidUtf8Length. All functions are pure and may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace octavo {

// Length of the longest prefix of `bytes` (any bytes) that is valid UTF-8. Linear.
size_t ValidUtf8Length(std::string_view bytes);

// Whether `bytes` is empty or a part of one character that is not yet whole.
bool IsUtf8Beginning(std::string_view bytes);

// The code point that starts at text[*at]; moves *at past it.
char32_t NextCodePoint(std::string_view text, size_t* at);

// Where the code point that ends before text[at] starts; at > 0.
size_t PreviousCodePoint(std::string_view text, size_t at);

void AppendUtf8(char32_t code_point, std::string* out);

// The White_Space property: what \s means in Oniguruma and in Rust.
bool IsWhiteSpace(char32_t code_point);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

std::string Normalize(std::string_view text, NormalForm form);

// Per code point, without context: a capital sigma becomes σ everywhere.
std::string Lowercase(std::string_view text);

// Turns a stream of arbitrary bytes into valid UTF-8: a character leaves when its last byte has
// come, and each maximal part of a broken character becomes one U+FFFD, as in Rust's
// from_utf8_lossy.
class Utf8Assembler {
 public:
  void Push(uint8_t byte, std::string* out);
  // The end of the stream: an unfinished character becomes U+FFFD.
  void Finish(std::string* out);

 private:
  char pending_[4] = {};
  int pending_size_ = 0;
  int missing_ = 0;                   // bytes until the pending character is whole
  uint8_t low_ = 0x80, high_ = 0xBF;  // what the next continuation byte may be
};

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

}  // namespace octavo
