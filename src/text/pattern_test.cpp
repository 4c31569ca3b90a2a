#include "text/pattern.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace octavo {
namespace {

std::vector<std::string> Found(const Pattern& pattern, std::string_view text) {
  std::vector<Match> matches;
  pattern.FindAll(text, &matches);
  std::vector<std::string> found;
  for (const Match& match : matches) {
    found.emplace_back(text.substr(match.begin, match.end - match.begin));
  }
  return found;
}

std::vector<std::string> Find(std::string_view regex, std::string_view text) {
  return Found(Pattern::Regex(regex, "test"), text);
}

using Strings = std::vector<std::string>;

TEST(Pattern, LiteralsDoNotOverlap) {
  EXPECT_EQ(Found(Pattern::Literal("aa", "test"), "aaaaa"), (Strings{"aa", "aa"}));
  EXPECT_EQ(Found(Pattern::Literal(".", "test"), "a.b"), (Strings{"."}));
  EXPECT_THROW(Pattern::Literal("", "test"), Error);
}

TEST(Pattern, SpaceIsTheWhiteSpaceProperty) {
  EXPECT_EQ(Find(R"(\s)", "a\u00a0\u180e\u200b\u3000\u0085\x0b"),
            (Strings{"\u00a0", "\u3000", "\u0085", "\x0b"}));
  EXPECT_EQ(Find(R"([^\sa])", "a \u180e"), (Strings{"\u180e"}));
  EXPECT_EQ(Find(R"([\s\S]+)", "a \u180e"), (Strings{"a \u180e"}));
  EXPECT_EQ(Find(R"(\S+)", "ab \u180e"), (Strings{"ab", "\u180e"}));
}

TEST(Pattern, UnicodeClasses) {
  EXPECT_EQ(Find(R"(\p{L}+)", "a\u00e9\u4e2d1"), (Strings{"a\u00e9\u4e2d"}));
  EXPECT_EQ(Find(R"(\p{N}{1,3})", "1234\u0661"), (Strings{"123", "4\u0661"}));
  EXPECT_EQ(Find(R"([\x{212A}-\x{212C}]+)", "K\u212a\u212b"), (Strings{"\u212a\u212b"}));
  EXPECT_EQ(Find(R"((?i:'s))", "'S'\u017f"), (Strings{"'S", "'\u017f"}));
  EXPECT_EQ(Find(R"(\w+)", "a\u0301_\u00b2-"), (Strings{"a\u0301_\u00b2"}));
  // A script, not its extensions: U+3001 is shared by Han and others.
  EXPECT_EQ(Find(R"(\p{Han}+)", "\u4e2d\u3001"), (Strings{"\u4e2d"}));
}

TEST(Pattern, LinesAndEmptyMatches) {
  EXPECT_EQ(Find(R"( +$)", "a \n b  "), (Strings{" ", "  "}));
  EXPECT_EQ(Find("^b", "a\nb"), (Strings{"b"}));
  EXPECT_EQ(Find("x*", "axxb"), (Strings{"", "xx", ""}));
}

TEST(Pattern, RewritesWhatPcre2SpellsDifferently) {
  EXPECT_EQ(TranslateOniguruma(R"(a{,3}\h\u00e9)", "t"), R"(a{0,3}[0-9a-fA-F]\x{00e9})");
  EXPECT_EQ(TranslateOniguruma(R"(\p{^Lu}\P{Greek})", "t"), R"(\P{Lu}\P{sc:Greek})");
  EXPECT_EQ(TranslateOniguruma("(?i)a|b", "t"), "(?i)a|b");
}

TEST(Pattern, RefusesWhatMeansSomethingElse) {
  for (const char* regex :
       {R"(a\b)",         R"(\R)",      R"(\K)",     R"((a)\1)",     R"([a&&b])",  R"([a[bc]])",
        R"([[:alpha:]])", R"((?<n>a))", R"((?m:.))", R"(a(?i)b)",    R"(a{1,3}+)", R"(a{3}?)",
        R"(a{)",          R"(\pL)",     R"(\p{L)",   R"([a)",        R"([])",      "\\",
        R"(\xe9)",        R"(\u12)",    R"((?#c))",  R"((*ACCEPT))", R"([\W])"}) {
    try {
      Pattern::Regex(regex, "the place");
      ADD_FAILURE() << regex << " was not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported) << regex;
      EXPECT_TRUE(error.message().starts_with("the place: expected ")) << error.message();
      EXPECT_EQ(error.message().find('\n'), std::string::npos);
    }
  }
  for (const char* regex : {"(a", "a)", "*", "[b-a]", R"(\p{Nonsense})"}) {
    EXPECT_THROW(Pattern::Regex(regex, "t"), Error) << regex;
  }
}

TEST(Pattern, GivesUpInsteadOfHanging) {
  const Pattern pattern = Pattern::Regex("(?:a+)+b", "test");
  std::vector<Match> matches;
  EXPECT_THROW(pattern.FindAll(std::string(60, 'a') + "cb", &matches), Error);
}

TEST(Pattern, DeepNestingIsAnError) {
  EXPECT_THROW(Pattern::Regex(std::string(100'000, '(') + std::string(100'000, ')'), "t"), Error);
}

}  // namespace
}  // namespace octavo
