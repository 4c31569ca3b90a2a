#include "server/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>

namespace octavo {
namespace {

TEST(StopMatcher, NothingOfAStopStringIsLetOut) {
  StopMatcher matcher({"END", "\n\n"});
  EXPECT_EQ(matcher.Push("a E"), "a ");
  EXPECT_EQ(matcher.Push("N"), "");
  EXPECT_EQ(matcher.Push("G\n"), "ENG");
  EXPECT_EQ(matcher.Push("b"), "\nb");
  EXPECT_EQ(matcher.Push("EN"), "");
  EXPECT_EQ(matcher.Push("D and more"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.Push("x") + matcher.Flush(), "");
}

TEST(StopMatcher, WhatOnlyBeganLikeOneComesInTheEnd) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.Push("the EN"), "the ");
  EXPECT_EQ(matcher.Flush(), "EN");
  EXPECT_EQ(matcher.Push("D"), "D");
  EXPECT_FALSE(matcher.stopped());
}

TEST(StopMatcher, MayIncludeIt) {
  StopMatcher matcher({"END"}, /*include=*/true);
  EXPECT_EQ(matcher.Push("a EN"), "a ");
  EXPECT_EQ(matcher.Push("Dx"), "END");
}

// However the text is cut, what comes out is what is before the first stop string.
TEST(StopMatcher, EqualsSearchingTheWholeText) {
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {
    std::string text;
    const unsigned letters = 2 + random() % 2;
    for (int i = 0; i < 20; ++i) text += static_cast<char>('a' + random() % letters);
    std::vector<std::string> stops(1 + random() % 2);
    for (std::string& stop : stops) {
      for (size_t n = 1 + random() % 7; n > 0; --n)
        stop += static_cast<char>('a' + random() % letters);
    }
    size_t first = std::string::npos;
    for (const std::string& stop : stops) first = std::min(first, text.find(stop));
    StopMatcher matcher(stops);
    std::string out;
    for (size_t begin = 0; begin < text.size() && !matcher.stopped();) {
      const size_t n = 1 + random() % 4;
      out += matcher.Push(std::string_view(text).substr(begin, n));
      begin += n;
    }
    out += matcher.Flush();
    ASSERT_EQ(matcher.stopped(), first != std::string::npos) << text;
    // A longer stop string that began earlier may end in a later piece, after a shorter one.
    if (stops.size() == 1) {
      ASSERT_EQ(out, text.substr(0, first)) << text << " " << stops[0];
    }
  }
}

}  // namespace
}  // namespace octavo
