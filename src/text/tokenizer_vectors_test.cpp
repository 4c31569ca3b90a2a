// Real tokenizers and published vectors, from ../shared/tokenizers (or $OCTAVO_SHARED/tokenizers).
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <sstream>

#include "io/json.h"
#include "text/byte_level.h"
#include "text/detokenizer.h"
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

// A text on which chains differ, and what Hugging Face's tokenizers 0.23.3 makes of it: pieces of
// the text with a | between them. Metaspace chains keep one piece, in which they change characters.
constexpr std::string_view kChainText =
    "It'S x's 1234567 e\u0301\u0301té HTTPServer camelCase-5: (foo_bar)...\n\n  汉字かなカ1\u0661 "
    "don't//\r\n\t $x\u00A0end  ";
const std::map<std::string, std::string> kChainPieces = {
    {"P02",
     "It|'S| x|'s| |1|2|3|4|5|6|7| e|\u0301\u0301|té| HTTPServer| camelCase|-|5|:| (|foo|_bar|"
     ")...\n\n| | 汉字かなカ|1|\u0661| don|'t|//\r\n|\t| $|x|\u00A0end|  "},
    {"P04",
     "It|'|S| x|'s| 1234567| e|\u0301\u0301|té| HTTPServer| camelCase|-|5|:| (|foo|_|bar|)...|"
     "\n\n | 汉字かなカ|1\u0661| don|'t|//|\r\n\t| $|x|\u00A0|end|  "},
    {"P06",
     "It|'S| x|'s| |1|2|3|4|5|6|7| e\u0301\u0301té| HTTPServer| camelCase|-|5|:| (|foo|_bar|"
     ")...\n\n| | 汉字かなカ|1|\u0661| don|'t|//\r\n|\t| $|x|\u00A0end|  "},
    {"P07",
     "It|'S| x|'s| |123|456|7| e|\u0301\u0301|té| HTTPServer| camelCase|-|5|:| (|foo|_bar|"
     ")...\n\n| | 汉字かなカ|1\u0661| don|'t|//\r\n|\t| $|x|\u00A0end|  "},
    {"P08",
     "It'S |x's |1234567 |e\u0301\u0301té |HTTPServer |camelCase-5: |(foo_bar)...\n\n | |"
     "汉字かなカ1\u0661 |don't//\r\n\t |$x\u00A0end | "},
    {"P09",
     "It|'S| x|'s| |123|456|7| e\u0301\u0301té| HTTPServer| camelCase|-|5|:| (|foo|_bar|"
     ")...\n\n|  |汉字かなカ|1\u0661| don|'t|//\r\n|\t| $|x|\u00A0end|  "},
    {"P10", std::string(kChainText)},
    {"P11",
     "It'S| x's| |123|456|7| e\u0301\u0301té| HTTPServer| camel|Case|-|5|:| (|foo|_bar|"
     ")...\n\n| | 汉字かなカ|1\u0661| don't|//\r\n|\t| $|x|\u00A0end|  "},
    {"P12",
     "It|'S| x|'s| |1|2|3|4|5|6|7| e\u0301\u0301té| HTTPServer| camel|Case|-|5|:| (|foo|_bar|"
     ")...\n\n| | 汉字かなカ|1|\u0661| don|'t|//\r\n|\t| $|x|\u00A0end|  "},
    {"P13",
     "It|'|S| x|'s| |1|2|3|4|5|6|7| e|\u0301\u0301|té| HTTPServer| camelCase|-|5|:| (|foo|_|bar|"
     ")...|\n\n | 汉字かなカ|1|\u0661| don|'t|//|\r\n\t| $|x|\u00A0|end|  "},
    {"P18",
     "▁It'S▁x's▁1234567▁e\u0301\u0301té▁HTTPServer▁camelCase-5:▁(foo_bar)...\n\n▁▁汉字かなカ1\u0661"
     "▁don't//\r\n\t▁$x\u00A0end▁▁"},
    {"P19",
     "It|'|S| x|'|s| |1|2|3|4|5|6|7| e|\u0301\u0301|t|é| HTTPServer| camelCase|-|5|:| (|foo|_|bar|"
     ")...|\n|\n|  |汉字かなカ|1|\u0661| don|'|t|//|\r|\n|\t| $|x|\u00A0end|  "},
    {"P24",
     "It'S▁x's▁1234567▁e\u0301\u0301té▁HTTPServer▁camelCase-5:▁(foo_bar)...\n\n▁▁汉字かなカ1\u0661"
     "▁don't//\r\n\t▁$x\u00A0end▁▁"},
    {"P26",
     "It|'|S| x|'|s| |123|456|7| e|\u0301\u0301|té| HTTPServer| camelCase|-|5|:| |(|foo|_|bar|)...|"
     "\n\n | 汉字かなカ|1|\u0661| don|'|t|//|\r\n\t |$|x|\u00A0|end|  "},
    {"P29",
     "It|'|S| x|'|s| |1|2|3|4|5|6|7| e|\u0301\u0301|té| HTTPServer| camelCase|-|5|:| (|foo|_|bar|"
     ")...|\n|\n| | |汉字かなカ|1|\u0661| don|'|t|//|\r|\n|\t $|x|\u00A0end|  "},
};
// Chains that spell in another way what an older one does.
const std::map<std::string, std::string> kSameChain = {
    {"P15", "P07"}, {"P16", "P07"}, {"P17", "P11"}};

// As the vocabulary of a byte-level model spells it.
std::string InByteAlphabet(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) AppendUtf8(kByteAlphabet.CharOf(static_cast<uint8_t>(byte)), &text);
  return text;
}

// With a vocabulary of the expected pieces alone, any other piece has no id.
TEST_F(SharedTest, EveryPublishedChainCutsAsItShould) {
  const Json chains = ReadJsonFile(SharedTokenizers() / "pretokenizer_chains.json")["chains"];
  EXPECT_EQ(chains.size(), kChainPieces.size() + kSameChain.size());
  for (const auto& [name, chain] : chains.items()) {
    const auto same = kSameChain.find(name);
    std::istringstream pieces(kChainPieces.at(same == kSameChain.end() ? name : same->second));
    const bool byte_level = chain["chain"].dump().find("ByteLevel") != std::string::npos;
    Json vocab;
    Ids expected;
    for (std::string piece; std::getline(pieces, piece, '|');) {
      const auto [entry, is_new] =
          vocab.emplace(byte_level ? InByteAlphabet(piece) : piece, vocab.size());
      expected.push_back(entry->get<int32_t>());
    }
    const Json file = {
        {"model", {{"vocab", vocab}, {"merges", Json::array()}, {"ignore_merges", true}}},
        {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", chain["chain"]}}}};
    const Tokenizer tokenizer = Tokenizer::FromJson(file.dump(), name);
    EXPECT_EQ(tokenizer.Encode(kChainText), expected) << name;
  }
}

}  // namespace
}  // namespace octavo
