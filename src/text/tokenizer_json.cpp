#include "text/tokenizer_json.h"

#include <fmt/format.h>

#include <utility>

#include "base/error.h"
#include "io/json.h"
#include "text/json_reader.h"

namespace octavo {
namespace {

using Behavior = PreTokenizerStep::Behavior;
using Where = PreTokenizerStep::Where;

// What GPT-2 splits by, when ByteLevel is told to use its own expression.
constexpr std::string_view kGpt2Regex =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Words, and runs of what is neither word nor space, by Unicode's definition of a word character
// (UTS 18).
constexpr std::string_view kWordsRegex =
    R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}]+)"
    R"(|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}\s]+)";
// ASCII punctuation as C knows it (which contains symbols such as + and $), and Unicode's.
constexpr std::string_view kPunctuationRegex = R"([!-/:-@\[-`\{-~\p{P}])";

char32_t SingleCharacter(const JsonValue& value) {
  const std::string_view text = value.String();
  size_t at = 0;
  const char32_t character = text.empty() ? 0 : NextCodePoint(text, &at);
  if (text.empty() || at != text.size()) value.Expected("one character");
  return character;
}

// {"String": "..."} or {"Regex": "..."}
Pattern ReadPattern(const JsonValue& pattern) {
  if (const auto literal = pattern.Find("String")) {
    return Pattern::Literal(std::string(literal->String()), literal->where());
  }
  if (const auto regex = pattern.Find("Regex"))
    return Pattern::Regex(regex->String(), regex->where());
  pattern.Expected("String or Regex");
}

void ReadNormalizer(const JsonValue& value, std::vector<NormalizerStep>* steps) {
  using Kind = NormalizerStep::Kind;
  const JsonValue type = value.Get("type");
  const std::string_view name = type.String();
  constexpr std::pair<std::string_view, NormalForm> kForms[] = {{"NFC", NormalForm::kNfc},
                                                                {"NFD", NormalForm::kNfd},
                                                                {"NFKC", NormalForm::kNfkc},
                                                                {"NFKD", NormalForm::kNfkd}};
  for (const auto& [form_name, form] : kForms) {
    if (name == form_name) return steps->push_back({.kind = Kind::kUnicode, .form = form});
  }
  if (name == "Sequence") {
    for (const JsonValue& child : value.Get("normalizers").Array()) ReadNormalizer(child, steps);
  } else if (name == "Lowercase") {
    steps->push_back({.kind = Kind::kLowercase});
  } else if (name == "Prepend") {
    steps->push_back(
        {.kind = Kind::kPrepend, .content = std::string(value.Get("prepend").String())});
  } else if (name == "Replace") {
    steps->push_back({.kind = Kind::kReplace,
                      .content = std::string(value.Get("content").String()),
                      .pattern = ReadPattern(value.Get("pattern"))});
  } else if (name == "Strip") {
    steps->push_back({.kind = Kind::kStrip,
                      .left = value.Get("strip_left").Bool(),
                      .right = value.Get("strip_right").Bool()});
  } else {
    type.Unsupported("Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace or Strip");
  }
}

Behavior ReadBehavior(const JsonValue& value) {
  constexpr std::pair<std::string_view, Behavior> kBehaviors[] = {
      {"Isolated", Behavior::kIsolated},
      {"Removed", Behavior::kRemoved},
      {"Contiguous", Behavior::kContiguous},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext}};
  for (const auto& [name, behavior] : kBehaviors) {
    if (value.String() == name) return behavior;
  }
  value.Expected("Isolated, Removed, Contiguous, MergedWithPrevious or MergedWithNext");
}

struct MetaspaceSpec {
  std::string_view replacement;
  Where where;
};

