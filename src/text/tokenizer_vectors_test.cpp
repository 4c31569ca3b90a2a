// Real tokenizers and published vectors, from ../shared/tokenizers (or $OCTAVO_SHARED/tokenizers).
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <sstream>

#include "io/json.h"
#include "text/detokenizer.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace octavo {
namespace {

using Ids = std::vector<int32_t>;

std::filesystem::path SharedTokenizers() {
  const char* shared = std::getenv("OCTAVO_SHARED");
  const std::filesystem::path root = shared ? shared : OCTAVO_SOURCE_DIR "/../shared";
  return root / "tokenizers";
}

std::string ReadText(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

class SharedTest : public testing::Test {
 protected:
  void SetUp() override {
    if (std::filesystem::exists(SharedTokenizers())) return;
    std::cout << "SKIPPED: " << SharedTokenizers().string() << " not found" << std::endl;
    GTEST_SKIP() << SharedTokenizers().string() << " not found";
  }
};

struct Vector {
  std::string text;
  Ids ids;
};

std::vector<Vector> ReadVectors(const std::string& name) {
  const std::filesystem::path base =
      SharedTokenizers() / "vectors" / ("ggml-vocab-" + name + ".gguf");
  const std::string separator = "\n__ggml_vocab_test__\n";
  const std::string texts = ReadText(base.string() + ".inp");
  std::istringstream lines(ReadText(base.string() + ".out"));
  std::vector<Vector> vectors;
  for (size_t at = 0; at <= texts.size();) {
    const size_t end = std::min(texts.find(separator, at), texts.size());
    std::string line;
    if (!std::getline(lines, line)) break;  // what follows the last separator is no vector
    Vector& vector = vectors.emplace_back();
    vector.text = texts.substr(at, end - at);
    std::istringstream numbers(line);
    for (int32_t id = 0; numbers >> id;) vector.ids.push_back(id);
    at = end + separator.size();
  }
  return vectors;
}

void CheckStream(const Tokenizer& tokenizer, const Ids& ids) {
  Detokenizer detokenizer(tokenizer);
  std::string streamed;
  for (int32_t id : ids) {
    const std::string part = detokenizer.Push(id);
    ASSERT_EQ(ValidUtf8Length(part), part.size());
    streamed += part;
  }
  EXPECT_EQ(streamed + detokenizer.Flush(), tokenizer.Decode(ids));
}

TEST_F(SharedTest, EveryVector) {
  constexpr std::pair<const char*, const char*> kVectors[] = {{"gpt2", "gpt-2"},
                                                              {"phi3-mini-llama2-spm", "phi-3"},
                                                              {"phi3-mini-llama2-spm", "llama-spm"},
                                                              {"qwen2-qwen3", "qwen2"},
                                                              {"gpt-oss", "gpt-4o"},
                                                              {"phi4-cl100k", "dbrx"}};
  for (const auto& [folder, name] : kVectors) {
    const Tokenizer tokenizer = Tokenizer::FromFolder(SharedTokenizers() / folder);
    const std::vector<Vector> vectors = ReadVectors(name);
    EXPECT_EQ(vectors.size(), 46u) << name;
    for (const Vector& vector : vectors) {
      EXPECT_EQ(tokenizer.Encode(vector.text, false), vector.ids) << name << ": " << vector.text;
      EXPECT_EQ(tokenizer.Decode(vector.ids), vector.text) << name;
      CheckStream(tokenizer, vector.ids);
    }
  }
}

TEST_F(SharedTest, RandomTextComesBack) {
  std::mt19937 random(6);
  for (const char* folder : {"gpt2", "phi3-mini-llama2-spm", "mistral-7b-instruct-v0.3", "gpt-oss",
                             "phi4-cl100k", "qwen2-qwen3"}) {
    const Tokenizer tokenizer = Tokenizer::FromFolder(SharedTokenizers() / folder);
    const bool nfc = std::string_view(folder) == "qwen2-qwen3";
    for (int i = 0; i < 300; ++i) {
      std::string text;
      for (int n = 0; n < i % 60; ++n) {
        constexpr char32_t kEnds[] = {0x80, 0x800, 0x2580, 0x10000, 0x110000};
        char32_t point = random() % kEnds[random() % 5];
        // Surrogates are no characters, and SentencePiece cannot tell U+2581 from a space.
        if ((point >= 0xD800 && point < 0xE000) || point == 0x2581) point = ' ';
        AppendUtf8(point, &text);
      }
      // Metaspace puts a space before a text unless it begins with one; decoding always takes one.
      if (std::string_view(folder).starts_with("mistral") && text.starts_with(' ')) text[0] = 'x';
      const Ids ids = tokenizer.Encode(text, false);
      EXPECT_EQ(tokenizer.Decode(ids), nfc ? Normalize(text, NormalForm::kNfc) : text) << folder;
    }
    for (int i = 0; i < 300; ++i) {
      Ids ids;
      for (int n = 0; n < i % 60; ++n) {
        ids.push_back(static_cast<int32_t>(random() % (i % 2 == 0 ? 300 : tokenizer.vocab_size())));
      }
      CheckStream(tokenizer, ids);
    }
  }
}

TEST_F(SharedTest, SpecialTokensAreRecognised) {
  const Tokenizer qwen = Tokenizer::FromFolder(SharedTokenizers() / "qwen2-qwen3");
  EXPECT_EQ(qwen.Encode("<|im_start|>user\nhi<|im_end|>"), (Ids{151644, 872, 198, 6023, 151645}));
  EXPECT_EQ(qwen.eos_id(), 151645);
  EXPECT_EQ(qwen.bos_id(), std::nullopt);
  const Tokenizer mistral = Tokenizer::FromFolder(SharedTokenizers() / "mistral-7b-instruct-v0.3");
  EXPECT_EQ(mistral.Encode("[INST]")[0], *mistral.bos_id());
  EXPECT_EQ(mistral.Encode("[INST]")[1], 3);
}

TEST_F(SharedTest, EveryPublishedChainLoads) {
  const Json chains = ReadJsonFile(SharedTokenizers() / "pretokenizer_chains.json")["chains"];
  EXPECT_EQ(chains.size(), 18u);
  for (const auto& [name, chain] : chains.items()) {
    Json file;
    file["model"] = {{"vocab", {{"a", 0}, {"1", 1}}}, {"merges", Json::array()}};
    file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", chain["chain"]}};
    const Tokenizer tokenizer = Tokenizer::FromJson(file.dump(), name);
    EXPECT_EQ(tokenizer.Encode("a1a"), (Ids{0, 1, 0})) << name;
  }
}

}  // namespace
}  // namespace octavo
