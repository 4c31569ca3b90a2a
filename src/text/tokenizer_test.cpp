#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "base/error.h"
#include "text/byte_level.h"
#include "text/detokenizer.h"
#include "text/unicode.h"

namespace octavo {
namespace {

using Ids = std::vector<int32_t>;

constexpr const char* kNoMerges = R"({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []})";

// A tokenizer.json from its model and whatever other members are given.
std::string File(const std::string& model, const std::string& members = "") {
  return "{\"version\": \"1.0\", " + members + (members.empty() ? "" : ", ") +
         "\"model\": " + model + "}";
}

Tokenizer Load(const std::string& model, const std::string& members = "") {
  return Tokenizer::FromJson(File(model, members), "tokenizer.json");
}

// "\"x\"": a JSON string of one code point.
std::string JsonString(char32_t point) {
  if (point == '"') return "\"\\\"\"";
  if (point == '\\') return "\"\\\\\"";
  std::string text = "\"";
  AppendUtf8(point, &text);
  return text + '"';
}

// 256 byte-level tokens and the special tokens <bos> = 256, <end> = 257: the kind that the needle
// model uses.
Tokenizer ByteTokenizer() {
  std::string vocab;
  for (int byte = 0; byte < 256; ++byte) {
    vocab += (byte == 0 ? "" : ", ") + JsonString(kByteAlphabet.CharOf(byte)) + ": " +
             std::to_string(byte);
  }
  return Load("{\"type\": \"BPE\", \"vocab\": {" + vocab + "}, \"merges\": []}", R"(
      "added_tokens": [{"id": 256, "content": "<bos>", "special": true, "normalized": false},
                       {"id": 257, "content": "<end>", "special": true, "normalized": false}],
      "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
      "post_processor": {"type": "TemplateProcessing",
          "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
          "pair": [], "special_tokens": {"<bos>": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]}}},
      "decoder": {"type": "ByteLevel", "add_prefix_space": false})");
}

