#include "server/openai.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "io/json.h"
#include "server/authorization.h"

namespace octavo::openai {
namespace {

CompletionRequest Completion(const std::string& fields) {
  return ParseRequest(Api::kCompletions, R"({"prompt": "x")" + fields + "}");
}
CompletionRequest Chat(const std::string& fields) {
  return ParseRequest(Api::kChat,
                      R"({"messages": [{"role": "user", "content": "x"}])" + fields + "}");
}

// The message begins with the field, and the error object names it.
void ExpectRefused(Api api, const std::string& body, const std::string& field) {
  try {
    ParseRequest(api, body);
    ADD_FAILURE() << "accepted: " << body.substr(0, 200);
  } catch (const Error& error) {
    EXPECT_EQ(HttpStatus(error.code()), 400);
    const Json json = Json::parse(ErrorBody(400, error.message()));
    EXPECT_EQ(json["error"]["param"], field.empty() ? Json() : Json(field)) << error.message();
    EXPECT_EQ(json["error"]["type"], "invalid_request_error");
    EXPECT_EQ(json["error"]["message"], error.message());
  }
}

TEST(ParseRequestTest, EveryFieldArrives) {
  const CompletionRequest r = Completion(
      R"(, "model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 3,
      "min_p": 0.125, "seed": -1, "stop_token_ids": [4, 5], "repetition_penalty": 1.5,
      "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
      "logprobs": 0, "user": "somebody", "never_heard_of": {"a": [1]}, "n": 1, "stop": null)");
  ASSERT_EQ(r.prompts.size(), 1u);
  EXPECT_EQ(std::get<std::string>(r.prompts[0]), "x");
  EXPECT_EQ(r.model, "m");
  EXPECT_EQ(r.max_tokens, 7);
  EXPECT_EQ(r.sampling.temperature, 0.5f);
  EXPECT_EQ(r.sampling.top_p, 0.25f);
  EXPECT_EQ(r.sampling.top_k, 3);
  EXPECT_EQ(r.sampling.min_p, 0.125f);
  EXPECT_EQ(r.sampling.seed, ~uint64_t{0});
  EXPECT_EQ(r.sampling.stop_token_ids, (std::vector<int32_t>{4, 5}));
  EXPECT_EQ(r.sampling.repetition_penalty, 1.5f);
  EXPECT_TRUE(r.sampling.ignore_eos && r.stream && r.include_usage);
  EXPECT_EQ(r.logprobs, 0);
  EXPECT_FALSE(r.sampling.top_logprobs || r.sampling.prompt_logprobs_from);
}

TEST(ParseRequestTest, WhatIsReportedOfTokens) {
  CompletionRequest r = Completion(R"(, "logprobs": 3)");
  EXPECT_EQ(r.logprobs, 3);
  EXPECT_EQ(r.sampling.top_logprobs, 3);
  EXPECT_FALSE(r.echo || r.sampling.prompt_logprobs_from || r.sampling.top_prompt_logprobs);
  r = Completion(R"(, "prompt_logprobs": 0, "max_tokens": 0)");
  EXPECT_EQ(r.prompt_logprobs, 0);
  EXPECT_EQ(r.sampling.prompt_logprobs_from, 1);
  EXPECT_EQ(r.sampling.top_prompt_logprobs, 0);
  EXPECT_EQ(r.max_tokens, 0);
  r = Completion(R"(, "echo": true, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 0)");
  EXPECT_TRUE(r.echo);
  EXPECT_EQ(r.prompt_logprobs, 1);
  EXPECT_EQ(r.sampling.top_prompt_logprobs, 2);
  EXPECT_EQ(r.sampling.prompt_logprobs_from, 1);
  EXPECT_FALSE(Completion(R"(, "echo": true)").sampling.prompt_logprobs_from);
  r = Chat(R"(, "logprobs": true, "top_logprobs": 4)");
  EXPECT_EQ(r.logprobs, 4);
  EXPECT_EQ(r.sampling.top_logprobs, 4);
  EXPECT_FALSE(Chat(R"(, "logprobs": false, "top_logprobs": 0)").logprobs);
  EXPECT_FALSE(Chat("").add_special_tokens);
  EXPECT_TRUE(Completion("").add_special_tokens && Completion("").skip_special_tokens);
  EXPECT_FALSE(Completion(R"(, "skip_special_tokens": false)").skip_special_tokens);

  const std::string chat = R"({"messages": [{"role": "user", "content": "x"}])";
  ExpectRefused(Api::kChat, chat + R"(, "top_logprobs": 2})", "top_logprobs");
  ExpectRefused(Api::kChat, chat + R"(, "logprobs": true, "top_logprobs": 21})", "top_logprobs");
  ExpectRefused(Api::kChat, chat + R"(, "logprobs": 1})", "logprobs");
  for (const auto& [field, value] : {std::pair{"logprobs", "21"},
                                     {"logprobs", "true"},
                                     {"prompt_logprobs", "-1"},
                                     {"echo", "1"}}) {
    ExpectRefused(Api::kCompletions, fmt::format(R"({{"prompt": "x", "{}": {}}})", field, value),
                  field);
  }
}

TEST(ParseRequestTest, WhatStopsAndBends) {
  const CompletionRequest r = Completion(
      R"(, "stop": ["\n\n", "END"], "include_stop_str_in_output": true, "presence_penalty": 0.5,
      "frequency_penalty": -0.5, "logit_bias": {"17": -100, "3": 1.5}, "min_tokens": 2)");
  EXPECT_EQ(r.stop, (std::vector<std::string>{"\n\n", "END"}));
  EXPECT_TRUE(r.include_stop_str_in_output);
  EXPECT_EQ(r.sampling.presence_penalty, 0.5f);
  EXPECT_EQ(r.sampling.frequency_penalty, -0.5f);
  EXPECT_EQ(r.sampling.logit_bias, (std::map<int32_t, float>{{3, 1.5f}, {17, -100.0f}}));
  EXPECT_EQ(r.sampling.min_tokens, 2);
  EXPECT_EQ(Completion(R"(, "stop": "x")").stop, std::vector<std::string>{"x"});
  EXPECT_TRUE(Completion(R"(, "stop": [])").stop.empty());
  for (const char* stop : {"1", "[1]", "{}", R"([["x"]])", R"("")", R"(["x", ""])"}) {
    ExpectRefused(Api::kCompletions, fmt::format(R"({{"prompt": "x", "stop": {}}})", stop), "stop");
  }
  for (const char* bias : {"[]", R"({"x": 1})", R"({"-1": 1})", R"({"1": "x"})"}) {
    ExpectRefused(Api::kChat,
                  fmt::format(R"({{"messages": [{{"role": "user", "content": "x"}}],
                              "logit_bias": {}}})",
                              bias),
                  "logit_bias");
  }
}

