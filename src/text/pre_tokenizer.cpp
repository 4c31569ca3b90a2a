#include "text/pre_tokenizer.h"

#include <algorithm>
#include <string_view>

#include "text/byte_level.h"
#include "text/unicode.h"

namespace octavo {
namespace {

using Behavior = PreTokenizerStep::Behavior;

struct Span {
  size_t begin;
  size_t end;
  bool is_match;
};

// Matches and what lies between them: together they cover the piece.
std::vector<Span> Cover(const std::vector<Match>& matches, size_t size, bool invert) {
  std::vector<Span> spans;
  spans.reserve(2 * matches.size() + 1);
  size_t covered = 0;
  for (const Match& match : matches) {
    if (covered != match.begin) spans.push_back({covered, match.begin, invert});
    spans.push_back({match.begin, match.end, !invert});
    covered = match.end;
  }
  if (covered != size) spans.push_back({covered, size, invert});
  return spans;
}

// Whether `span` is glued to the neighbour that was seen before it.
bool Joins(Behavior behavior, bool is_match, bool previous_is_match) {
  switch (behavior) {
    case Behavior::kContiguous:
      return is_match == previous_is_match;
    case Behavior::kMergedWithPrevious:
    case Behavior::kMergedWithNext:
      return is_match && !previous_is_match;  // of adjacent matches only the first is merged
    case Behavior::kIsolated:
    case Behavior::kRemoved:
      return false;
  }
  return false;
}

// Rewrites `spans` into the spans that remain.
void Arrange(Behavior behavior, std::vector<Span>* spans) {
  if (behavior == Behavior::kIsolated) return;
  if (behavior == Behavior::kRemoved) {
    std::erase_if(*spans, [](const Span& span) { return span.is_match; });
    return;
  }
  const bool backwards = behavior == Behavior::kMergedWithNext;
  if (backwards) std::reverse(spans->begin(), spans->end());
  size_t kept = 0;
  bool previous_is_match = false;
  for (const Span& span : *spans) {
    const bool is_match = span.is_match;
    if (kept > 0 && Joins(behavior, is_match, previous_is_match)) {
      Span& last = (*spans)[kept - 1];
      if (backwards) {
        last.begin = span.begin;
      } else {
        last.end = span.end;
      }
    } else {
      (*spans)[kept++] = span;
    }
    previous_is_match = is_match;
  }
  spans->resize(kept);
  if (backwards) std::reverse(spans->begin(), spans->end());
}

void Split(const PreTokenizerStep& step, PieceList* list) {
  std::vector<Piece> pieces;
  pieces.reserve(list->pieces.size());
  std::vector<Match> matches;
  for (const Piece& piece : list->pieces) {
    const size_t size = piece.end - piece.begin;
    matches.clear();
    step.pattern->FindAll(std::string_view(list->text).substr(piece.begin, size), &matches);
    std::vector<Span> spans = Cover(matches, size, step.invert);
    Arrange(step.behavior, &spans);
    for (const Span& span : spans) {
      if (span.begin == span.end) continue;
      pieces.push_back({piece.begin + span.begin, piece.begin + span.end,
                        piece.at_text_start && span.begin == 0});
    }
  }
  list->pieces = std::move(pieces);
}

// Replaces every piece by what `append(piece text, is at text start, out)` makes of it.
template <typename Append>
void Rewrite(PieceList* list, size_t expected_size, Append append) {
  std::string text;
  text.reserve(expected_size);
  for (Piece& piece : list->pieces) {
    const size_t begin = text.size();
    append(std::string_view(list->text).substr(piece.begin, piece.end - piece.begin),
           piece.at_text_start, &text);
    piece.begin = begin;
    piece.end = text.size();
  }
  list->text = std::move(text);
}

bool PrefixApplies(const PreTokenizerStep& step, bool at_text_start) {
  return step.prefix_where == PreTokenizerStep::Where::kEveryPiece ||
         (step.prefix_where == PreTokenizerStep::Where::kTextStart && at_text_start);
}

void Prefix(const PreTokenizerStep& step, PieceList* list) {
  Rewrite(list, list->text.size() + list->pieces.size() * step.prefix.size(),
          [&](std::string_view piece, bool at_text_start, std::string* out) {
            if (PrefixApplies(step, at_text_start) && !piece.starts_with(step.prefix)) {
              *out += step.prefix;
            }
            *out += piece;
          });
}

void Metaspace(const PreTokenizerStep& step, PieceList* list) {
  Rewrite(list, list->text.size() * 3 / 2,
          [&](std::string_view piece, bool at_text_start, std::string* out) {
            if (PrefixApplies(step, at_text_start) && !piece.starts_with(' ') &&
                !piece.starts_with(step.prefix)) {
              *out += step.prefix;
            }
            for (size_t at = 0; at < piece.size();) {
              const size_t space = std::min(piece.find(' ', at), piece.size());
              *out += piece.substr(at, space - at);
              if (space < piece.size()) *out += step.prefix;
              at = space + 1;
            }
          });
}

void ByteLevel(PieceList* list) {
  Rewrite(list, list->text.size() * 3 / 2, [](std::string_view piece, bool, std::string* out) {
    for (char byte : piece) AppendUtf8(kByteAlphabet.CharOf(static_cast<uint8_t>(byte)), out);
  });
}

}  // namespace

void ApplyPreTokenizer(const std::vector<PreTokenizerStep>& steps, PieceList* list) {
  for (const PreTokenizerStep& step : steps) {
    switch (step.kind) {
      case PreTokenizerStep::Kind::kSplit:
        Split(step, list);
        break;
      case PreTokenizerStep::Kind::kPrefix:
        Prefix(step, list);
        break;
      case PreTokenizerStep::Kind::kMetaspace:
        Metaspace(step, list);
        break;
      case PreTokenizerStep::Kind::kByteLevel:
        ByteLevel(list);
        break;
    }
  }
}

}  // namespace octavo