MetaspaceSpec ReadMetaspace(const JsonValue& value) {
  const JsonValue replacement = value.Get("replacement");
  SingleCharacter(replacement);
  MetaspaceSpec spec = {.replacement = replacement.String(), .where = Where::kEveryPiece};
  const auto scheme = value.Find("prepend_scheme");
  if (scheme) {
    if (scheme->String() == "never") {
      spec.where = Where::kNowhere;
    } else if (scheme->String() == "first") {
      spec.where = Where::kTextStart;
    } else if (scheme->String() != "always") {
      scheme->Expected("always, first or never");
    }
  }
  // The spelling before prepend_scheme existed.
  const auto add_prefix = value.Find("add_prefix_space");
  if (add_prefix && !add_prefix->Bool()) {
    if (scheme && spec.where != Where::kNowhere) {
      add_prefix->Expected("true, as prepend_scheme is not never");
    }
    spec.where = Where::kNowhere;
  }
  return spec;
}

void ReadPreTokenizer(const JsonValue& value, std::vector<PreTokenizerStep>* steps) {
  using Kind = PreTokenizerStep::Kind;
  const JsonValue type = value.Get("type");
  const std::string_view name = type.String();
  const auto split = [&](std::string_view regex, Behavior behavior, bool invert = false) {
    steps->push_back({.kind = Kind::kSplit,
                      .pattern = Pattern::Regex(regex, type.where()),
                      .behavior = behavior,
                      .invert = invert});
  };
  if (name == "Sequence") {
    for (const JsonValue& child : value.Get("pretokenizers").Array())
      ReadPreTokenizer(child, steps);
  } else if (name == "Split") {
    steps->push_back({.kind = Kind::kSplit,
                      .pattern = ReadPattern(value.Get("pattern")),
                      .behavior = ReadBehavior(value.Get("behavior")),
                      .invert = value.Get("invert").Bool()});
  } else if (name == "ByteLevel") {
    if (value.Get("add_prefix_space").Bool())
      steps->push_back({.kind = Kind::kPrefix, .prefix = " "});
    if (value.BoolOr("use_regex", true)) split(kGpt2Regex, Behavior::kIsolated);
    steps->push_back({.kind = Kind::kByteLevel});
  } else if (name == "Metaspace") {
    const MetaspaceSpec spec = ReadMetaspace(value);
    steps->push_back({.kind = Kind::kMetaspace,
                      .prefix = std::string(spec.replacement),
                      .prefix_where = spec.where});
    if (value.BoolOr("split", true)) {
      steps->push_back({.kind = Kind::kSplit,
                        .pattern = Pattern::Literal(std::string(spec.replacement), type.where()),
                        .behavior = Behavior::kMergedWithNext});
    }
  } else if (name == "Digits") {
    const bool individual = value.Get("individual_digits").Bool();
    split(R"(\p{N})", individual ? Behavior::kIsolated : Behavior::kContiguous);
  } else if (name == "Punctuation") {
    const auto behavior = value.Find("behavior");
    split(kPunctuationRegex, behavior ? ReadBehavior(*behavior) : Behavior::kIsolated);
  } else if (name == "Whitespace") {
    split(kWordsRegex, Behavior::kRemoved, /*invert=*/true);
  } else if (name == "WhitespaceSplit") {
    split(R"(\s)", Behavior::kRemoved);
  } else {
    type.Unsupported(
        "Sequence, Split, ByteLevel, Metaspace, Digits, Punctuation, Whitespace or "
        "WhitespaceSplit");
  }
}

void ReadDecoder(const JsonValue& value, std::vector<DecoderStep>* steps) {
  using Kind = DecoderStep::Kind;
  constexpr int64_t kMostStripped = 1 << 20;
  const JsonValue type = value.Get("type");
  const std::string_view name = type.String();
  if (name == "Sequence") {
    for (const JsonValue& child : value.Get("decoders").Array()) ReadDecoder(child, steps);
  } else if (name == "ByteLevel") {
    steps->push_back({.kind = Kind::kByteLevel});
  } else if (name == "ByteFallback") {
    steps->push_back({.kind = Kind::kByteFallback});
  } else if (name == "Fuse") {
    steps->push_back({.kind = Kind::kFuse});
  } else if (name == "Replace") {
    steps->push_back({.kind = Kind::kReplace,
                      .pattern = ReadPattern(value.Get("pattern")),
                      .content = std::string(value.Get("content").String())});
  } else if (name == "Strip") {
    steps->push_back({.kind = Kind::kStrip,
                      .character = SingleCharacter(value.Get("content")),
                      .start = static_cast<size_t>(value.Get("start").Integer(0, kMostStripped)),
                      .stop = static_cast<size_t>(value.Get("stop").Integer(0, kMostStripped))});
  } else if (name == "Metaspace") {
    const MetaspaceSpec spec = ReadMetaspace(value);
    steps->push_back({.kind = Kind::kMetaspace,
                      .character = SingleCharacter(value.Get("replacement")),
                      .drop_first = spec.where != Where::kNowhere});
  } else {
    type.Unsupported("Sequence, ByteLevel, ByteFallback, Fuse, Replace, Strip or Metaspace");
  }
}

