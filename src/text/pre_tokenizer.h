// Pre-tokenizer: cuts normalised text into the pieces that BPE then treats one by one. A list of
// steps, applied in order; every published component is made of these four.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "text/pattern.h"

namespace octavo {

struct PreTokenizerStep {
  enum class Kind {
    kSplit,      // at the matches of `pattern`
    kPrefix,     // puts `prefix` before pieces that do not begin with it
    kMetaspace,  // replaces every ' ' by `prefix`, then puts it before pieces that do not begin
                 // with it
    kByteLevel   // writes each byte as its character of the byte-level alphabet
  };
  // What becomes of a match: a piece of its own, dropped, joined with adjacent matches, or with a
  // neighbour.
  enum class Behavior { kIsolated, kRemoved, kContiguous, kMergedWithPrevious, kMergedWithNext };
  enum class Where { kNowhere, kTextStart, kEveryPiece };

  Kind kind;
  std::optional<Pattern> pattern;
  Behavior behavior = Behavior::kIsolated;
  bool invert = false;  // what lies between the matches counts as the match
  std::string prefix;
  Where prefix_where = Where::kEveryPiece;
};

struct Piece {
  size_t begin;
  size_t end;
  bool at_text_start;  // begins where the whole input begins
};

// Pieces lie in `text` in order, none is empty, and what a split removed is between them.
struct PieceList {
  std::string text;
  std::vector<Piece> pieces;
};

// Throws Error only if a pattern gives up (see Pattern::FindAll).
void ApplyPreTokenizer(const std::vector<PreTokenizerStep>& steps, PieceList* list);

}  // namespace octavo
