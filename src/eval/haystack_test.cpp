#include "eval/haystack.h"

#include <set>

#include <gtest/gtest.h>

#include "base/error.h"
#include "text/unicode.h"

namespace octavo {
namespace {

uint64_t Fnv1a(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

std::string Sentence(const Needle& needle) {
  return "The code of " + needle.key + " is " + needle.value + ".";
}

// The hashes are those of tools/needle/haystack.py: two readers of one grammar, the same bytes.
TEST(HaystackTest, WritesTheBytesOfThePythonReader) {
  const HaystackGenerator generator({});
  const Haystack haystack = generator.Make(4000, 8, 1);
  EXPECT_EQ(haystack.text.size(), 4000u);
  EXPECT_EQ(Fnv1a(haystack.text), 0xf8590d0eb1d323f9u) << haystack.text;
  EXPECT_EQ(haystack.needles[0].key, "mauve rudder");
  EXPECT_EQ(haystack.Question(0), "\nQuestion: what is the code of mauve rudder?\nAnswer: ");
  EXPECT_EQ(haystack.Answer(0), "944785.");
  EXPECT_EQ(Fnv1a(generator.Make(100000, 8, 12345678901).text), 0xdf674f9eef40fc3cu);
}

TEST(HaystackTest, WritesTheBytesOfThePythonReaderAroundAUsersText) {
  std::string filler = "Grüße. Ein Wort über 🙂 Möwen\nund mehr. ";
  for (int i = 0; i < 500; ++i) filler += "ä";
  const HaystackGenerator generator({.filler = filler + " Ende"});
  EXPECT_EQ(Fnv1a(generator.Make(1000, 3, 5).text), 0xfa93ee3ac7d085cau);
  // A cut inside a character leaves it out.
  EXPECT_EQ(generator.Make(1001, 3, 5).text.size(), 1000u);
  EXPECT_EQ(Fnv1a(generator.Make(1003, 3, 5).text), 0x859fff13b79ec949u);
}

TEST(HaystackTest, NeedlesStandAtEvenDepthsAndAreDistinct) {
  const HaystackGenerator generator({});
  for (const int count : {1, 8, 256}) {
    const Haystack haystack = generator.Make(60000, count, 7);
    ASSERT_EQ(haystack.needles.size(), static_cast<size_t>(count));
    std::set<std::string> keys;
    for (int i = 0; i < count; ++i) {
      const Needle& needle = haystack.needles[i];
      keys.insert(needle.key);
      const size_t at = haystack.text.find(Sentence(needle));
      ASSERT_NE(at, std::string::npos) << needle.key;
      EXPECT_NEAR(needle.depth, (i + 0.5) / count, 0.01);
      EXPECT_DOUBLE_EQ(needle.depth, at / 60000.0);
    }
    EXPECT_EQ(keys.size(), static_cast<size_t>(count));
  }
}

TEST(HaystackTest, EveryCutOfAUsersTextIsUtf8AndKeepsTheNeedles) {
  const HaystackGenerator generator({.filler = "naïve 🙂🙂🙂 Wörter"});
  for (size_t bytes = 130; bytes < 400; ++bytes) {
    const Haystack haystack = generator.Make(bytes, 3, bytes);
    EXPECT_EQ(ValidUtf8Length(haystack.text), haystack.text.size());
    EXPECT_LE(haystack.text.size(), bytes);
    EXPECT_GE(haystack.text.size() + 3, bytes);
    for (const Needle& needle : haystack.needles) {
      EXPECT_NE(haystack.text.find(Sentence(needle)), std::string::npos);
    }
  }
}

TEST(HaystackTest, SeedsGiveDifferentTextAndTheSameSeedTheSame) {
  const HaystackGenerator generator({});
  EXPECT_EQ(generator.Make(2000, 8, 1).text, generator.Make(2000, 8, 1).text);
  EXPECT_NE(generator.Make(2000, 8, 1).text, generator.Make(2000, 8, 2).text);
}

TEST(HaystackTest, RefusesWhatCannotBe) {
  EXPECT_THROW(HaystackGenerator({.filler = "\xff"}), Error);
  const HaystackGenerator generator({});
  EXPECT_THROW(generator.Make(1000, 0, 1), Error);
  EXPECT_THROW(generator.Make(1000, 257, 1), Error);
  EXPECT_THROW(generator.Make(100, 8, 1), Error);
}

}  // namespace
}  // namespace octavo