// Ids of one special token of a template: special_tokens[name].ids.
void AppendTemplateToken(const JsonValue& processor, const JsonValue& token,
                         std::vector<int32_t>* ids) {
  const JsonValue name = token.Get("id");
  const JsonValue entry = processor.Get("special_tokens").Get(name.String());
  for (const JsonValue& id : entry.Get("ids").Array()) {
    ids->push_back(static_cast<int32_t>(id.Integer(0, kMaxTokenId)));
  }
}

void ReadTemplate(const JsonValue& processor, TokenizerParts* parts) {
  const JsonValue single = processor.Get("single");
  bool text_seen = false;
  for (const JsonValue& piece : single.Array()) {
    if (const auto token = piece.Find("SpecialToken")) {
      AppendTemplateToken(processor, *token, text_seen ? &parts->suffix_ids : &parts->prefix_ids);
      continue;
    }
    const JsonValue sequence = piece.Get("Sequence").Get("id");
    if (sequence.String() != "A" || text_seen) sequence.Unsupported("the text (A) once");
    text_seen = true;
  }
  if (!text_seen) single.Unsupported("a template with the text (A) in it");
}

// A template may stand alone or, once, in a sequence; ByteLevel only changes offsets, which Octavo
// does not give.
void ReadPostProcessor(const JsonValue& value, bool* template_seen, TokenizerParts* parts) {
  const JsonValue type = value.Get("type");
  const std::string_view name = type.String();
  if (name == "Sequence") {
    for (const JsonValue& child : value.Get("processors").Array()) {
      ReadPostProcessor(child, template_seen, parts);
    }
  } else if (name == "TemplateProcessing") {
    if (std::exchange(*template_seen, true)) type.Unsupported("one TemplateProcessing at most");
    ReadTemplate(value, parts);
  } else if (name != "ByteLevel") {
    type.Unsupported("Sequence, TemplateProcessing or ByteLevel");
  }
}

void ReadVocabulary(const JsonValue& vocab, Vocabulary* vocabulary) {
  simdjson::dom::object entries;
  if (vocab.element().get(entries) != simdjson::SUCCESS)
    vocab.Expected("an object of ids by token");
  if (entries.size() == 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected tokens, found none", vocab.where()));
  }
  vocabulary->Reserve(entries.size());
  for (const auto& [token, value] : entries) {
    int64_t id = -1;
    if (value.get(id) == simdjson::SUCCESS && id >= 0 && id <= kMaxTokenId &&
        vocabulary->Add(token, static_cast<int32_t>(id))) {
      continue;
    }
    const JsonValue entry(value, fmt::format("{}[{}]", vocab.where(), Quote(token)));
    entry.Integer(0, kMaxTokenId);
    entry.Expected("a token and an id that no other entry has");
  }
}

// "a b" or ["a", "b"]; false if it is neither.
bool SplitMerge(const simdjson::dom::element& merge, std::string_view* left,
                std::string_view* right) {
  std::string_view text;
  if (merge.get(text) == simdjson::SUCCESS) {
    const size_t space = text.find(' ');
    if (space == text.npos || text.find(' ', space + 1) != text.npos) return false;
    *left = text.substr(0, space);
    *right = text.substr(space + 1);
    return true;
  }
  simdjson::dom::array pair;
  return merge.get(pair) == simdjson::SUCCESS && pair.size() == 2 &&
         pair.at(0).get(*left) == simdjson::SUCCESS && pair.at(1).get(*right) == simdjson::SUCCESS;
}

