// Haystacks: long text that hides needles ("The code of amber bell is 123456."), and the questions
// about them. Words, sentences and templates are data, haystack.json, which
// tools/needle/haystack.py reads too: both write the same bytes for the same seed, and the needle
// model in checkpoints/needle was trained on them. The rules:
//
// 1. Random numbers: SplitMix64 from the seed; Draw(n) = (high 32 bits of the next number) * n
// >> 32.
// 2. Needle i of n has a key, "{tone} {thing}", each word drawn from its list. A needle with odd i
// is a near miss of
//    the one before it: if i % 4 == 1 it takes over the first word, else the second. A key that
//    exists is drawn again. Then its value: value_digits digits, each Draw(10).
// 3. Filler is a row of pieces. Own filler: a template drawn from "sentences", its {fields} filled
// from left to right,
//    each by one draw ({number} is 1 + Draw(9999)), and a space, or after every 8th sentence a
//    newline. A user's text: cut after every newline and every ". ", and into runs of at most 400
//    bytes (at UTF-8 boundaries); the first piece is drawn, the others follow in order and start
//    over at the end.
// 4. A needle takes its sentence and one space. Filler takes the rest of the bytes; the piece that
// does not fit is cut
//    (at a UTF-8 boundary). Needle i stands before the first piece that begins at or after filler
//    byte (2i + 1) * filler_bytes / 2n.
// 5. The text is followed by a question, which ends where the value must come: "{value}." and the
// end of text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace octavo {

inline constexpr int kMaxNeedles = 256;  // far fewer than keys: drawing them anew ends soon

struct Needle {
  std::string key, value;
  double depth;  // where it stands: 0 = the first byte of the text, 1 = the last
};

struct Haystack {
  std::string text;
  std::vector<Needle> needles;   // in the order of the text
  std::string question, answer;  // templates: {key}, {value}

  std::string Question(size_t needle) const;
  std::string Answer(size_t needle) const;
};

// A user's own text. Empty path: none. Errors: the file is empty or not UTF-8.
std::string ReadText(const std::string& path);

// Immutable after construction: Make may be called from any thread.
class HaystackGenerator {
 public:
  struct Options {
    std::string filler;  // a user's own text, valid UTF-8; empty: generated sentences
  };

  // Errors: filler that is not UTF-8.
  explicit HaystackGenerator(const Options& options);

  // `bytes` of text (a user's filler: up to 3 fewer) with `needles` needles at even depths. Errors:
  // no needles, more than there are keys, or more than `bytes` can hold.
  Haystack Make(size_t bytes, int needles, uint64_t seed) const;

 private:
  class Random;
  using Words = std::vector<std::string>;
  // A sentence as pieces of text, each followed by a field: an index into lists_, kNumber, or kEnd.
  using Template = std::vector<std::pair<std::string, int>>;
  class Filler;

  Template ParseTemplate(std::string_view sentence) const;
  std::vector<Needle> DrawNeedles(Random& random, int count) const;

  std::vector<std::pair<std::string, Words>> lists_;  // by name
  std::vector<Template> templates_;
  std::string needle_, question_, answer_;
  int value_digits_ = 0, sentences_per_line_ = 0;
  int tone_ = 0, thing_ = 0;         // the lists that keys are made of
  std::vector<std::string> pieces_;  // the user's filler
};

}  // namespace octavo
