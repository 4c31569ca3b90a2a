#include "text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>

#include "base/error.h"

namespace octavo {
namespace {

using Json = nlohmann::ordered_json;
using testing::HasSubstr;

std::tm Noon() {
  std::tm time = {};
  time.tm_year = 2024 - 1900;
  time.tm_mon = 7 - 1;
  time.tm_mday = 26;
  time.tm_hour = 12;
  time.tm_wday = 5;
  time.tm_yday = 207;
  return time;
}

std::string ReadText(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

class FolderTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) /
              testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void Write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name) << text;
  }

  std::string ErrorOfLoading() {
    try {
      ChatTemplate::FromFolder(folder_);
      return "no error";
    } catch (const Error& error) {
      return error.message();
    }
  }

  std::filesystem::path folder_;
};

TEST_F(FolderTest, TemplateInTheConfig) {
  Write("tokenizer_config.json",
        R"({"chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ tools }}",
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}})");
  const ChatTemplate chat = ChatTemplate::FromFolder(folder_);
  EXPECT_EQ(chat.Render({{"messages", {{{"role", "user"}, {"content", "hi"}}}}}, Noon()),
            "<s>hi</s>None");
  EXPECT_EQ(chat.Render({{"messages", {{{"content", "hi"}}}}, {"bos_token", "!"}}, Noon()),
            "!hi</s>None");
  EXPECT_EQ(chat.RenderBy(jinja::Template("{{ bos_token }}{{ x }}", "other"), {{"x", 7}}, Noon()),
            "<s>7");
}

TEST_F(FolderTest, TemplateFileWins) {
  Write("tokenizer_config.json", R"({"chat_template": "config", "bos_token": "<s>"})");
  Write("chat_template.jinja", "file {{ bos_token }}{{ add_generation_prompt }}\n");
  EXPECT_EQ(ChatTemplate::FromFolder(folder_).Render(Json::object(), Noon()), "file <s>False");
  Write("other.jinja", "other {{ bos_token }}");
  EXPECT_EQ(
      ChatTemplate::FromFolder(folder_, folder_ / "other.jinja").Render(Json::object(), Noon()),
      "other <s>");
  EXPECT_THROW(ChatTemplate::FromFolder(folder_, folder_ / "absent.jinja"), Error);
}

TEST_F(FolderTest, NamedTemplates) {
  Write("tokenizer_config.json", R"({"chat_template": [
      {"name": "default", "template": "plain"}, {"name": "rag", "template": "rag"},
      {"name": "tool_use", "template": "tools {{ tools|length }}"}]})");
  const ChatTemplate chat = ChatTemplate::FromFolder(folder_);
  EXPECT_EQ(chat.Render(Json::object(), Noon()), "plain");
  EXPECT_EQ(chat.Render({{"tools", nullptr}}, Noon()), "plain");
  EXPECT_EQ(chat.Render({{"tools", {{{"name", "f"}}}}}, Noon()), "tools 1");
}

TEST_F(FolderTest, Errors) {
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("expected a chat template in chat_template.jinja or "
                                          "tokenizer_config.json, found none"));
  Write("tokenizer_config.json", R"({"bos_token": "<s>"})");
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("found none"));
  Write("tokenizer_config.json", R"({"chat_template": 3})");
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("expected a string or a list of named templates"));
  Write("tokenizer_config.json", R"({"chat_template": [{"name": "rag", "template": "x"}]})");
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("expected a template named 'default'"));
  Write("tokenizer_config.json", R"({"chat_template": [{"name": "default"}]})");
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("chat_template[0].template: expected a string"));
  Write("tokenizer_config.json", R"({"chat_template": "x", "eos_token": 5})");
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("eos_token: expected a token, found 5"));
  Write("tokenizer_config.json", R"({"chat_template": "a\n{% if %}"})");
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("chat_template:2: TemplateSyntaxError"));
  EXPECT_THROW(ChatTemplate("x", "x").Render(Json::array(), Noon()), Error);
  std::filesystem::create_symlink("purged", folder_ / "chat_template.jinja");
  EXPECT_THAT(ErrorOfLoading(), HasSubstr("chat_template.jinja: cannot open"));
}

// Ten published templates, thirteen conversations, from ../shared/templates (or
// $OCTAVO_SHARED/templates).
TEST(PublishedTemplates, AreRenderedAsByPython) {
  const char* shared = std::getenv("OCTAVO_SHARED");
  std::filesystem::path folder = shared ? shared : OCTAVO_SOURCE_DIR "/../shared";
  if (!shared && !std::filesystem::exists(folder)) folder = OCTAVO_SOURCE_DIR "/../../shared";
  folder /= "templates";
  if (!std::filesystem::exists(folder)) {
    std::cout << "SKIPPED: " << folder.string() << " not found" << std::endl;
    GTEST_SKIP() << folder.string() << " not found";
  }
  const Json contexts = Json::parse(ReadText(folder / "golden_contexts.json"));
  const Json goldens = Json::parse(ReadText(folder / "goldens_jinja2_3.1.6.json"));
  int checked = 0;
  for (const auto& [file, results] : goldens.items()) {
    const jinja::Template chat(ReadText(folder / file), file);
    for (const auto& [context, expected] : results.items()) {
      std::string text, error;
      try {
        text = chat.Render(contexts[context], Noon());
      } catch (const Error& e) {
        error = e.message();
      }
      ++checked;
      if (expected.contains("output")) {
        EXPECT_EQ(text, expected["output"]) << file << ", " << context << ": " << error;
      } else {
        EXPECT_THAT(error, testing::EndsWith(expected["error"].get<std::string>()))
            << file << ", " << context;
      }
    }
  }
  EXPECT_EQ(checked, 130);
}

TEST(ChatTemplateTest, LongConversations) {
  const ChatTemplate chat(
      "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content | trim) }}"
      "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}"
      "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}",
      "long");
  Json messages = Json::array();
  for (int i = 0; i < 10'000; ++i) {
    messages.push_back({{"role", i % 2 ? "assistant" : "user"}, {"content", "  message "}});
  }
  const Json context = {{"messages", std::move(messages)}, {"add_generation_prompt", true}};
  const std::string text = chat.Render(context, Noon());
  EXPECT_EQ(text.size(), 5'000 * (std::string_view("<|user|>message").size() +
                                  std::string_view("<|assistant|>message").size()) +
                             std::string_view("<|assistant|>").size());
}

}  // namespace
}  // namespace octavo