void ReadMerges(const JsonValue& merges, BpeModel* model) {
  simdjson::dom::array array;
  if (merges.element().get(array) != simdjson::SUCCESS) merges.Expected("an array of pairs");
  const Vocabulary& vocabulary = model->vocabulary;
  std::string joined;
  size_t index = 0;
  for (simdjson::dom::element merge : array) {
    const std::string_view comment = merge.is_string() ? merge.get_string().value_unsafe() : "";
    const size_t position = index++;
    if (comment.starts_with("#version")) continue;
    const auto where = [&] { return fmt::format("{}[{}]", merges.where(), position); };
    std::string_view left, right;
    if (!SplitMerge(merge, &left, &right)) JsonValue(merge, where()).Expected("two tokens");
    joined.assign(left).append(right);
    const auto left_id = vocabulary.IdOf(left);
    const auto right_id = vocabulary.IdOf(right);
    const auto merged_id = vocabulary.IdOf(joined);
    if (!left_id || !right_id || !merged_id) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("{}: expected tokens of model.vocab, found {}, which is not one", where(),
                      Quote(!left_id    ? left
                            : !right_id ? right
                                        : joined)));
    }
    model->merges.push_back({.left = *left_id, .right = *right_id, .merged = *merged_id});
  }
}

void ReadModel(const JsonValue& value, BpeModel* model) {
  // Files from before the tag existed have no type; vocab and merges together can only be BPE.
  if (const auto type = value.Find("type")) {
    if (type->String() != "BPE") type->Unsupported("BPE");
  }
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto text = value.Find(affix);
    if (text && !text->String().empty()) text->Unsupported("null or \"\"");
  }
  if (const auto dropout = value.Find("dropout")) {
    double probability = 0;
    if (dropout->element().get(probability) != simdjson::SUCCESS) dropout->Expected("a number");
    if (probability != 0) dropout->Unsupported("null or 0");
  }
  model->fuse_unknown = value.BoolOr("fuse_unk", false);
  model->byte_fallback = value.BoolOr("byte_fallback", false);
  model->ignore_merges = value.BoolOr("ignore_merges", false);
  ReadVocabulary(value.Get("vocab"), &model->vocabulary);
  ReadMerges(value.Get("merges"), model);
  if (const auto unknown = value.Find("unk_token")) {
    model->unknown = model->vocabulary.IdOf(unknown->String());
    if (!model->unknown) unknown->Expected("a token of model.vocab");
  }
}

AddedToken ReadAddedToken(const JsonValue& value) {
  const bool special = value.BoolOr("special", false);
  return {.id = static_cast<int32_t>(value.Get("id").Integer(0, kMaxTokenId)),
          .content = std::string(value.Get("content").String()),
          .single_word = value.BoolOr("single_word", false),
          .lstrip = value.BoolOr("lstrip", false),
          .rstrip = value.BoolOr("rstrip", false),
          .normalized = value.BoolOr("normalized", !special),
          .special = special};
}

}  // namespace

TokenizerParts ReadTokenizerJson(std::string_view json, const std::string& name) {
  const JsonDocument document(json, name);
  const JsonValue& root = document.root();
  TokenizerParts parts;
  if (const auto version = root.Find("version")) {
    if (version->String() != "1.0") version->Unsupported("\"1.0\"");
  }
  // First what is small, so that an unsupported component is reported before a large model is read.
  if (const auto normalizer = root.Find("normalizer"))
    ReadNormalizer(*normalizer, &parts.normalizer);
  if (const auto chain = root.Find("pre_tokenizer")) ReadPreTokenizer(*chain, &parts.pre_tokenizer);
  bool template_seen = false;
  if (const auto processor = root.Find("post_processor")) {
    ReadPostProcessor(*processor, &template_seen, &parts);
  }
  if (const auto decoder = root.Find("decoder")) {
    ReadDecoder(*decoder, &parts.decoder);
  } else {
    parts.join_with_spaces = true;
  }
  if (const auto added = root.Find("added_tokens")) {
    for (const JsonValue& token : added->Array()) {
      parts.added_tokens.push_back(ReadAddedToken(token));
    }
  }
  ReadModel(root.Get("model"), &parts.model);
  return parts;
}

}  // namespace octavo
