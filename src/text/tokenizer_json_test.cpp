// Files that are wrong, and what is said about them.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "text/tokenizer.h"

namespace octavo {
namespace {

constexpr const char* kModel =
    R"("model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]})";

std::string MessageFor(const std::string& json, ErrorCode code = ErrorCode::kInvalidArgument) {
  try {
    Tokenizer::FromJson(json, "t.json");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.message();
    EXPECT_EQ(error.message().find('\n'), std::string::npos);
    return error.message();
  }
  ADD_FAILURE() << "accepted: " << json.substr(0, 200);
  return {};
}

std::string MessageForMember(const std::string& member,
                             ErrorCode code = ErrorCode::kInvalidArgument) {
  return MessageFor("{" + member + ", " + kModel + "}", code);
}

std::string MessageForModel(const std::string& model,
                            ErrorCode code = ErrorCode::kInvalidArgument) {
  return MessageFor("{\"model\": {" + model + "}}", code);
}

TEST(TokenizerJson, NotJson) {
  const std::string good = std::string("{") + kModel + "}";
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_TRUE(MessageFor(good.substr(0, size)).starts_with("t.json: expected JSON, found "))
        << size;
  }
  MessageFor("{\"model\": \"\xFF\"}");
  MessageFor(good + "x");
  EXPECT_TRUE(MessageFor(std::string(200'000, '[')).starts_with("t.json: expected JSON, found "));
  EXPECT_EQ(
      MessageFor(std::string(200'000, '[') + std::string(200'000, ']')),
      "t.json: expected JSON, found 400000 bytes that are not: more than 64 levels of nesting");
  EXPECT_EQ(MessageFor("[1]"), "t.json: expected an object, found an array");
}

TEST(TokenizerJson, WrongTypes) {
  EXPECT_EQ(MessageFor("{}"), "t.json: model: expected a value, found none");
  EXPECT_EQ(MessageFor(R"({"model": 3})"), "t.json: model: expected an object, found 3");
  EXPECT_EQ(MessageForMember(R"("added_tokens": {})"),
            "t.json: added_tokens: expected an array, found an object");
  EXPECT_EQ(MessageForMember(R"("added_tokens": [{"id": "x", "content": "c"}])"),
            "t.json: added_tokens[0].id: expected a whole number from 0 to 4194303, found 'x'");
  EXPECT_EQ(MessageForMember(R"("added_tokens": [{"id": 7}])"),
            "t.json: added_tokens[0].content: expected a value, found none");
  EXPECT_EQ(MessageForMember(R"("added_tokens": [{"id": 7, "content": "c", "lstrip": 1}])"),
            "t.json: added_tokens[0].lstrip: expected true or false, found 1");
  EXPECT_EQ(MessageForMember(R"("added_tokens": [{"id": 1, "content": "c"}])"),
            "t.json: added_tokens: expected an id of its own for 'c', found 1, which is 'b'");
  EXPECT_EQ(MessageForMember(R"("normalizer": "NFC")"),
            "t.json: normalizer: expected an object, found 'NFC'");
  EXPECT_EQ(MessageForMember(R"("pre_tokenizer": {"type": "Digits"})"),
            "t.json: pre_tokenizer.individual_digits: expected a value, found none");
  EXPECT_EQ(
      MessageForMember(R"("decoder": {"type": "Strip", "content": "ab", "start": 0, "stop": 0})"),
      "t.json: decoder.content: expected one character, found 'ab'");
}

TEST(TokenizerJson, WrongModels) {
  EXPECT_EQ(MessageForModel(R"("vocab": [], "merges": [])"),
            "t.json: model.vocab: expected an object of ids by token, found an array");
  EXPECT_EQ(MessageForModel(R"("vocab": {}, "merges": [])"),
            "t.json: model.vocab: expected tokens, found none");
  EXPECT_EQ(MessageForModel(R"("vocab": {"a": -1}, "merges": [])"),
            "t.json: model.vocab['a']: expected a whole number from 0 to 4194303, found -1");
  EXPECT_EQ(
      MessageForModel(R"("vocab": {"a": 1e9}, "merges": [])"),
      "t.json: model.vocab['a']: expected a whole number from 0 to 4194303, found 1000000000");
  EXPECT_EQ(
      MessageForModel(R"("vocab": {"a": 0, "b": 0}, "merges": [])"),
      "t.json: model.vocab['b']: expected a token and an id that no other entry has, found 0");
  EXPECT_EQ(MessageForModel(R"("vocab": {"a": 0}, "merges": ["aa"])"),
            "t.json: model.merges[0]: expected two tokens, found 'aa'");
  EXPECT_EQ(MessageForModel(R"("vocab": {"a": 0}, "merges": [["a", 1]])"),
            "t.json: model.merges[0]: expected two tokens, found an array");
  EXPECT_EQ(
      MessageForModel(R"("vocab": {"a": 0}, "merges": ["a a"])"),
      "t.json: model.merges[0]: expected tokens of model.vocab, found 'aa', which is not one");
  EXPECT_EQ(MessageForModel(R"("vocab": {"a": 0}, "merges": [], "unk_token": "?")"),
            "t.json: model.unk_token: expected a token of model.vocab, found '?'");
}

TEST(TokenizerJson, UnsupportedComponentsAreNamed) {
  const auto refused = [](const std::string& message, const char* name) {
    EXPECT_NE(message.find(std::string("found '") + name + "'"), std::string::npos) << message;
  };
  constexpr ErrorCode kCode = ErrorCode::kUnsupported;
  for (const char* type : {"WordPiece", "Unigram", "WordLevel", "Other"}) {
    refused(
        MessageForModel(
            "\"type\": \"" + std::string(type) + R"(", "vocab": {"a": 0}, "merges": [])", kCode),
        type);
  }
  for (const char* type : {"BertNormalizer", "Precompiled", "Nmt", "StripAccents", "nfc"}) {
    refused(MessageForMember("\"normalizer\": {\"type\": \"" + std::string(type) + "\"}", kCode),
            type);
  }
  for (const char* type :
       {"BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit", "FixedLength"}) {
    refused(MessageForMember("\"pre_tokenizer\": {\"type\": \"" + std::string(type) + "\"}", kCode),
            type);
  }
  for (const char* type : {"WordPiece", "CTC", "BPEDecoder"}) {
    refused(MessageForMember("\"decoder\": {\"type\": \"" + std::string(type) + "\"}", kCode),
            type);
  }
  for (const char* type : {"BertProcessing", "RobertaProcessing"}) {
    refused(
        MessageForMember("\"post_processor\": {\"type\": \"" + std::string(type) + "\"}", kCode),
        type);
  }
  refused(MessageForMember("\"version\": \"2.0\"", kCode), "2.0");
  refused(
      MessageForModel(R"("vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>")", kCode),
      "</w>");
  MessageForModel(R"("vocab": {"a": 0}, "merges": [], "dropout": 0.1)", kCode);
  EXPECT_NE(
      MessageForMember(
          R"("decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteLevel"}]})",
          kCode)
          .find("ByteLevel after Fuse"),
      std::string::npos);
  EXPECT_NE(MessageForMember(R"("pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a\\b"},
                                 "behavior": "Isolated", "invert": false})",
                             kCode)
                .find("t.json: pre_tokenizer.pattern.Regex: expected a regular expression Octavo "
                      "can run, found \\b"),
            std::string::npos);
}

TEST(TokenizerJson, WrongTemplates) {
  const auto message = [](const char* single, ErrorCode code = ErrorCode::kInvalidArgument) {
    return MessageForMember(
        R"("post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens":
        {"B": {"ids": [77]}}, "single": )" +
            std::string(single) + "}",
        code);
  };
  message("[]", ErrorCode::kUnsupported);
  message(R"([{"Sequence": {"id": "B"}}])", ErrorCode::kUnsupported);
  EXPECT_EQ(message(R"([{"SpecialToken": {"id": "C"}}, {"Sequence": {"id": "A"}}])"),
            "t.json: post_processor.special_tokens.C: expected a value, found none");
  EXPECT_EQ(message(R"([{"SpecialToken": {"id": "B"}}, {"Sequence": {"id": "A"}}])"),
            "t.json: post_processor.special_tokens: expected ids of tokens, found 77");
}

class TokenizerFolder : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() /
              ("octavo_tokenizer_" + std::to_string(reinterpret_cast<uintptr_t>(this)));
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void Write(const char* name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
  }

  std::filesystem::path folder_;
};

