#include "eval/haystack.h"

#include <algorithm>

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "text/unicode.h"

namespace octavo {

extern const std::string_view kHaystackGrammar;  // haystack.json, embedded by embed_haystack.cmake

namespace {

constexpr size_t kMaxPiece = 400;
constexpr int kNumber = -1, kEnd = -2;

std::string Fill(std::string text, std::string_view field, std::string_view value) {
  const size_t at = text.find(field);
  OCTAVO_CHECK(at != text.npos, text, field);
  return text.replace(at, field.size(), value);
}

// The longest prefix of at most `size` bytes that ends at a UTF-8 boundary.
std::string_view Cut(std::string_view text, size_t size) {
  if (text.size() <= size) return text;
  while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xC0) == 0x80) --size;
  return text.substr(0, size);
}

void CheckUtf8(std::string_view text) {
  if (const size_t valid = ValidUtf8Length(text); valid != text.size()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("haystack: the filler text is not UTF-8 at byte {}", valid));
  }
}

std::vector<std::string> SplitPieces(std::string_view text) {
  std::vector<std::string> pieces;
  while (!text.empty()) {
    // Only as far as a piece may reach: text without sentences would be scanned again for every
    // line.
    const std::string_view near = text.substr(0, kMaxPiece + 2);
    const size_t line = near.find('\n'), sentence = near.find(". ");
    const size_t end = std::min({text.size(), line == text.npos ? line : line + 1,
                                 sentence == text.npos ? sentence : sentence + 2});
    const std::string_view piece = Cut(text.substr(0, end), kMaxPiece);
    pieces.emplace_back(piece);
    text.remove_prefix(piece.size());
  }
  return pieces;
}

}  // namespace

std::string Haystack::Question(size_t needle) const {
  return Fill(question, "{key}", needles.at(needle).key);
}

std::string Haystack::Answer(size_t needle) const {
  return Fill(answer, "{value}", needles.at(needle).value);
}

class HaystackGenerator::Random {  // SplitMix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  size_t Draw(size_t n) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return ((z ^ (z >> 31)) >> 32) * n >> 32;
  }

  const std::string& DrawFrom(const Words& words) { return words[Draw(words.size())]; }

 private:
  uint64_t state_;
};

// The endless row of pieces.
class HaystackGenerator::Filler {
 public:
  Filler(const HaystackGenerator& generator, Random& random)
      : generator_(generator), random_(random) {
    if (!generator_.pieces_.empty()) next_ = random_.Draw(generator_.pieces_.size());
  }

  std::string Next() {
    if (generator_.pieces_.empty()) return Sentence();
    const std::string& piece = generator_.pieces_[next_];
    next_ = (next_ + 1) % generator_.pieces_.size();
    return piece;
  }

 private:
  std::string Sentence() {
    std::string out;
    for (const auto& [text, field] :
         generator_.templates_[random_.Draw(generator_.templates_.size())]) {
      out += text;
      if (field == kNumber) {
        out += std::to_string(1 + random_.Draw(9999));
      } else if (field != kEnd) {
        out += random_.DrawFrom(generator_.lists_[static_cast<size_t>(field)].second);
      }
    }
    out += ++next_ % static_cast<size_t>(generator_.sentences_per_line_) == 0 ? '\n' : ' ';
    return out;
  }

  const HaystackGenerator& generator_;
  Random& random_;
  size_t next_ = 0;  // the next piece of the user's text; sentences so far
};

HaystackGenerator::HaystackGenerator(const Options& options) {
  CheckUtf8(options.filler);
  pieces_ = SplitPieces(options.filler);
  const Json grammar = ParseJson(kHaystackGrammar, "haystack.json");
  needle_ = grammar.at("needle");
  question_ = grammar.at("question");
  answer_ = grammar.at("answer");
  value_digits_ = grammar.at("value_digits");
  sentences_per_line_ = grammar.at("sentences_per_line");
  for (const auto& [name, words] : grammar.at("words").items()) {
    if (name == "tone") tone_ = static_cast<int>(lists_.size());
    if (name == "thing") thing_ = static_cast<int>(lists_.size());
    lists_.emplace_back(name, words.get<Words>());
  }
  for (const Json& sentence : grammar.at("sentences")) {
    templates_.push_back(ParseTemplate(sentence.get_ref<const std::string&>()));
  }
}