// SentencePiece as BPE, as in Llama 2: "▁" for spaces, bytes for what is not in the vocabulary.
Tokenizer SentencePieceTokenizer() {
  return Load(R"({"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
      "vocab": {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "<0xE4>": 3, "<0xB8>": 4, "<0xAD>": 5,
                "▁": 6, "a": 7, "b": 8, "▁a": 9, "ab": 10, "▁ab": 11},
      "merges": ["a b", "▁ ab", "▁ a"]})",
              R"("normalizer": {"type": "Sequence", "normalizers": [
                     {"type": "Prepend", "prepend": "▁"},
                     {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
                 "decoder": {"type": "Sequence", "decoders": [
                     {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                     {"type": "ByteFallback"}, {"type": "Fuse"},
                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})");
}

std::string RandomText(std::mt19937* random, int characters) {
  std::string text;
  for (int i = 0; i < characters; ++i) {
    constexpr char32_t kEnds[] = {0x80, 0x800, 0x10000, 0x110000};
    const char32_t end = kEnds[(*random)() % 4];
    char32_t point = (*random)() % end;
    if (point >= 0xD800 && point < 0xE000) point = 'x';
    AppendUtf8(point, &text);
  }
  return text;
}

std::string Stream(const Tokenizer& tokenizer, const Ids& ids, bool skip_special_tokens = false) {
  Detokenizer detokenizer(tokenizer, skip_special_tokens);
  std::string text;
  for (int32_t id : ids) {
    const std::string part = detokenizer.Push(id);
    EXPECT_EQ(ValidUtf8Length(part), part.size());
    text += part;
  }
  return text + detokenizer.Flush();
}

TEST(Tokenizer, BytesRoundTrip) {
  const Tokenizer tokenizer = ByteTokenizer();
  EXPECT_EQ(tokenizer.vocab_size(), 258);
  EXPECT_EQ(tokenizer.Encode("a b"), (Ids{256, 'a', ' ', 'b'}));
  EXPECT_EQ(tokenizer.Encode("a", false), (Ids{'a'}));
  EXPECT_EQ(tokenizer.Encode(""), (Ids{256}));
  EXPECT_EQ(tokenizer.Decode(Ids{256, 'a'}), "<bos>a");
  EXPECT_EQ(tokenizer.Decode(Ids{256, 'a'}, true), "a");
  std::mt19937 random(1);
  for (int i = 0; i < 500; ++i) {
    const std::string text = RandomText(&random, i % 50);
    const Ids ids = tokenizer.Encode(text);
    EXPECT_EQ(tokenizer.Decode(ids, true), text);
    EXPECT_EQ(Stream(tokenizer, ids, true), text);
  }
}

TEST(Tokenizer, TokensById) {
  const Tokenizer tokenizer = ByteTokenizer();
  EXPECT_EQ(tokenizer.IdOf("<bos>"), 256);
  EXPECT_EQ(tokenizer.IdOf("Ġ"), ' ');
  EXPECT_EQ(tokenizer.IdOf("none"), std::nullopt);
  EXPECT_EQ(tokenizer.IdOf(""), std::nullopt);
  EXPECT_EQ(tokenizer.TokenOf(257), "<end>");
  EXPECT_EQ(tokenizer.TokenOf(' '), "Ġ");
  EXPECT_EQ(tokenizer.TokenOf(-1), "");
  EXPECT_EQ(tokenizer.TokenOf(258), "");
  EXPECT_EQ(tokenizer.vocab_size(), 258);
  EXPECT_EQ(tokenizer.text_vocab_size(), 257);  // <bos> comes with every text, <end> does not
  EXPECT_TRUE(tokenizer.IsSpecial(256));
  EXPECT_FALSE(tokenizer.IsSpecial('a'));
  EXPECT_EQ(tokenizer.Decode(Ids{-5, 'a', 258, 1 << 30}), "a");  // ids without a token are nothing
}

TEST(Tokenizer, SpecialTokensInTheTextCanBePlain) {
  const Tokenizer tokenizer = ByteTokenizer();
  EXPECT_EQ(tokenizer.Encode("a<end>", false), (Ids{'a', 257}));
  EXPECT_EQ(tokenizer.Encode("a<end>", false, SpecialTokens::kPlainText),
            (Ids{'a', '<', 'e', 'n', 'd', '>'}));
}

TEST(Tokenizer, TextMustBeUtf8) {
  try {
    ByteTokenizer().Encode("ab\xFF");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.message(), "text: expected UTF-8, found byte 0xFF at offset 2");
  }
}

TEST(Tokenizer, Gpt2SplitsAndMerges) {
  const char* kModel = R"({"vocab": {"a": 0, "b": 1, "Ġ": 2, "Ġa": 3, "ab": 4, "Ġab": 5, "aĠ": 6},
                           "merges": [["a", "Ġ"], ["Ġ", "a"], ["a", "b"], ["Ġ", "ab"]]})";
  const Tokenizer split =
      Load(kModel, R"("pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false})");
  EXPECT_EQ(split.Encode("ab a  ab"), (Ids{4, 3, 2, 3, 1}));  // "aĠ" never crosses words
  const Tokenizer whole = Load(
      kModel,
      R"("pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true, "use_regex": false})");
  EXPECT_EQ(whole.Encode("a a"), (Ids{2, 6, 0}));
}

TEST(Tokenizer, IgnoreMergesTakesWholePieces) {
  const std::string vocab =
      R"("vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}, "merges": ["a b"]})";
  EXPECT_EQ(Load(R"({"ignore_merges": true, )" + vocab).Encode("abc"), (Ids{4}));
  EXPECT_EQ(Load(R"({"ignore_merges": false, )" + vocab).Encode("abc"), (Ids{3, 2}));
}

TEST(Tokenizer, MergesComeInTwoForms) {
  for (const char* merges :
       {R"(["#version: 0.2", "a b", "ab a"])", R"([["a", "b"], ["ab", "a"]])"}) {
    const Tokenizer tokenizer = Load(
        R"({"vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3}, "merges": )" + std::string(merges) + "}");
    EXPECT_EQ(tokenizer.Encode("abaab"), (Ids{3, 2})) << merges;
  }
}