TEST(ParseRequestTest, DefaultsAreTheModels) {
  std::string folder = testing::TempDir() + "octavo_generation_XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  EXPECT_EQ(SamplingDefaults("auto", folder).temperature, 1.0f);
  EXPECT_THROW(SamplingDefaults(folder, "/nonexistent"), Error);
  std::filesystem::create_symlink("purged", folder + "/generation_config.json");
  EXPECT_THROW(SamplingDefaults("auto", folder), Error);
  std::filesystem::remove(folder + "/generation_config.json");
  std::ofstream(folder + "/generation_config.json")
      << R"({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true})";
  EXPECT_EQ(SamplingDefaults("vllm", folder).temperature, 1.0f);
  EXPECT_EQ(SamplingDefaults(folder, "/nonexistent").temperature, 0.6f);
  const SamplingParams defaults = SamplingDefaults("auto", folder);
  const CompletionRequest r =
      ParseRequest(Api::kCompletions, R"({"prompt": "x", "top_k": 5})", defaults);
  EXPECT_EQ(r.sampling.temperature, 0.6f);
  EXPECT_EQ(r.sampling.top_p, 0.95f);
  EXPECT_EQ(r.sampling.top_k, 5);
  std::ofstream(folder + "/generation_config.json") << R"({"temperature": "warm"})";
  EXPECT_THROW(SamplingDefaults("auto", folder), Error);
  std::filesystem::remove_all(folder);
}

TEST(ParseRequestTest, Tokens) {
  EXPECT_EQ(std::get<std::string>(ParseTokenize(R"({"prompt": "a b"})").text), "a b");
  EXPECT_FALSE(ParseTokenize(R"({"prompt": "a", "add_special_tokens": false})").add_special_tokens);
  const TokenizeRequest chat = ParseTokenize(R"({"messages": [{"role": "user", "content": "x"}]})");
  EXPECT_EQ(std::get<Conversation>(chat.text).context["messages"].size(), 1u);
  EXPECT_THROW(ParseTokenize(R"({"prompt": 1})"), Error);
  EXPECT_EQ(ParseDetokenize(R"({"tokens": [1, 2]})", 3).tokens, (std::vector<int32_t>{1, 2}));
  EXPECT_FALSE(chat.add_special_tokens);
  EXPECT_THROW(ParseTokenize(R"({"prompt": "a", "model": 5})"), Error);
  EXPECT_THROW(ParseDetokenize(R"({"tokens": [], "model": 5})", 3), Error);
  for (const char* body :
       {R"({"tokens": [1.5]})", R"({"tokens": [3]})", R"({"tokens": [-1]})", "{}"})
    EXPECT_THROW(ParseDetokenize(body, 3), Error) << body;
}

