#include "text/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

#include "base/error.h"
#include "text/unicode.h"

namespace octavo {
namespace {

// No two ids are negative, so no pair looks like this.
constexpr uint64_t kEmpty = std::numeric_limits<uint64_t>::max();
constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();
// Up to about this length scanning all ranks is faster than a heap (English text and a^n).
constexpr size_t kLongestScan = 48;
// 128 KiB; the 61,249 merges of Llama 2 set 1 % of the bits.
constexpr size_t kBridgeBits = 1 << 20;

uint64_t PairOf(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}

// Multiplying spreads ids, which are small and dense, over the high bits.
uint64_t Spread(uint64_t pair) {
  const uint64_t product = pair * 0x9E3779B97F4A7C15u;
  return product ^ product >> 32;
}

}  // namespace

Bpe::Bpe(BpeModel model) : model_(std::move(model)) {
  const size_t slots = std::bit_ceil(std::max<size_t>(16, 2 * model_.merges.size()));
  table_.assign(slots, {.pair = kEmpty, .rank = kNoRank, .merged = -1});
  mask_ = slots - 1;
  for (size_t rank = 0; rank < model_.merges.size(); ++rank) {
    const BpeMerge& merge = model_.merges[rank];
    const uint64_t pair = PairOf(merge.left, merge.right);
    uint64_t slot = Spread(pair) & mask_;
    while (table_[slot].pair != kEmpty && table_[slot].pair != pair) slot = (slot + 1) & mask_;
    table_[slot] = {.pair = pair, .rank = static_cast<int32_t>(rank), .merged = merge.merged};
  }
  for (char32_t character = 0; character < character_ids_.size(); ++character) {
    std::string text;
    AppendUtf8(character, &text);
    character_ids_[character] = model_.vocabulary.IdOf(text).value_or(-1);
  }
  for (int byte = 0; byte < 256; ++byte) {
    byte_ids_[byte] = model_.vocabulary.IdOf(fmt::format("<0x{:02X}>", byte)).value_or(-1);
  }
  BuildBridges();
  model_.merges = {};
}

// A merge joins the last character of its left token to the first of its right one. Two adjacent
// characters that no merge joins stay apart whatever happens around them, so a long piece can be
// cut between them.
void Bpe::BuildBridges() {
  // Symbols that are not characters of the text would need bridges of their own; no published model
  // merges them.
  const auto is_character = [&](int32_t id) {
    return id != model_.unknown &&
           std::find(byte_ids_.begin(), byte_ids_.end(), id) == byte_ids_.end();
  };
  const Vocabulary& vocabulary = model_.vocabulary;
  std::vector<uint64_t> bridges(kBridgeBits / 64);
  for (const BpeMerge& merge : model_.merges) {
    const std::string_view left = vocabulary.TokenOf(merge.left);
    const std::string_view right = vocabulary.TokenOf(merge.right);
    if (left.empty() || right.empty()) continue;
    if (!is_character(merge.left) || !is_character(merge.right)) return;
    size_t end = 0;
    NextCodePoint(right, &end);
    const auto last = vocabulary.IdOf(left.substr(PreviousCodePoint(left, left.size())));
    const auto first = vocabulary.IdOf(right.substr(0, end));
    if (!last || !first) continue;  // not reachable from single characters
    const uint64_t bit = Spread(PairOf(*last, *first)) % kBridgeBits;
    bridges[bit / 64] |= uint64_t{1} << bit % 64;
  }
  bridges_ = std::move(bridges);
}

bool Bpe::MayJoin(int32_t left, int32_t right) const {
  if (bridges_.empty()) return true;
  const uint64_t bit = Spread(PairOf(left, right)) % kBridgeBits;
  return bridges_[bit / 64] >> bit % 64 & 1;
}

const Bpe::Entry* Bpe::Find(int32_t left, int32_t right) const {
  const uint64_t pair = PairOf(left, right);
  for (uint64_t slot = Spread(pair) & mask_; table_[slot].pair != kEmpty;
       slot = (slot + 1) & mask_) {
    if (table_[slot].pair == pair) return &table_[slot];
  }
  return nullptr;
}

bool Bpe::FallBackToBytes(std::string_view character, std::vector<int32_t>* ids) const {
  const size_t before = ids->size();
  for (char byte : character) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
    if (id < 0) {
      ids->resize(before);
      return false;
    }
    ids->push_back(id);
  }
  return true;
}