TEST_F(TokenizerFolder, ConfigNamesTokensAndAddsSome) {
  Write("tokenizer.json",
        std::string("{") + kModel +
            R"(, "added_tokens": [{"id": 3, "content": "<s>", "special": true}]})");
  // model_max_length as transformers writes "no limit": larger than any integer.
  Write("tokenizer_config.json",
        R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null,
      "model_max_length": 1000000000000000019884624838656,
      "added_tokens_decoder": {"3": {"content": "<s>"}, "4": {"content": "</s>", "special": true}}})");
  const Tokenizer tokenizer = Tokenizer::FromFolder(folder_);
  EXPECT_EQ(tokenizer.bos_id(), 3);
  EXPECT_EQ(tokenizer.eos_id(), 4);
  EXPECT_EQ(tokenizer.pad_id(), std::nullopt);
  EXPECT_EQ(tokenizer.Encode("ab</s>"), (std::vector<int32_t>{2, 4}));
  EXPECT_TRUE(tokenizer.IsSpecial(4));
}

TEST_F(TokenizerFolder, FilesAreNamedInErrors) {
  const auto expect_error = [&](const std::string& what) {
    try {
      Tokenizer::FromFolder(folder_);
      ADD_FAILURE() << what;
    } catch (const Error& error) {
      EXPECT_NE(error.message().find(what), std::string::npos) << error.message();
    }
  };
  expect_error("tokenizer.json");
  Write("tokenizer.json", "");
  expect_error("tokenizer.json: expected JSON, found 0 bytes");
  Write("tokenizer.json", std::string("{") + kModel + "}");
  Write("tokenizer_config.json", "[]");
  expect_error("tokenizer_config.json: expected an object, found an array");
  Write("tokenizer_config.json", R"({"bos_token": 5})");
  expect_error("tokenizer_config.json: bos_token: expected a token, found 5");
  Write("tokenizer_config.json", R"({"added_tokens_decoder": {"x": {}}})");
  expect_error("added_tokens_decoder: expected ids from 0 to 4194303 as keys, found 'x'");
  Write("tokenizer_config.json", R"({"added_tokens_decoder": {"9": {"content": 1}}})");
  expect_error("added_tokens_decoder.9.content: expected a string, found 1");
  Write("tokenizer_config.json", std::string(200'000, '['));
  expect_error("tokenizer_config.json");
}

}  // namespace
}  // namespace octavo