TEST(ParseRequestTest, NullIsAbsent) {
  const CompletionRequest r = Completion(
      R"(, "max_tokens": null, "temperature": null, "seed": null, "stream": null, "logprobs": null,
      "stream_options": null, "n": null)");
  EXPECT_FALSE(r.max_tokens || r.sampling.seed || r.stream || r.logprobs || r.include_usage);
  EXPECT_EQ(r.sampling.temperature, 1.0f);
}

TEST(ParseRequestTest, PromptsOfTokenIds) {
  for (const char* prompt : {"[1, 2]", "[[1, 2]]"}) {
    const CompletionRequest r =
        ParseRequest(Api::kCompletions, std::string(R"({"prompt": )") + prompt + "}");
    ASSERT_EQ(r.prompts.size(), 1u);
    EXPECT_EQ(std::get<1>(r.prompts[0]), (std::vector<int32_t>{1, 2})) << prompt;
  }
  for (const char* prompt :
       {"[1, -2]", "[1, 2.5]", "[1, 4294967296]", "7", "{}", "null", "[true]"}) {
    ExpectRefused(Api::kCompletions, std::string(R"({"prompt": )") + prompt + "}", "prompt");
  }
}

TEST(ParseRequestTest, SeveralPrompts) {
  const CompletionRequest r =
      ParseRequest(Api::kCompletions, R"({"prompt": ["a", [1, 2], ""], "n": 2})");
  ASSERT_EQ(r.prompts.size(), 3u);
  EXPECT_EQ(std::get<std::string>(r.prompts[0]), "a");
  EXPECT_EQ(std::get<1>(r.prompts[1]), (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(std::get<std::string>(r.prompts[2]), "");
  ExpectRefused(Api::kCompletions, R"({"prompt": ["a", 1]})", "prompt[1]");
  ExpectRefused(Api::kCompletions, R"({"prompt": [[1], [2, "x"]]})", "prompt[1]");
  Json many = {{"prompt", std::vector<std::string>(513, "x")}, {"n", 2}};
  ExpectRefused(Api::kCompletions, many.dump(), "prompt");
}

TEST(ParseRequestTest, WrongValuesAreNamed) {
  const std::pair<const char*, const char*> kCases[] = {{"max_tokens", "0"},
                                                        {"max_tokens", "1.5"},
                                                        {"max_tokens", "\"8\""},
                                                        {"max_tokens", "18446744073709551615"},
                                                        {"temperature", "\"hot\""},
                                                        {"temperature", "1e300"},
                                                        {"top_p", "[]"},
                                                        {"top_k", "0.5"},
                                                        {"seed", "1e3"},
                                                        {"seed", "18446744073709551615"},
                                                        {"stop_token_ids", "3"},
                                                        {"stop_token_ids", "[\"a\"]"},
                                                        {"ignore_eos", "1"},
                                                        {"stream", "\"yes\""},
                                                        {"stream_options", "{}"},
                                                        {"model", "3"},
                                                        {"repetition_penalty", "true"}};
  for (const auto& [field, value] : kCases) {
    const std::string pair = std::string(", \"") + field + "\": " + value + "}";
    ExpectRefused(Api::kCompletions, R"({"prompt": "x")" + pair, field);
    ExpectRefused(Api::kChat, R"({"messages": [{"role": "user", "content": "x"}])" + pair, field);
  }
  ExpectRefused(Api::kCompletions,
                R"({"prompt": "x", "stream": true, "stream_options": {"include_usage": 3}})",
                "stream_options.include_usage");
}

TEST(ParseRequestTest, WhatIsNotSupportedIsRefusedUnlessItChangesNothing) {
  struct Case {
    Api api;
    const char *field, *neutral, *other;
  };
  const Api kText = Api::kCompletions, kChat = Api::kChat;
  const Case kCases[] = {
      {kText, "best_of", "1", "3"},
      {kChat, "tools", "[]", R"([{"type": "function"}])"},
      {kChat, "response_format", R"({"type": "text"})", R"({"type": "json_object"})"},
      {kChat, "reasoning_effort", "null", "\"high\""}};
  for (const Case& c : kCases) {
    const std::string begin = c.api == kText
                                  ? R"({"prompt": "x", ")"
                                  : R"({"messages": [{"role": "user", "content": "x"}], ")";
    EXPECT_NO_THROW(ParseRequest(c.api, begin + c.field + "\": " + c.neutral + "}")) << c.field;
    ExpectRefused(c.api, begin + c.field + "\": " + c.other + "}", c.field);
  }
}