TEST(Tokenizer, SentencePiece) {
  const Tokenizer tokenizer = SentencePieceTokenizer();
  EXPECT_EQ(tokenizer.Encode("ab a"), (Ids{11, 9}));
  EXPECT_EQ(tokenizer.Encode("é"), (Ids{6, 1, 2}));
  EXPECT_EQ(tokenizer.Encode("xyab"), (Ids{6, 0, 10}));  // unknown characters fuse
  EXPECT_EQ(tokenizer.Encode(""), (Ids{}));
  for (const char* text : {"ab a", "a", " a", "  ab", "é中a", "ab 中"}) {
    EXPECT_EQ(tokenizer.Decode(tokenizer.Encode(text)), text);
    EXPECT_EQ(Stream(tokenizer, tokenizer.Encode(text)), text);
  }
}

TEST(Tokenizer, ARunOfBytesIsGoodAsAWholeOrNotAtAll) {
  const Tokenizer tokenizer = SentencePieceTokenizer();
  EXPECT_EQ(tokenizer.Decode(Ids{7, 1, 2, 3, 4, 5, 7}), "aé中a");
  EXPECT_EQ(tokenizer.Decode(Ids{7, 1, 2, 3, 7}), "a\uFFFD\uFFFD\uFFFDa");
  EXPECT_EQ(tokenizer.Decode(Ids{2, 1}), "\uFFFD\uFFFD");
  Detokenizer detokenizer(tokenizer);
  EXPECT_EQ(detokenizer.Push(1), "");
  EXPECT_EQ(detokenizer.Push(2), "");  // é unless a broken byte follows
  EXPECT_EQ(detokenizer.Push(7), "éa");
  EXPECT_EQ(detokenizer.Push(1), "");
  EXPECT_EQ(detokenizer.Push(7), "\uFFFDa");
  EXPECT_EQ(detokenizer.Push(3), "");
  EXPECT_EQ(detokenizer.Flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.Push(9), "a");  // a new text, so its first space goes
}

TEST(Tokenizer, UnknownCharacters) {
  const std::string rest = R"("vocab": {"a": 0, "?": 1}, "merges": []})";
  EXPECT_EQ(Load(R"({"unk_token": "?", "fuse_unk": true, )" + rest).Encode("xyaz"), (Ids{1, 0, 1}));
  EXPECT_EQ(Load(R"({"unk_token": "?", )" + rest).Encode("xyaz"), (Ids{1, 1, 0, 1}));
  EXPECT_EQ(Load("{" + rest).Encode("xyaz"), (Ids{0}));
}

TEST(Tokenizer, Metaspace) {
  const char* kModel = R"({"vocab": {"a": 0, "▁": 1, "▁a": 2, "a▁": 3}, "merges": ["a ▁", "▁ a"]})";
  const auto encode = [&](const char* options, const char* text) {
    return Load(kModel, R"("added_tokens": [{"id": 9, "content": "<x>", "special": true}],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", )" +
                            std::string(options) + "}")
        .Encode(text);
  };
  EXPECT_EQ(encode(R"("prepend_scheme": "always")", "a a<x>a"), (Ids{2, 2, 9, 2}));
  EXPECT_EQ(encode(R"("prepend_scheme": "first")", "a a<x>a"), (Ids{2, 2, 9, 0}));
  EXPECT_EQ(encode(R"("prepend_scheme": "first")", "<x>a"), (Ids{9, 0}));
  EXPECT_EQ(encode(R"("prepend_scheme": "never")", "a a<x>a"), (Ids{0, 2, 9, 0}));
  EXPECT_EQ(encode(R"("prepend_scheme": "never", "split": false)", "a a"), (Ids{3, 0}));
  EXPECT_EQ(encode(R"("add_prefix_space": false)", "a a"), (Ids{0, 2}));
  EXPECT_EQ(encode(R"("prepend_scheme": "always")", " a"), (Ids{2}));
}

