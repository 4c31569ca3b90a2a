#include "io/json.h"

#include <string>

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "io/testing.h"

namespace octavo {
namespace {

std::string Message(std::string_view text, const JsonLimits& limits = {}) {
  return ErrorMessage([&] { ParseJson(text, "file.json", limits); });
}

TEST(Json, ReadsWhatIsValid) {
  const Json json = ParseJson(R"( {"a": [1, 2.5, null, true], "b": {"a": "\u00e9"}} )", "x");
  EXPECT_EQ(json["a"].size(), 4u);
  EXPECT_EQ(json["b"]["a"], "\xc3\xa9");
}

TEST(Json, RefusesWithSourceAndReason) {
  struct Case {
    std::string text, reason;
  };
  const Case cases[] = {
      {"", "unexpected end of input"},
      {"{", "end of input"},
      {"[1, 2", "end of input"},
      {"{} {}", "column 4"},
      {"{'a': 1}", "column 2"},
      {R"({"a": NaN})", "invalid literal, behind the key 'a'"},
      {R"({"a": -Infinity})", "column"},
      {R"({"a": 1e999})", "number overflow"},
      {"\"\xff\xfe\"", "ill-formed UTF-8"},
      {"\"\xc0\xaf\"", "ill-formed UTF-8"},
      {"\"\xed\xa0\x80\"", "ill-formed UTF-8"},
      {"\"\\ud800\"", "surrogate"},
      {std::string("{\"a\0\": 1}", 9), "control character"},
      {R"({"a": 1, "a": 2})", "'a' is given twice"},
      {R"([{"x": {"k": 1, "k": 1}}])", "'k' is given twice"},
  };
  for (const Case& c : cases) {
    const std::string message = Message(c.text);
    EXPECT_TRUE(message.starts_with("file.json: ")) << c.text << " -> " << message;
    EXPECT_NE(message.find(c.reason), message.npos) << c.text << " -> " << message;
    EXPECT_EQ(message.find('\n'), message.npos) << message;
    EXPECT_LT(message.size(), 300u) << message;
  }
}

TEST(Json, SameKeyInDifferentObjectsIsFine) {
  EXPECT_EQ(Message(R"([{"a": 1}, {"a": {"a": 2}}])"), "");
}

TEST(Json, DepthIsLimitedBeforeItHurts) {
  const std::string arrays(200000, '[');
  EXPECT_NE(Message(arrays).find("nested deeper than 64"), std::string::npos);
  std::string objects;
  for (int i = 0; i < 200000; ++i) objects += "{\"a\":";
  EXPECT_NE(Message(objects).find("nested deeper than 64"), std::string::npos);
  EXPECT_EQ(Message(std::string(64, '[') + std::string(64, ']')), "");
  EXPECT_NE(Message(std::string(65, '[') + std::string(65, ']')), "");
}

// Work for each that grows with how many there are would take minutes.
TEST(Json, ManySmallValuesTakeTheirLength) {
  constexpr size_t kMany = 1 << 20;
  std::string text = "[{}";
  for (size_t i = 1; i < kMany; ++i) text += ",{}";
  EXPECT_EQ(ParseJson(text + "]", "test").size(), kMany);
}

TEST(Json, SizeIsLimited) {
  EXPECT_NE(Message("[1, 2, 3]", {.max_bytes = 8}).find("9 bytes"), std::string::npos);
}

TEST(Json, LongTokensDoNotReachTheMessage) {
  const std::string message = Message(std::string("{\"").append(100000, 'x') += '\xff');
  EXPECT_LT(message.size(), 300u);
  EXPECT_LT(Message(std::string("[").append(100000, '1') += ']').size(), 300u);
}

TEST(Json, FilesThatAreNone) {
  const TempFolder folder;
  EXPECT_NE(ErrorMessage([&] {
              ReadJsonFile(folder.path() / "none.json");
            }).find("none.json: cannot open"),
            std::string::npos);
  EXPECT_NE(ErrorMessage([&] { ReadJsonFile(folder.path()); }).find("not a regular file"),
            std::string::npos);
  ASSERT_EQ(mkfifo((folder.path() / "fifo").c_str(), 0600), 0);
  EXPECT_NE(ErrorMessage([&] { ReadJsonFile(folder.path() / "fifo"); }).find("not a regular file"),
            std::string::npos);
  EXPECT_NE(ErrorMessage([&] {
              ReadJsonFile(folder.Write("empty.json", ""));
            }).find("empty.json: not valid JSON"),
            std::string::npos);
}

TEST(Json, QuoteKeepsMessagesOnOneLine) {
  EXPECT_EQ(Quote("a\n\x1b[31m\xff"), "'a\\x0a\\x1b[31m\\xff'");
  EXPECT_EQ(Quote(std::string(200, 'a')).size(), 125u);
}

}  // namespace
}  // namespace octavo