TEST(ParseRequestTest, MessagesBecomeTheTemplatesContext) {
  const CompletionRequest r = ParseRequest(Api::kChat, R"({"messages": [
      {"role": "system", "content": "s"},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
      "chat_template_kwargs": {"enable_thinking": false, "messages": "not these"},
      "max_tokens": 3, "max_completion_tokens": 5, "logprobs": true})");
  EXPECT_EQ(r.chat.context["messages"][0]["content"], "s");
  EXPECT_EQ(r.chat.context["messages"][1]["content"], "a\nb");
  EXPECT_EQ(r.chat.context["enable_thinking"], false);
  EXPECT_EQ(r.chat.context["add_generation_prompt"], true);
  EXPECT_EQ(r.max_tokens, 5);
  EXPECT_EQ(r.logprobs, 0);
  EXPECT_EQ(Chat(R"(, "add_generation_prompt": false)").chat.context["add_generation_prompt"],
            false);

  const auto refused = [](const std::string& messages, const std::string& field) {
    ExpectRefused(Api::kChat, R"({"messages": )" + messages + "}", field);
  };
  refused("[]", "messages");
  refused("null", "messages");
  refused("[3]", "messages[0]");
  refused(R"([{"content": "x"}])", "messages[0].role");
  refused(R"([{"role": "user"}])", "messages[0].content");
  refused(R"([{"role": "user", "content": [{"type": "image_url"}]}])",
          "messages[0].content[0].type");
  refused(R"([{"role": "user", "content": [{"type": "text"}]}])", "messages[0].content[0].text");
}

TEST(ParseRequestTest, TheLastMessageGoesOn) {
  const auto parse = [](const std::string& content, const std::string& fields) {
    return ParseRequest(Api::kChat, R"({"messages": [{"role": "assistant", "content": )" + content +
                                        R"(}], "continue_final_message": true)" + fields + "}")
        .chat;
  };
  const Conversation chat = parse(R"(" Sure: ")", "");
  EXPECT_EQ(chat.context["add_generation_prompt"], false);
  EXPECT_EQ(UpToFinalMessage("<u>Sure: </u><a> Sure: </a>", chat), "<u>Sure: </u><a> Sure: ");
  EXPECT_EQ(UpToFinalMessage("<a>Sure:</a>", chat), "<a>Sure:");
  EXPECT_EQ(UpToFinalMessage("<a>Sure:", chat), "<a>Sure:");
  EXPECT_THROW(UpToFinalMessage("<a></a>", chat), Error);
  EXPECT_THROW(UpToFinalMessage("<a></a>", parse(R"(" ")", "")), Error);
  const std::string begin = R"({"messages": [{"role": "assistant", "content": )";
  ExpectRefused(Api::kChat,
                begin + R"("x"}], "continue_final_message": true, "add_generation_prompt": true})",
                "continue_final_message");
  ExpectRefused(Api::kChat, begin + R"(null}], "continue_final_message": true})",
                "continue_final_message");
  EXPECT_EQ(Chat(R"(, "chat_template": "{{ x }}")").chat.chat_template, "{{ x }}");
  ExpectRefused(Api::kChat, begin + R"("x"}], "chat_template": 3})", "chat_template");
  ExpectRefused(Api::kChat, begin + R"("x"}], "user": 5})", "user");
  Json many = Json::object();
  for (int i = 0; i < 257; ++i) many[std::to_string(i)] = i;
  ExpectRefused(Api::kChat, begin + R"("x"}], "chat_template_kwargs": )" + many.dump() + "}",
                "chat_template_kwargs");
  ExpectRefused(Api::kChat,
                begin + R"("x"}], "stop_token_ids": )" + Json(std::vector<int>(1025)).dump() + "}",
                "stop_token_ids");
}

TEST(ParseRequestTest, ARoleAndItsEcho) {
  const auto parse = [](const std::string& fields) {
    return ParseRequest(Api::kChat, R"({"echo": true, "messages": [{"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"}])" +
                                        fields + "}");
  };
  CompletionRequest r = parse("");
  EXPECT_EQ(r.role, "assistant");
  EXPECT_EQ(EchoOf(r), "a");
  EXPECT_FALSE(r.sampling.prompt_logprobs_from);
  EXPECT_EQ(EchoOf(parse(R"(, "continue_final_message": true)")), "a");
  r = Chat(R"(, "echo": true)");  // the last message is the user's, the answer is not
  EXPECT_EQ(r.role, "assistant");
  EXPECT_EQ(EchoOf(r), "");
  r = Chat(R"(, "echo": true, "add_generation_prompt": false)");
  EXPECT_EQ(r.role, "user");
  EXPECT_EQ(EchoOf(r), "x");
  // Nothing of it comes without a token.
  ExpectRefused(Api::kChat,
                R"({"messages": [{"role": "user", "content": "x"}], "echo": true,
                    "max_completion_tokens": 0})",
                "max_completion_tokens");
}