TEST(Tokenizer, SplitBehaviors) {
  // ids show the pieces: the merges "a-", "-a" and "--" work only inside one.
  const char* kModel =
      R"({"vocab": {"a": 0, "-": 1, "a-": 2, "-a": 3, "--": 4}, "merges": ["- -", "a -", "- a"]})";
  const auto encode = [&](const std::string& behavior, const char* invert) {
    return Load(kModel,
                R"("pre_tokenizer": {"type": "Split", "pattern": {"String": "-"}, "behavior": ")" +
                    behavior + "\", \"invert\": " + invert + "}")
        .Encode("a--a");
  };
  EXPECT_EQ(encode("Isolated", "false"), (Ids{0, 1, 1, 0}));
  EXPECT_EQ(encode("Removed", "false"), (Ids{0, 0}));
  EXPECT_EQ(encode("Removed", "true"), (Ids{1, 1}));
  EXPECT_EQ(encode("Contiguous", "false"), (Ids{0, 4, 0}));
  EXPECT_EQ(encode("MergedWithPrevious", "false"), (Ids{2, 1, 0}));
  EXPECT_EQ(encode("MergedWithNext", "false"), (Ids{0, 1, 3}));
}

TEST(Tokenizer, OtherPreTokenizers) {
  const char* kModel =
      R"({"vocab": {"a": 0, "1": 1, "!": 2, " ": 3, "11": 4, "!!": 5, "a1": 6, "a!": 7},
                           "merges": ["1 1", "! !", "a 1", "a !"]})";
  const auto encode = [&](const std::string& chain, const char* text) {
    return Load(kModel, "\"pre_tokenizer\": " + chain).Encode(text);
  };
  EXPECT_EQ(encode(R"({"type": "Digits", "individual_digits": true})", "a11"), (Ids{0, 1, 1}));
  EXPECT_EQ(encode(R"({"type": "Digits", "individual_digits": false})", "a11"), (Ids{0, 4}));
  EXPECT_EQ(encode(R"({"type": "Punctuation"})", "a!!"), (Ids{0, 2, 2}));
  EXPECT_EQ(encode(R"({"type": "Punctuation", "behavior": "Contiguous"})", "a!!"), (Ids{0, 5}));
  EXPECT_EQ(encode(R"({"type": "Whitespace"})", "a1 !!a"), (Ids{6, 5, 0}));
  EXPECT_EQ(encode(R"({"type": "WhitespaceSplit"})", "a1 !!a! "), (Ids{6, 5, 7}));
  EXPECT_EQ(encode(R"({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
                       {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}]}]})",
                   "a1 1"),
            (Ids{0, 1, 1}));
}

TEST(Tokenizer, Normalizers) {
  const char* kModel =
      R"({"vocab": {"a": 0, "\u00e9": 1, "e": 2, "\u0301": 3, "x": 4, "f": 5, "i": 6}, "merges": []})";
  const auto encode = [&](const std::string& normalizer, const char* text) {
    return Load(kModel, "\"normalizer\": " + normalizer).Encode(text);
  };
  EXPECT_EQ(encode("null", "e\u0301"), (Ids{2, 3}));
  EXPECT_EQ(encode(R"({"type": "NFC"})", "e\u0301"), (Ids{1}));
  EXPECT_EQ(encode(R"({"type": "NFD"})", "\u00e9"), (Ids{2, 3}));
  EXPECT_EQ(encode(R"({"type": "NFKC"})", "\ufb01"), (Ids{5, 6}));
  EXPECT_EQ(encode(R"({"type": "NFKD"})", "\ufb01\u00e9"), (Ids{5, 6, 2, 3}));
  EXPECT_EQ(encode(R"({"type": "Lowercase"})", "AX"), (Ids{0, 4}));
  EXPECT_EQ(encode(R"({"type": "Strip", "strip_left": true, "strip_right": true})", " \n"),
            (Ids{}));
  EXPECT_EQ(
      encode(R"({"type": "Replace", "pattern": {"Regex": "[b-d]+"}, "content": "x"})", "abcda"),
      (Ids{0, 4, 0}));
}