HaystackGenerator::Template HaystackGenerator::ParseTemplate(std::string_view sentence) const {
  Template parts;
  for (;;) {
    const size_t open = sentence.find('{'), close = sentence.find('}');
    if (open == sentence.npos) break;
    const std::string_view field = sentence.substr(open + 1, close - open - 1);
    const auto list =
        std::find_if(lists_.begin(), lists_.end(), [&](const auto& l) { return l.first == field; });
    OCTAVO_CHECK(field == "number" || list != lists_.end(), field);
    parts.emplace_back(sentence.substr(0, open),
                       field == "number" ? kNumber : static_cast<int>(list - lists_.begin()));
    sentence.remove_prefix(close + 1);
  }
  parts.emplace_back(sentence, kEnd);
  return parts;
}

std::vector<Needle> HaystackGenerator::DrawNeedles(Random& random, int count) const {
  const Words& tones = lists_[static_cast<size_t>(tone_)].second;
  const Words& things = lists_[static_cast<size_t>(thing_)].second;
  std::vector<std::pair<std::string, std::string>> keys;
  std::vector<Needle> needles;
  while (needles.size() < static_cast<size_t>(count)) {
    const size_t i = needles.size();
    std::pair<std::string, std::string> key;
    key.first = i % 4 == 1 ? keys.back().first : random.DrawFrom(tones);
    key.second = i % 4 == 3 ? keys.back().second : random.DrawFrom(things);
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
    Needle needle{.key = key.first + " " + key.second, .value = {}, .depth = 0};
    for (int digit = 0; digit < value_digits_; ++digit) {
      needle.value += static_cast<char>('0' + random.Draw(10));
    }
    needles.push_back(std::move(needle));
    keys.push_back(std::move(key));
  }
  return needles;
}

Haystack HaystackGenerator::Make(size_t bytes, int needles, uint64_t seed) const {
  if (needles < 1 || needles > kMaxNeedles) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("a haystack has 1 to {} needles, not {}", kMaxNeedles, needles));
  }
  Random random(seed);
  Haystack haystack{.text = {},
                    .needles = DrawNeedles(random, needles),
                    .question = question_,
                    .answer = answer_};
  std::vector<std::string> sentences;
  size_t needle_bytes = 0;
  for (const Needle& needle : haystack.needles) {
    sentences.push_back(Fill(Fill(needle_, "{key}", needle.key), "{value}", needle.value) + " ");
    needle_bytes += sentences.back().size();
  }
  if (needle_bytes > bytes) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{} needles take {} bytes and do not fit into a haystack of {}",
                            needles, needle_bytes, bytes));
  }

  const size_t filler_bytes = bytes - needle_bytes, n = sentences.size();
  Filler filler(*this, random);
  std::string& text = haystack.text;
  text.reserve(bytes);
  size_t used = 0, placed = 0;
  const auto place = [&] {
    haystack.needles[placed].depth = static_cast<double>(text.size()) / static_cast<double>(bytes);
    text += sentences[placed++];
  };
  for (;;) {
    while (placed < n && used >= (2 * placed + 1) * filler_bytes / (2 * n)) place();
    const std::string next = filler.Next();
    const std::string_view piece = Cut(next, filler_bytes - used);
    if (piece.empty()) break;
    text += piece;
    used += piece.size();
  }
  while (placed < n) place();
  return haystack;
}

std::string ReadText(const std::string& path) {
  if (path.empty()) return {};
  std::string text(MappedFile(path).bytes());
  if (const size_t valid = ValidUtf8Length(text); text.empty() || valid != text.size()) {
    throw Error(ErrorCode::kInvalidArgument,
                text.empty() ? fmt::format("{}: an empty file", path)
                             : fmt::format("{}: not UTF-8 at byte {}", path, valid));
  }
  return text;
}

}  // namespace octavo