TEST(CheckRoomTest, OnlyWhatWasAskedForIsRefused) {
  const auto message = [](const CompletionRequest& request, int64_t prompt_tokens) {
    try {
      CheckRoom(request, prompt_tokens, 100);
    } catch (const Error& error) {
      EXPECT_EQ(HttpStatus(error.code()), 400);
      return error.message();
    }
    return std::string();
  };
  EXPECT_EQ(message(Completion(""), 95), "");
  EXPECT_EQ(message(Completion(R"(, "max_tokens": 10)"), 90), "");
  EXPECT_EQ(message(Completion(R"(, "max_tokens": 11)"), 90),
            "max_tokens: expected at most the 10 that a prompt of 90 tokens leaves of "
            "max_model_len, 100, found 11");
  EXPECT_TRUE(message(Chat(R"(, "max_tokens": 1, "max_completion_tokens": 11)"), 90)
                  .starts_with("max_completion_tokens: "));
  EXPECT_EQ(message(Completion(R"(, "max_tokens": 10)"), 100), "");  // the prompt is to blame
  const Error error(ErrorCode::kResourceExhausted, "prompt: too long");
  EXPECT_EQ(AboutField(Api::kCompletions, error).message(), "prompt: too long");
  EXPECT_EQ(AboutField(Api::kChat, error).message(), "messages: too long");
}

TEST(ParseRequestTest, BodiesThatAreNoObject) {
  for (const std::string& body :
       {std::string(), std::string("{"), std::string("[]"), std::string("{\"prompt\": \"\xff\"}"),
        std::string(200000, '['), std::string(R"({"prompt": "x", "prompt": "y"})")}) {
    ExpectRefused(Api::kCompletions, body, "");
  }
}

constexpr int32_t kAccent = 300;  // "é"; below 256: a character each; others: part of one

// Ids from 0x1000 on are bytes; those that are no character together are one that is broken.
std::string TokenText(std::span<const int32_t> ids, bool) {
  std::string text, bytes;
  const auto end_bytes = [&] {
    const bool is_euro = bytes == "\u20AC";
    text += bytes.empty() ? "" : is_euro ? bytes : "\uFFFD";
    bytes.clear();
  };
  for (const int32_t id : ids) {
    if (id >= 0x1000) {
      bytes += static_cast<char>(id);
      continue;
    }
    end_bytes();
    text += id == kAccent ? "é" : id < 256 ? std::string(1, static_cast<char>(id)) : "\uFFFD";
  }
  end_bytes();
  return text;
}

Answer MakeAnswer(const CompletionRequest& request,
                  const std::vector<EncodedPrompt>& prompts = {{{'a', 'b', 'c'}, "abc"}}) {
  return Answer(request, "cmpl-1", "m", 99, prompts, TokenText);
}

Event TokenEvent(float logprob, int32_t token = 'x', std::vector<TokenLogprob> top = {},
                 int32_t rank = 0) {
  return {.token = token, .logprob = logprob, .rank = rank, .top = std::move(top)};
}
Event FinishEvent(FinishReason reason) {
  return {.kind = Event::Kind::kFinished, .finish_reason = reason, .cached_tokens = 2};
}

std::vector<std::string> SseData(const std::string& text) {
  std::vector<std::string> data;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find("\n\n", at);
    EXPECT_EQ(text.substr(at, 6), "data: ");
    data.push_back(text.substr(at + 6, end - at - 6));
    at = end + 2;
  }
  return data;
}

TEST(AnswerTest, WholeCompletion) {
  const CompletionRequest request = Completion(R"(, "logprobs": 0)");
  Answer answer = MakeAnswer(request);
  EXPECT_EQ(answer.Begin(), "");
  EXPECT_EQ(answer.Token(TokenEvent(-0.5f, kAccent), "é"), "");
  EXPECT_EQ(answer.Token(TokenEvent(-INFINITY, 'b'), ""), "");
  const Json body = Json::parse(answer.Finish(FinishEvent(FinishReason::kLength), "b"));
  EXPECT_EQ(body, Json::parse(R"({"id": "cmpl-1", "object": "text_completion", "created": 99,
      "model": "m", "choices": [{"index": 0, "text": "éb", "finish_reason": "length",
      "logprobs": {"tokens": ["é", "b"], "token_logprobs": [-0.5, -9999.0], "top_logprobs": null,
                   "text_offset": [0, 1]}}],
      "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 2}}})"));
}

TEST(AnswerTest, WholeChat) {
  Answer answer = MakeAnswer(Chat(""));
  answer.Token(TokenEvent(0), "hi");
  const Json body = Json::parse(answer.Finish(FinishEvent(FinishReason::kStop), ""));
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["choices"][0]["message"],
            Json::parse(R"({"role": "assistant", "content": "hi"})"));
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(body["choices"][0]["logprobs"], nullptr);
}

