// Byte-pair encoding of one piece of text.
//
// A piece becomes one symbol per character; then, again and again, the adjacent pair with the
// lowest rank (the leftmost of equals) is merged, until no pair is in the table. Short pieces are
// scanned, long ones use a heap: O(n log n), so a megabyte without a space does not hang. Encoding
// is const and thread-safe; scratch memory belongs to the caller.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "text/vocabulary.h"

namespace octavo {

// Ranks are positions in BpeModel::merges.
struct BpeMerge {
  int32_t left;
  int32_t right;
  int32_t merged;
};

struct BpeModel {
  Vocabulary vocabulary;
  std::vector<BpeMerge> merges;
  std::optional<int32_t>
      unknown;  // stands for characters that are not in the vocabulary; without it they vanish
  bool fuse_unknown = false;   // adjacent unknown characters are one
  bool byte_fallback = false;  // unknown characters become <0xNN> tokens where all of those exist
  bool ignore_merges = false;  // a piece that is a token needs no merging
};

class Bpe {
 public:
  // Reused between calls to save allocations.
  class Scratch {
   private:
    friend class Bpe;
    struct Symbol {
      int32_t id;
      int32_t previous;
      int32_t next;
      bool alive;
    };
    struct Candidate {
      int32_t rank;
      int32_t position;
      int32_t merged;
    };
    std::vector<int32_t> symbol_ids;
    std::vector<int32_t> run;
    std::vector<int32_t> ranks;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  explicit Bpe(BpeModel model);

  // `piece` is valid UTF-8 of less than 2^31 bytes.
  void Encode(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const;

  const Vocabulary& vocabulary() const { return model_.vocabulary; }

 private:
  struct Entry {
    uint64_t pair;
    int32_t rank;
    int32_t merged;
  };

  void BuildBridges();
  bool MayJoin(int32_t left, int32_t right) const;
  const Entry* Find(int32_t left, int32_t right) const;
  void Symbols(std::string_view piece, std::vector<int32_t>* ids) const;
  bool FallBackToBytes(std::string_view character, std::vector<int32_t>* ids) const;
  void MergeShort(Scratch* scratch) const;
  void MergeLong(Scratch* scratch) const;

  BpeModel model_;
  std::vector<Entry> table_;  // open addressing; a power of two, at most half full
  uint64_t mask_ = 0;
  // A Bloom filter of the pairs of characters that a merge may join; empty: all may.
  std::vector<uint64_t> bridges_;
  // Ids of single characters below U+0200, which hold ASCII and the byte-level alphabet, and of
  // <0xNN>; -1: none.
  std::array<int32_t, 0x200> character_ids_;
  std::array<int32_t, 256> byte_ids_;
};

}  // namespace octavo