TEST(Tokenizer, AddedTokenFlags) {
  const Tokenizer tokenizer = Load(R"({"vocab": {"a": 0, " ": 1, "b": 2}, "merges": []})", R"(
      "normalizer": {"type": "Lowercase"},
      "added_tokens": [
          {"id": 10, "content": "<l>", "lstrip": true, "normalized": false},
          {"id": 11, "content": "<r>", "rstrip": true, "normalized": false},
          {"id": 12, "content": "aa", "single_word": true, "normalized": false},
          {"id": 13, "content": "<L", "normalized": false},
          {"id": 14, "content": "BB", "normalized": true},
          {"id": 15, "content": "<l>b", "normalized": false}])");
  EXPECT_EQ(tokenizer.Encode("a  <l>  a"), (Ids{0, 10, 1, 1, 0}));
  EXPECT_EQ(tokenizer.Encode("a  <r>  a"), (Ids{0, 1, 1, 11, 0}));
  EXPECT_EQ(tokenizer.Encode("<r>  <l>a"), (Ids{11, 10, 0}));
  EXPECT_EQ(tokenizer.Encode("aa aab"), (Ids{12, 1, 0, 0, 2}));
  EXPECT_EQ(tokenizer.Encode("<L<l>"), (Ids{13, 10}));
  EXPECT_EQ(tokenizer.Encode("abBb"), (Ids{0, 14, 2}));  // found in the normalised text
  EXPECT_EQ(tokenizer.Encode("<l>ba"), (Ids{15, 0}));    // the longest
  EXPECT_EQ(tokenizer.vocab_size(), 16);
  EXPECT_EQ(tokenizer.Decode(Ids{14}), "BB");
}

TEST(Tokenizer, DecodersAreStreams) {
  const std::string model =
      R"({"vocab": {"▁": 0, "▁a": 1, "a": 2, "-": 3, "--": 4, "<0xE9>": 5}, "merges": []})";
  const auto check = [&](const std::string& decoder, const Ids& ids, const char* expected) {
    const Tokenizer tokenizer = Load(model, "\"decoder\": " + decoder);
    EXPECT_EQ(tokenizer.Decode(ids), expected) << decoder;
    EXPECT_EQ(Stream(tokenizer, ids), expected) << decoder;
  };
  check("null", {2, 3, 2}, "a - a");
  check(R"({"type": "Metaspace", "replacement": "▁"})", {1, 1, 0}, "a a ");
  check(R"({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"})", {1, 1}, " a a");
  check(R"({"type": "Strip", "content": "-", "start": 1, "stop": 1})", {3, 4, 2, 4}, "a");
  check(R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
            {"type": "Strip", "content": "-", "start": 2, "stop": 3}]})",
        {3, 4, 2, 3, 2, 4, 4}, "-a-a-");
  check(R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
            {"type": "Replace", "pattern": {"String": "a--"}, "content": "x"}]})",
        {2, 3, 2, 3, 3, 2, 4, 2, 3}, "a-xxa-");
  check(R"({"type": "Replace", "pattern": {"Regex": "-+"}, "content": "x"})", {3, 4, 2}, "xxa");
  check(R"({"type": "Sequence", "decoders": [{"type": "ByteFallback"}]})", {5, 2}, "\uFFFDa");
}

// The definition of BPE, read literally.
Ids SlowMerge(Ids ids, const std::vector<std::array<int32_t, 3>>& merges) {
  while (true) {
    size_t best_rank = merges.size();
    size_t best_at = 0;
    for (size_t at = 0; at + 1 < ids.size(); ++at) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank][0] == ids[at] && merges[rank][1] == ids[at + 1]) {
          best_rank = rank;
          best_at = at;
        }
      }
    }
    if (best_rank == merges.size()) return ids;
    ids[best_at] = merges[best_rank][2];
    ids.erase(ids.begin() + best_at + 1);
  }
}