TEST(AnswerTest, ChoicesKeepTheirIndices) {
  Answer whole = MakeAnswer(Completion(R"(, "n": 2)"));
  whole.Token(TokenEvent(0), "b", 1);
  whole.Token(TokenEvent(0), "a", 0);
  EXPECT_EQ(whole.Finish(FinishEvent(FinishReason::kStop), "", 1), "");
  const Json body = Json::parse(whole.Finish(FinishEvent(FinishReason::kLength), "c", 0));
  EXPECT_EQ(body["choices"][0]["text"], "ac");
  EXPECT_EQ(body["choices"][1]["text"], "b");
  EXPECT_EQ(body["choices"][1]["index"], 1);
  EXPECT_EQ(body["choices"][1]["finish_reason"], "stop");
  EXPECT_EQ(body["usage"]["completion_tokens"], 2);

  Answer streamed = MakeAnswer(Chat(R"(, "stream": true, "n": 2)"));
  EXPECT_EQ(SseData(streamed.Begin()).size(), 2u);
  EXPECT_EQ(Json::parse(SseData(streamed.Token(TokenEvent(0), "x", 1))[0])["choices"][0]["index"],
            1);
  EXPECT_EQ(SseData(streamed.Finish(FinishEvent(FinishReason::kStop), "", 1)).size(), 1u);
  EXPECT_EQ(SseData(streamed.Finish(FinishEvent(FinishReason::kStop), "", 0)).back(), "[DONE]");
}

TEST(AnswerTest, StreamedChat) {
  const CompletionRequest request =
      Chat(R"(, "stream": true, "stream_options": {"include_usage": true})");
  Answer answer = MakeAnswer(request);
  std::string sent = answer.Begin();
  sent += answer.Token(TokenEvent(0), "a");
  EXPECT_EQ(answer.Token(TokenEvent(0), ""), "");  // half a character
  sent += answer.Finish(FinishEvent(FinishReason::kStop), "b");
  const std::vector<std::string> data = SseData(sent);
  ASSERT_EQ(data.size(), 5u);
  EXPECT_EQ(data[4], "[DONE]");
  const char* const deltas[] = {R"({"role": "assistant", "content": ""})", R"({"content": "a"})",
                                R"({"content": "b"})"};
  for (int i = 0; i < 3; ++i) {
    const Json chunk = Json::parse(data[i]);
    EXPECT_EQ(chunk["object"], "chat.completion.chunk");
    EXPECT_EQ(chunk["choices"][0]["delta"], Json::parse(deltas[i]));
    EXPECT_EQ(chunk["choices"][0]["finish_reason"], i == 2 ? Json("stop") : Json());
    EXPECT_EQ(chunk["usage"], nullptr);
  }
  const Json last = Json::parse(data[3]);
  EXPECT_EQ(last["choices"], Json::array());
  EXPECT_EQ(last["usage"]["completion_tokens"], 2);
  EXPECT_EQ(last["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
}

TEST(AnswerTest, StreamedCompletionWithLogprobsAndAFailure) {
  Answer answer = MakeAnswer(Completion(R"(, "stream": true, "logprobs": 0)"));
  EXPECT_EQ(answer.Begin(), "");
  std::string sent = answer.Token(TokenEvent(-0.5f, 'a'), "a");
  sent += answer.Token(TokenEvent(-0.25f, '?'), "");
  Event failed = FinishEvent(FinishReason::kError);
  failed.error = "the cache is too small";
  sent += answer.Finish(failed, "");
  const std::vector<std::string> data = SseData(sent);
  ASSERT_EQ(data.size(), 4u);
  EXPECT_EQ(Json::parse(data[0])["choices"][0]["logprobs"]["token_logprobs"], Json({-0.5}));
  EXPECT_EQ(Json::parse(data[1])["choices"][0]["logprobs"]["text_offset"], Json({1}));
  EXPECT_EQ(Json::parse(data[2])["error"]["message"], "the cache is too small");
  EXPECT_EQ(data[3], "[DONE]");
}

// Streamed and whole, a prompt's log-probabilities and its echo are the same.
TEST(AnswerTest, EchoAndAlternatives) {
  const std::string fields = R"(, "echo": true, "logprobs": 1, "prompt_logprobs": 2)";
  const Json logprobs = Json::parse(R"({"tokens": ["a", "b", "c"],
      "token_logprobs": [null, -2.0, -0.5], "text_offset": [0, 1, 2],
      "top_logprobs": [null, {"b": -2.0, "x": -1.0}, {"c": -0.5}]})");
  const Json prompt_logprobs = Json::parse(R"([null, {
      "98": {"logprob": -2.0, "rank": 3, "decoded_token": "b"},
      "120": {"logprob": -1.0, "rank": 1, "decoded_token": "x"},
      "300": {"logprob": -1.5, "rank": 2, "decoded_token": "é"}}])");
  for (const bool stream : {false, true}) {
    Answer answer = MakeAnswer(Completion(fields + (stream ? R"(, "stream": true)" : "")),
                               {{{'a', 'b'}, "ab"}});
    answer.PromptToken(TokenEvent(-2, 'b', {{'x', -1}, {kAccent, -1.5f}}, 3));
    const std::string sent = answer.Token(TokenEvent(-0.5f, 'c', {{'c', -0.5f}}, 1), "c");
    const std::string rest = answer.Finish(FinishEvent(FinishReason::kLength), "");
    const Json choice = Json::parse(stream ? SseData(sent)[0] : rest)["choices"][0];
    EXPECT_EQ(choice["text"], "abc");
    EXPECT_EQ(choice["logprobs"], logprobs);
    EXPECT_EQ(choice["prompt_logprobs"], prompt_logprobs);
    // The prompt's own token is the first, which is what clients take it for.
    EXPECT_LT((stream ? sent : rest).find(R"("98":)"), (stream ? sent : rest).find(R"("120":)"));
    if (!stream) continue;
    const Json end = Json::parse(SseData(rest)[0])["choices"][0];
    EXPECT_EQ(end["text"], "");
    EXPECT_EQ(end["logprobs"], nullptr);
    EXPECT_FALSE(end.contains("prompt_logprobs"));
  }
  // No token at all: the end brings it.
  Answer answer =
      MakeAnswer(Completion(R"(, "echo": true, "logprobs": 0, "max_tokens": 0, "stream": true)"),
                 {{{'a'}, "a"}});
  const Json end =
      Json::parse(SseData(answer.Finish(FinishEvent(FinishReason::kLength), ""))[0])["choices"][0];
  EXPECT_EQ(end["text"], "a");
  EXPECT_EQ(end["logprobs"]["tokens"], Json({"a"}));
  EXPECT_EQ(end["logprobs"]["token_logprobs"], Json::array({nullptr}));
}