void Bpe::Symbols(std::string_view piece, std::vector<int32_t>* ids) const {
  bool pending_unknown = false;  // written when it is clear that nothing more fuses with it
  const auto flush_unknown = [&] {
    if (pending_unknown) ids->push_back(*model_.unknown);
    pending_unknown = false;
  };
  for (size_t at = 0; at < piece.size();) {
    const size_t begin = at;
    const char32_t code_point = NextCodePoint(piece, &at);
    const std::string_view character = piece.substr(begin, at - begin);
    const int32_t id = code_point < character_ids_.size()
                           ? character_ids_[code_point]
                           : model_.vocabulary.IdOf(character).value_or(-1);
    if (id >= 0) {
      flush_unknown();
      ids->push_back(id);
      continue;
    }
    // Bytes overtake a pending unknown, as they do in HF; that needs a vocabulary with only some of
    // the byte tokens.
    if (model_.byte_fallback && FallBackToBytes(character, ids)) continue;
    if (!model_.unknown) continue;
    if (!model_.fuse_unknown) flush_unknown();
    pending_unknown = true;
  }
  flush_unknown();
}

// Merges scratch->run in place by looking at all ranks for each merge.
void Bpe::MergeShort(Scratch* scratch) const {
  std::vector<int32_t>& ids = scratch->run;
  std::vector<int32_t>& ranks = scratch->ranks;  // ranks[i]: of the pair (i, i + 1)
  const auto rank_at = [&](size_t i) {
    const Entry* entry = Find(ids[i], ids[i + 1]);
    return entry ? entry->rank : kNoRank;
  };
  ranks.clear();
  for (size_t i = 0; i + 1 < ids.size(); ++i) ranks.push_back(rank_at(i));
  while (!ranks.empty()) {
    const size_t best = std::min_element(ranks.begin(), ranks.end()) - ranks.begin();
    if (ranks[best] == kNoRank) return;
    ids[best] = Find(ids[best], ids[best + 1])->merged;
    ids.erase(ids.begin() + best + 1);
    ranks.erase(ranks.begin() + best);
    if (best > 0) ranks[best - 1] = rank_at(best - 1);
    if (best < ranks.size()) ranks[best] = rank_at(best);
  }
}

// The same with a heap of candidates over a linked list. A candidate goes stale when one of its
// symbols was merged elsewhere; it is found out when it comes up.
void Bpe::MergeLong(Scratch* scratch) const {
  std::vector<int32_t>& ids = scratch->run;
  std::vector<Scratch::Symbol>& symbols = scratch->symbols;
  std::vector<Scratch::Candidate>& heap = scratch->heap;
  const int32_t count = static_cast<int32_t>(ids.size());
  const auto later = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  };
  const auto consider = [&](int32_t position) {
    const int32_t next = symbols[position].next;
    if (next < 0) return false;
    const Entry* entry = Find(symbols[position].id, symbols[next].id);
    if (!entry) return false;
    heap.push_back({.rank = entry->rank, .position = position, .merged = entry->merged});
    return true;
  };
  symbols.clear();
  heap.clear();
  for (int32_t i = 0; i < count; ++i) {
    symbols.push_back(
        {.id = ids[i], .previous = i - 1, .next = i + 1 < count ? i + 1 : -1, .alive = true});
  }
  for (int32_t i = 0; i < count; ++i) consider(i);
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = symbols[best.position];
    if (!left.alive || left.next < 0) continue;
    Scratch::Symbol& right = symbols[left.next];
    const Entry* entry = Find(left.id, right.id);
    if (!entry || entry->merged != best.merged) continue;
    left.id = best.merged;
    left.next = right.next;
    right.alive = false;
    if (left.next >= 0) symbols[left.next].previous = best.position;
    if (left.previous >= 0 && consider(left.previous)) {
      std::push_heap(heap.begin(), heap.end(), later);
    }
    if (consider(best.position)) std::push_heap(heap.begin(), heap.end(), later);
  }
  ids.clear();
  for (int32_t i = 0; i >= 0 && i < count; i = symbols[i].next) ids.push_back(symbols[i].id);
}

void Bpe::Encode(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const {
  OCTAVO_CHECK(piece.size() < static_cast<size_t>(std::numeric_limits<int32_t>::max()),
               piece.size());
  if (model_.ignore_merges) {
    if (const auto id = model_.vocabulary.IdOf(piece)) {
      ids->push_back(*id);
      return;
    }
  }
  scratch->symbol_ids.clear();
  Symbols(piece, &scratch->symbol_ids);
  const std::vector<int32_t>& symbols = scratch->symbol_ids;
  const bool is_short = symbols.size() <= kLongestScan;
  for (size_t begin = 0; begin < symbols.size();) {
    size_t end = begin + 1;
    while (end < symbols.size() && (is_short || MayJoin(symbols[end - 1], symbols[end]))) ++end;
    scratch->run.assign(symbols.begin() + begin, symbols.begin() + end);
    if (end - begin <= kLongestScan) {
      MergeShort(scratch);
    } else {
      MergeLong(scratch);
    }
    ids->insert(ids->end(), scratch->run.begin(), scratch->run.end());
    begin = end;
  }
}

}  // namespace octavo
