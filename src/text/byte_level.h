// The byte-level alphabet of GPT-2: every byte has a printable character, so that a vocabulary of
// strings can hold arbitrary bytes. Printable Latin-1 bytes stand for themselves, the other 68
// follow from U+0100 on.
#pragma once

#include <array>
#include <cstdint>

namespace octavo {

class ByteAlphabet {
 public:
  static constexpr char32_t kEnd = 0x100 + 68;  // all characters lie below

  constexpr ByteAlphabet() {
    byte_of_.fill(-1);
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
      char_of_[byte] = static_cast<char16_t>(printable ? byte : next++);
      byte_of_[char_of_[byte]] = static_cast<int16_t>(byte);
    }
  }

  constexpr char32_t CharOf(uint8_t byte) const { return char_of_[byte]; }
  // -1: the character is not in the alphabet.
  constexpr int ByteOf(char32_t character) const {
    return character < kEnd ? byte_of_[character] : -1;
  }

 private:
  std::array<char16_t, 256> char_of_{};
  std::array<int16_t, kEnd> byte_of_{};
};

inline constexpr ByteAlphabet kByteAlphabet;

}  // namespace octavo