// As in vLLM: a character's last token has all of it, those before it nothing, and all of them
// stand where it does.
TEST(AnswerTest, CharactersOfSeveralTokens) {
  constexpr int32_t kEuro[] = {0x10E2, 0x1082, 0x10AC};
  Answer answer = MakeAnswer(Completion(R"(, "logprobs": 1, "echo": true, "prompt_logprobs": 0)"),
                             {{{'a', kEuro[0], kEuro[1], kEuro[2], 'b'}, "a\u20ACb"}});
  for (const int32_t id : {kEuro[0], kEuro[1], kEuro[2], int32_t{'b'}})
    answer.PromptToken(TokenEvent(-1, id, {{kEuro[2], -2}}, 1));
  for (const int32_t id : {kEuro[0], int32_t{'c'}, int32_t{'d'}})  // one that is never whole
    answer.Token(TokenEvent(-1, id, {{id, -1}}, 1), "");
  const Json choice =
      Json::parse(answer.Finish(FinishEvent(FinishReason::kLength), "\uFFFDcd"))["choices"][0];
  const Json& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["tokens"], Json({"a", "", "", "\u20AC", "b", "", "c", "d"}));
  EXPECT_EQ(logprobs["text_offset"], Json({0, 1, 1, 1, 2, 3, 3, 5}));
  EXPECT_EQ(logprobs["top_logprobs"][3], Json({{"\u20AC", -1.0}}));
  EXPECT_EQ(choice["prompt_logprobs"][3]["4268"]["decoded_token"], "\u20AC");
  EXPECT_EQ(choice["prompt_logprobs"][2]["4226"]["decoded_token"], "");

  Answer chat = MakeAnswer(Chat(R"(, "logprobs": true)"));
  for (const int32_t id : kEuro) chat.Token(TokenEvent(-1, id), "");
  const Json body = Json::parse(chat.Finish(FinishEvent(FinishReason::kStop), "\u20AC"));
  EXPECT_EQ(body["choices"][0]["logprobs"]["content"][1]["bytes"], Json::array());
  EXPECT_EQ(body["choices"][0]["logprobs"]["content"][2]["bytes"], Json({0xE2, 0x82, 0xAC}));
}

TEST(AnswerTest, AChatsEchoAndRole) {
  const std::string fields = R"(, "echo": true, "add_generation_prompt": false, "logprobs": true)";
  for (const bool stream : {false, true}) {
    Answer answer =
        MakeAnswer(Chat(fields + (stream ? R"(, "stream": true)" : "")), {{{'a', 'b'}, "x"}});
    const std::string begin = answer.Begin();
    const std::string sent = answer.Token(TokenEvent(-0.5f, 'y'), "y");
    const std::string rest = answer.Finish(FinishEvent(FinishReason::kStop), "");
    const Json choice = Json::parse(stream ? SseData(sent)[0] : rest)["choices"][0];
    EXPECT_EQ(choice[stream ? "delta" : "message"]["content"], "xy");
    EXPECT_EQ(choice["logprobs"]["content"].size(), 1u);
    const Json first =
        stream ? Json::parse(SseData(begin)[0])["choices"][0]["delta"] : choice["message"];
    EXPECT_EQ(first["role"], "user");
  }
}