TEST(Tokenizer, ScanAndHeapMergeAsDefined) {
  std::mt19937 random(3);
  for (int round = 0; round < 20; ++round) {
    std::vector<std::string> tokens = {"a", "b", "c"};
    std::vector<std::array<int32_t, 3>> merges;
    std::string merge_list;
    while (merges.size() < 30) {
      const int32_t left = random() % tokens.size();
      const int32_t right = random() % tokens.size();
      const std::string joined = tokens[left] + tokens[right];
      if (joined.size() > 12 || std::find(tokens.begin(), tokens.end(), joined) != tokens.end())
        continue;
      merges.push_back({left, right, static_cast<int32_t>(tokens.size())});
      merge_list +=
          (merge_list.empty() ? "\"" : ", \"") + tokens[left] + " " + tokens[right] + "\"";
      tokens.push_back(joined);
    }
    std::string vocab;
    for (size_t id = 0; id < tokens.size(); ++id) {
      vocab += (id == 0 ? "\"" : ", \"") + tokens[id] + "\": " + std::to_string(id);
    }
    const Tokenizer tokenizer =
        Load("{\"vocab\": {" + vocab + "}, \"merges\": [" + merge_list + "]}");
    for (size_t length : {1, 2, 7, 47, 48, 49, 50, 200}) {
      std::string text;
      Ids symbols;
      for (size_t i = 0; i < length; ++i) {
        symbols.push_back(static_cast<int32_t>(random() % 3));
        text += tokens[symbols.back()];
      }
      EXPECT_EQ(tokenizer.Encode(text), SlowMerge(symbols, merges)) << merge_list << " on " << text;
    }
  }
}

TEST(Tokenizer, AMegabyteWithoutASpaceIsNoTrouble) {
  const Tokenizer tokenizer =
      Load(R"({"vocab": {"a": 0, "aa": 1, "aaaa": 2}, "merges": ["a a", "aa aa"]})");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(tokenizer.Encode(std::string(1 << 20, 'a')), Ids(1 << 18, 2));
  // Takes 0.4 s; a quadratic merge takes hours.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST(Tokenizer, ThreadsShareOneTokenizer) {
  const Tokenizer tokenizer = SentencePieceTokenizer();
  const Ids expected = tokenizer.Encode("ab a é");
  std::vector<std::thread> threads;
  std::array<bool, 4> equal = {true, true, true, true};
  for (size_t t = 0; t < equal.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        equal[t] = equal[t] && tokenizer.Encode("ab a é") == expected &&
                   tokenizer.Decode(expected) == "ab a é";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (bool ok : equal) EXPECT_TRUE(ok);
}

TEST(Tokenizer, RandomIdsStreamAsTheyDecode) {
  const Tokenizer bytes = ByteTokenizer();
  const Tokenizer pieces = SentencePieceTokenizer();
  std::mt19937 random(4);
  for (int i = 0; i < 500; ++i) {
    Ids ids;
    for (int n = 0; n < i % 40; ++n) ids.push_back(static_cast<int32_t>(random() % 260));
    EXPECT_EQ(Stream(bytes, ids), bytes.Decode(ids));
    for (int32_t& id : ids) id %= 13;
    EXPECT_EQ(Stream(pieces, ids), pieces.Decode(ids));
  }
}

TEST(Tokenizer, TemplatesMayComeInASequence) {
  const Tokenizer tokenizer =
      Load(kNoMerges, R"("post_processor": {"type": "Sequence", "processors": [
      {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
      {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "B", "type_id": 0}},
          {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "E", "type_id": 0}}],
       "pair": [], "special_tokens": {"B": {"id": "B", "ids": [1, 0], "tokens": ["b", "a"]},
                                      "E": {"id": "E", "ids": [1], "tokens": ["b"]}}}]})");
  EXPECT_EQ(tokenizer.Encode("a"), (Ids{1, 0, 0, 1}));
  EXPECT_EQ(tokenizer.Encode("a", false), (Ids{0}));
}

}  // namespace
}  // namespace octavo
