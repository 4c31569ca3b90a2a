#include "server/completion_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "base/error.h"

namespace octavo {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// `text` in random pieces of 1 to 7 bytes.
std::vector<std::string> Pieces(std::string_view text, std::mt19937& random) {
  std::vector<std::string> pieces;
  while (!text.empty()) {
    const size_t n = std::min<size_t>(text.size(), 1 + random() % 7);
    pieces.emplace_back(text.substr(0, n));
    text.remove_prefix(n);
  }
  return pieces;
}

TEST(SseReaderTest, PiecesOfAnySizeGiveTheSameEvents) {
  const std::string unix_text =
      ": a comment\n\ndata: one\n\nevent: x\ndata:two\ndata:  three\nid: 7\n\ndata\n\ndata:\n\n"
      "data: {\"a\": \"é\"}\n\ndata: not complete\n";
  const std::vector<std::string> expected = {"one", "two\n three", "", "{\"a\": \"é\"}"};
  std::mt19937 random(std::random_device{}());
  for (const char* line_end : {"\n", "\r\n", "\r"}) {
    std::string text;
    for (const char c : unix_text) c == '\n' ? text += line_end : text += c;
    EXPECT_EQ(SseReader().Push(text), expected);
    for (int round = 0; round < 50; ++round) {
      SseReader reader;
      std::vector<std::string> events;
      for (const std::string& piece : Pieces(text, random)) {
        for (const std::string& event : reader.Push(piece)) events.push_back(event);
      }
      EXPECT_EQ(events, expected);
    }
  }
}

TEST(SseReaderTest, AnEventWithoutEndIsRefused) {
  SseReader line, lines;
  EXPECT_THROW(line.Push("data: " + std::string(2 << 20, 'x')), Error);
  EXPECT_THROW(
      {
        for (int i = 0; i < 3 << 10; ++i) lines.Push("data: " + std::string(1 << 10, 'x') + "\n");
      },
      Error);
}

std::string Event(const std::string& json) { return "data: " + json + "\n\n"; }

TEST(CompletionStreamTest, TokensOfACompletion) {
  CompletionStream stream;
  stream.Push(Event(R"({"choices": [{"text": "a", "finish_reason": null}], "usage": null})"), 1);
  stream.Push(Event(R"({"choices": [{"text": "", "finish_reason": null}]})"), 2);
  stream.Push(Event(R"({"choices": [{"text": "b", "finish_reason": "stop"}]})") +
                  Event(R"({"choices": [{"text": "", "finish_reason": "stop"}]})"),
              3);
  EXPECT_FALSE(stream.done());
  EXPECT_FALSE(stream.completion_tokens());
  stream.Push(Event(R"({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})") +
                  Event("[DONE]"),
              4);
  EXPECT_TRUE(stream.done());
  EXPECT_EQ(stream.text(), "ab");
  EXPECT_THAT(stream.times(), ElementsAre(1, 2, 3));
  EXPECT_EQ(stream.prompt_tokens(), 5);
  EXPECT_EQ(stream.completion_tokens(), 4);
}

TEST(CompletionStreamTest, TheBeginningOfAChatIsNoToken) {
  CompletionStream stream;
  stream.Push(Event(R"({"choices": [{"delta": {"role": "assistant", "content": ""}}]})"), 1);
  stream.Push(Event(R"({"choices": [{"delta": {"reasoning_content": "hm"}}]})"), 2);
  stream.Push(Event(R"({"choices": [{"delta": {"content": "hi"}, "finish_reason": null}]})"), 3);
  stream.Push(Event(R"({"choices": [{"delta": {}, "finish_reason": "stop"}]})"), 4);
  EXPECT_EQ(stream.text(), "hmhi");
  EXPECT_THAT(stream.times(), ElementsAre(2, 3));
}

TEST(CompletionStreamTest, WhatIsNoAnswerIsAnError) {
  const auto message = [](const std::string& data) -> std::string {
    try {
      CompletionStream().Push(Event(data), 0);
    } catch (const Error& error) {
      return error.message();
    }
    return "no error";
  };
  EXPECT_EQ(message(R"({"error": {"message": "out of pages", "code": 500}})"), "'out of pages'");
  EXPECT_EQ(message(R"({"error": "short"})"), "'short'");
  EXPECT_THAT(message("{nonsense"), HasSubstr("not valid JSON"));
  EXPECT_THAT(message("[1]"), HasSubstr("[1]"));
  // Odd, but nothing of it is read.
  for (const char* odd : {R"({"choices": [7]})", R"({"choices": {}})", R"({"usage": 3})",
                          R"({"choices": [], "usage": {"prompt_tokens": "many"}})"}) {
    EXPECT_EQ(message(odd), "no error") << odd;
  }
}

TEST(ErrorMessageTest, TheServersOwnWords) {
  EXPECT_EQ(ErrorMessage(R"({"error": {"message": "no"}})"), "'no'");
  EXPECT_EQ(ErrorMessage(R"({"message": "old\n"})"), R"('old\x0a')");
  EXPECT_EQ(ErrorMessage(R"({"error": {}})"), R"('{"error": {}}')");
  EXPECT_EQ(ErrorMessage("<html>"), "'<html>'");
}

}  // namespace
}  // namespace octavo