TEST(AnswerTest, ChatAlternatives) {
  for (const bool stream : {false, true}) {
    Answer answer = MakeAnswer(
        Chat(std::string(R"(, "logprobs": true, "top_logprobs": 2, "prompt_logprobs": 0)") +
             (stream ? R"(, "stream": true)" : "")));
    answer.PromptToken(TokenEvent(-4, 'b', {}, 7));
    const std::string sent =
        answer.Token(TokenEvent(-3, kAccent, {{'c', -0.5f}, {500, -INFINITY}}, 3), "é");
    const std::string rest = answer.Finish(FinishEvent(FinishReason::kStop), "");
    const Json body = Json::parse(stream ? SseData(sent)[0] : rest);
    EXPECT_EQ(body["choices"][0]["logprobs"]["content"], Json::parse(R"([{"token": "é",
        "logprob": -3.0, "bytes": [195, 169], "top_logprobs": [
            {"token": "c", "logprob": -0.5, "bytes": [99]},
            {"token": "", "logprob": -9999.0, "bytes": []}]}])"));
    EXPECT_EQ(body["prompt_logprobs"], Json::parse(R"([null,
        {"98": {"logprob": -4.0, "rank": 7, "decoded_token": "b"}}])"));
  }
}

TEST(AnswerTest, ChoicesOfSeveralPrompts) {
  CompletionRequest request = Completion(R"(, "n": 2, "echo": true)");
  Answer answer = MakeAnswer(request, {{{'a'}, "a"}, {{'b', 'c'}, "bc"}});
  for (size_t choice : {3, 0, 2}) {
    answer.Token(TokenEvent(0), std::to_string(choice), choice);
    EXPECT_EQ(answer.Finish(FinishEvent(FinishReason::kLength), "", choice), "");
  }
  const Json body = Json::parse(answer.Finish(FinishEvent(FinishReason::kStop), "", 1));
  const char* const texts[] = {"a0", "a", "bc2", "bc3"};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(body["choices"][i]["index"], i);
    EXPECT_EQ(body["choices"][i]["text"], texts[i]);
  }
  EXPECT_EQ(body["usage"]["prompt_tokens"], 3);
  EXPECT_EQ(body["usage"]["completion_tokens"], 3);
  EXPECT_EQ(body["usage"]["prompt_tokens_details"]["cached_tokens"], 4);  // of each prompt once
}

TEST(AnswerTest, UsageWithEveryChunk) {
  Answer answer = MakeAnswer(Completion(
      R"(, "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true})"));
  for (int tokens : {1, 2}) {
    const Json chunk = Json::parse(SseData(answer.Token(TokenEvent(0), "x"))[0]);
    EXPECT_EQ(chunk["usage"]["completion_tokens"], tokens);
    EXPECT_EQ(chunk["usage"]["total_tokens"], 3 + tokens);
  }
}

TEST(ErrorBodyTest, OnlyAFieldIsAParameter) {
  EXPECT_EQ(Json::parse(ErrorBody(400, "messages[0].role: x"))["error"]["param"],
            "messages[0].role");
  EXPECT_EQ(Json::parse(ErrorBody(400, "the request's body: x"))["error"]["param"], nullptr);
  EXPECT_EQ(Json::parse(ErrorBody(500, "out of memory"))["error"]["param"], nullptr);
  EXPECT_EQ(Json::parse(ErrorBody(500, "\xff"))["error"]["message"], "\uFFFD");
}

TEST(ModelsBodyTest, StatesThePolicy) {
  const Json body = Json::parse(ModelsBody(
      {.name = "m", .folder = "/m", .created = 5, .max_model_len = 64, .cache_policy = {"fp8"}}));
  EXPECT_EQ(body["object"], "list");
  EXPECT_EQ(body["data"][0]["id"], "m");
  EXPECT_EQ(body["data"][0]["max_model_len"], 64);
  EXPECT_EQ(body["data"][0]["kv_cache_policy"], Json({"fp8"}));
}

TEST(IsAuthorizedTest, TheWholeKeyAndNothingElse) {
  for (const char* scheme : {"Bearer", "bearer", "BEARER"})
    EXPECT_TRUE(IsAuthorized(scheme + std::string(" secret"), "secret")) << scheme;
  for (const char* header : {"", "Bearer", "Bearer ", "secret", "Bearer secre", "Bearer secrets",
                             "Bearer secretsecret", "Bearer Secret", "Basic secret"}) {
    EXPECT_FALSE(IsAuthorized(header, "secret")) << header;
  }
  EXPECT_TRUE(IsAuthorized("", ""));

  for (const char* query : {"key=se%2Fcret", "key=se/cret", "a&key=se%2fcret&b=c"})
    EXPECT_TRUE(IsAuthorizedByQuery(query, "se/cret")) << query;
  for (const char* query :
       {"", "key", "key=", "key=se%2", "key=se%2Fcre", "monkey=se/cret", "key=x&key=se/cret"}) {
    EXPECT_FALSE(IsAuthorizedByQuery(query, "se/cret")) << query;
  }
  EXPECT_TRUE(IsAuthorizedByQuery("", ""));
}

}  // namespace
}  // namespace octavo::openai
