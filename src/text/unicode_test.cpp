#include "text/unicode.h"

#include <gtest/gtest.h>

#include <random>

namespace octavo {
namespace {

std::string Assemble(std::string_view bytes) {
  Utf8Assembler assembler;
  std::string out;
  for (char byte : bytes) assembler.Push(static_cast<uint8_t>(byte), &out);
  assembler.Finish(&out);
  return out;
}

TEST(Utf8, FindsTheFirstBadByte) {
  EXPECT_EQ(ValidUtf8Length(""), 0u);
  EXPECT_EQ(ValidUtf8Length("a\u00e9\u4e2d\U0001F600"), 10u);
  EXPECT_EQ(ValidUtf8Length("ab\xFF"), 2u);
  EXPECT_EQ(ValidUtf8Length("a\xE4\xB8"), 1u);         // unfinished
  EXPECT_EQ(ValidUtf8Length("\xC0\x80"), 0u);          // overlong
  EXPECT_EQ(ValidUtf8Length("\xED\xA0\x80"), 0u);      // surrogate
  EXPECT_EQ(ValidUtf8Length("\xF4\x90\x80\x80"), 0u);  // above U+10FFFF
  EXPECT_EQ(ValidUtf8Length("\xF0\x8F\xBF\xBF"), 0u);  // overlong
}

TEST(Utf8, EveryCodePointSurvives) {
  for (char32_t point = 0; point <= 0x10FFFF; ++point) {
    if (point >= 0xD800 && point < 0xE000) continue;
    std::string text;
    AppendUtf8(point, &text);
    ASSERT_EQ(ValidUtf8Length(text), text.size()) << static_cast<uint32_t>(point);
    size_t at = 0;
    ASSERT_EQ(NextCodePoint(text, &at), point);
    ASSERT_EQ(at, text.size());
    ASSERT_EQ(PreviousCodePoint(text, at), 0u);
    for (size_t cut = 1; cut < text.size(); ++cut) {
      ASSERT_TRUE(IsUtf8Beginning(std::string_view(text).substr(0, cut)))
          << static_cast<uint32_t>(point);
    }
    ASSERT_FALSE(IsUtf8Beginning(text));
    ASSERT_EQ(Assemble(text), text);
  }
}

TEST(Utf8Assembler, ReplacesEachBrokenPartOnce) {
  EXPECT_EQ(Assemble("a\xF0\x9F\x92z"), "a\uFFFDz");  // three bytes of one character
  EXPECT_EQ(Assemble("\xE4\xB8"), "\uFFFD");
  EXPECT_EQ(Assemble("\xFF\xFE"), "\uFFFD\uFFFD");
  EXPECT_EQ(Assemble("\xE0\x80\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(Assemble("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(Assemble("\xC3\xC3\xA9"), "\uFFFD\u00e9");
}

TEST(Utf8Assembler, NeverHoldsAWholeCharacter) {
  Utf8Assembler assembler;
  std::string out;
  for (char byte : std::string_view("\xE4\xB8")) assembler.Push(static_cast<uint8_t>(byte), &out);
  EXPECT_EQ(out, "");
  assembler.Push(0xAD, &out);
  EXPECT_EQ(out, "\u4e2d");
}

TEST(Normalize, Forms) {
  EXPECT_EQ(Normalize("e\u0301", NormalForm::kNfc), "\u00e9");
  EXPECT_EQ(Normalize("\u00e9", NormalForm::kNfd), "e\u0301");
  EXPECT_EQ(Normalize("\ufb01\u00bd\u2163", NormalForm::kNfkc), "fi1\u20442IV");
  EXPECT_EQ(Normalize("\ufb01", NormalForm::kNfc), "\ufb01");
  EXPECT_EQ(Normalize("\u00bd", NormalForm::kNfkd), "1\u20442");
  EXPECT_EQ(Normalize("e\u0302\u0323", NormalForm::kNfc), "\u1ec7");  // marks are sorted first
  EXPECT_EQ(Normalize("\u212a", NormalForm::kNfc), "K");
  EXPECT_EQ(Normalize("\u1100\u1161\u11a8", NormalForm::kNfc), "\uac01");
  EXPECT_EQ(Normalize("plain", NormalForm::kNfkd), "plain");
}

TEST(Normalize, KeepsTheHangulTrailingBase) {
  EXPECT_EQ(Normalize("\uac00\u11a7x", NormalForm::kNfc), "\uac00\u11a7x");
  EXPECT_EQ(Normalize("\u1100\u1161\u11a7\u11a8", NormalForm::kNfc), "\uac00\u11a7\u11a8");
}

TEST(Normalize, LeavesCharactersAfterUnicode9Alone) {
  EXPECT_EQ(Normalize("a\u0951\u0d3b", NormalForm::kNfd), "a\u0951\u0d3b");
  EXPECT_EQ(Normalize("\u32ff", NormalForm::kNfkc), "\u32ff");
}

TEST(Normalize, IsLinearInTheNumberOfMarks) {
  std::string marks = "a";
  for (int i = 0; i < 200'000; ++i) marks += i % 2 == 0 ? "\u0301" : "\u0323";
  const std::string sorted = Normalize(marks, NormalForm::kNfd);
  EXPECT_EQ(sorted.size(), marks.size());
  EXPECT_TRUE(sorted.starts_with("a\u0323\u0323"));
  EXPECT_TRUE(sorted.ends_with("\u0301\u0301"));
}

TEST(Lowercase, IsPerCharacter) {
  EXPECT_EQ(Lowercase("A\u00c9\u03a3\u0130\u1e9e"), "a\u00e9\u03c3i\u0307\u00df");
}

}  // namespace
}  // namespace octavo
