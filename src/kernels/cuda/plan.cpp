#include "kernels/cuda/plan.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace octavo::cuda {
namespace {

// No piece of a cut head is smaller: so many pages a block works on at once.
constexpr int kMinPiecePages = 7;
// What an item without pages (padding) counts for: its latency in pages.
constexpr int64_t kEmptyItemPages = 7;
// Pieces of one size, an item for every block, are best where a second item in a block would show
// (its latency is a few hundred KB of the bus), or where they come out nearly as equal shares.
constexpr int64_t kSmallPiece = 256 << 10;
constexpr double kNearlyEqual = 1.05;
// Heads of no more than this many bytes, times heads per block, stay whole: adding up parts would
// cost more than waiting.
constexpr int64_t kWholeHead = 192 << 10;
// Chunks are sorted by size into this many classes.
constexpr int kSizeClasses = 64;
// --deterministic: pieces of a sequence, whatever else there is to do, and their smallest size.
constexpr int kFixedPieces = 16;
constexpr int kFixedPiecePages = 32;
// Prefill: K and V of the heads worked on together, in bytes; L2 holds 50 MB and more.
constexpr int64_t kHeadGroupBytes = 32 << 20;
// Prefill: adding up has its price, so pieces have kGoodPieceTiles at least, and a part of a
// worker's equal share of everything; in steps where that share is smaller, the share, or
// kMinPieceTiles. With such a part there are less than 4 pieces for each worker, which is what
// there is room for.
constexpr int kMinPieceTiles = 8, kGoodPieceTiles = 32;
constexpr int kPiecesOfShare = 12;
// Of a step in rounds, so many may have all their pieces.
constexpr int kCutRounds = 4;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Byte offset of `count` elements of T behind `offset`, which moves behind them.
template <typename T>
int64_t Claim(int64_t count, int64_t* offset) {
  return std::exchange(*offset, CeilDiv(*offset + count * int64_t{sizeof(T)}, 16) * 16);
}

template <typename T>
T* ArrayAt(std::byte* upload, int64_t offset) {
  return reinterpret_cast<T*>(upload + offset);
}

}  // namespace

int64_t MaxPrefillPages(const AttentionShape& shape, const AttentionLimits& limits) {
  const int64_t all = CeilDiv(limits.kv_tokens, kPageSize);
  if (shape.window == 0) return all;
  // A page that begins before the window, and what a tile has in front of that.
  constexpr int64_t kInFront = 4;
  return std::min(all,
                  CeilDiv(int64_t{shape.window} + limits.sequence_tokens, kPageSize) + kInFront);
}

Planner::Planner(const PlanConfig& config) : config_(config) {
  const AttentionShape& shape = config_.shape;
  AttentionLimits& limits = config_.limits;
  if (limits.sequence_tokens == 0) limits.sequence_tokens = limits.tokens;
  OCTAVO_CHECK(config_.workers > 0 && config_.page_bytes > 0, config_.workers, config_.page_bytes);
  group_ = shape.heads / shape.kv_heads;

  // Rows of all decodes of a step: kDecodeRows each, unless there are not that many tokens.
  const int64_t rows =
      std::min(int64_t{limits.sequences} * kDecodeRows, int64_t{limits.tokens} * group_) *
      shape.kv_heads;
  const int64_t sequences = std::min(limits.sequences, limits.tokens);
  if (config_.deterministic) {
    decode_pieces_ = sequences * shape.kv_heads * kFixedPieces;
    decode_partial_rows_ = rows * kFixedPieces;
  } else {
    decode_pieces_ = int64_t{config_.workers} * 2;
    decode_partial_rows_ =
        decode_pieces_ * std::min<int64_t>(kDecodeRows, int64_t{limits.tokens} * group_);
  }
  decode_combines_ = std::min(sequences * shape.kv_heads, decode_pieces_ / 2);
  const int64_t decode_items =
      int64_t{limits.sequences} * shape.kv_heads + decode_pieces_ + config_.workers;

  if (config_.prefill_rows > 0) {
    // Every sequence may end with a block that is not full.
    const int block_tokens = config_.prefill_rows / prefill_pack();
    prefill_blocks_ = (limits.tokens / block_tokens + sequences) * (shape.heads / prefill_pack());
    if (!config_.deterministic) prefill_pieces_ = 4 * config_.workers;
    all_prefill_pieces_ = prefill_pieces_ * (config_.widened_pages > 0 ? kCutRounds : 1);
    prefill_partial_rows_ = prefill_pieces_ * config_.prefill_rows;
  }
  const int64_t widens = config_.widened_pages > 0 ? sequences * shape.kv_heads : 0;
  if (config_.widened_pages > 0) {
    const int64_t longest = MaxPrefillPages(shape, limits);
    OCTAVO_CHECK(config_.widened_pages >= longest, config_.widened_pages, longest);
    const int64_t heads = std::min<int64_t>(shape.kv_heads, config_.widened_pages / longest);
    const bool all_fit =
        heads == shape.kv_heads && config_.widened_pages / longest / heads >= sequences;
    max_rounds_ = all_fit ? 1 : static_cast<int>(sequences * CeilDiv(shape.kv_heads, heads));
  } else if (config_.prefill_rows > 0) {
    max_rounds_ = 1;
  }

  layout_.counts = Claim<PlanCounts>(1, &layout_.bytes);
  layout_.decode_items = Claim<WorkItem>(decode_items, &layout_.bytes);
  layout_.decode_links = Claim<ItemLink>(decode_items, &layout_.bytes);
  layout_.fp8_queries = Claim<uint8_t>(limits.tokens, &layout_.bytes);
  layout_.prefill_rounds = Claim<PrefillRound>(max_rounds_, &layout_.bytes);
  layout_.widens = Claim<WidenItem>(widens, &layout_.bytes);
  layout_.prefill_items = Claim<WorkItem>(prefill_blocks_ + all_prefill_pieces_, &layout_.bytes);
  layout_.prefill_combines = Claim<CombineItem>(all_prefill_pieces_ / 2, &layout_.bytes);
}

// The first page that a query at `position` sees.
int Planner::FirstPage(int position) const {
  const int window = config_.shape.window;
  return window > 0 && position >= window ? (position - window + 1) / kPageSize : 0;
}

int64_t Planner::Make(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                      std::byte* upload) {
  counts_ = {};
  decodes_.clear();
  prefills_.clear();
  for (int s = 0; s < std::ssize(kv_len); ++s) {
    const int tokens = q_begin[s + 1] - q_begin[s];
    if (tokens == 0) continue;
    if (int64_t{tokens} * group_ > kDecodeRows) {
      prefills_.push_back(s);
      continue;
    }
    const int pages = static_cast<int>(CeilDiv(kv_len[s], kPageSize));
    const int begin = std::min(pages, FirstPage(std::max(0, kv_len[s] - tokens)));
    decodes_.push_back({.sequence = s, .begin = begin, .end = pages});
  }
  chunks_.clear();
  combine_count_ = partial_rows_ = 0;
  CutDecodes(q_begin);
  OCTAVO_CHECK(combine_count_ <= decode_combines_ && partial_rows_ <= decode_partial_rows_,
               combine_count_, partial_rows_);
  WriteDecodes(q_begin, kv_len, upload);
  WritePrefills(q_begin, kv_len, upload);
  *ArrayAt<PlanCounts>(upload, layout_.counts) = counts_;

  if (prefills_.empty()) return layout_.widens;
  const PrefillRound& last = rounds_.back();
  const int64_t used_combines = last.combines.first + last.combines.count;
  return used_combines > 0 ? layout_.prefill_combines + used_combines * int64_t{sizeof(CombineItem)}
                           : layout_.prefill_items +
                                 (last.items.first + last.items.count) * int64_t{sizeof(WorkItem)};
}

int64_t Planner::CostOf(const Decode& decode) {
  return decode.end > decode.begin ? decode.end - decode.begin : kEmptyItemPages;
}

void Planner::AddWhole(int32_t decode, int head, int32_t owner) {
  const Decode& d = decodes_[decode];
  chunks_.push_back({.decode = decode,
                     .head = head * group_,
                     .begin = d.begin,
                     .end = d.end,
                     .partial = -1,
                     .combine = -1,
                     .partial_begin = -1,
                     .partials = 0,
                     .owner = owner});
}

void Planner::AddChunks(int32_t decode, int head, std::span<const int32_t> q_begin) {
  const Decode& d = decodes_[decode];
  const auto pieces = static_cast<int32_t>(cuts_.size());
  Chunk chunk{
      .decode = decode, .head = head * group_, .begin = d.begin, .partial = -1, .combine = -1};
  int32_t rows = 0;
  if (pieces > 1) {
    rows = (q_begin[d.sequence + 1] - q_begin[d.sequence]) * group_;
    chunk.combine = combine_count_++;
    chunk.partial = chunk.partial_begin = partial_rows_;
    chunk.partials = pieces;
    partial_rows_ += pieces * rows;
  }
  for (const Cut& cut : cuts_) {
    chunk.end = cut.page;
    chunk.owner = cut.owner;
    chunks_.push_back(chunk);
    chunk.begin = cut.page;
    chunk.partial += rows;
  }
}

// How decodes are cut depends on how much there is for each worker.
void Planner::CutDecodes(std::span<const int32_t> q_begin) {
  const int64_t kv_heads = config_.shape.kv_heads, workers = config_.workers;
  if (config_.deterministic) {  // by the sequence's own length
    CutInPieces(q_begin, [](int pages) {
      return std::max(kFixedPiecePages, static_cast<int>(CeilDiv(pages, kFixedPieces)));
    });
    return;
  }
  const int64_t heads = std::ssize(decodes_) * kv_heads;
  int64_t all = 0, longest = 0;
  for (const Decode& d : decodes_) {
    all += CostOf(d) * kv_heads;
    longest = std::max<int64_t>(longest, d.end - d.begin);
  }
  int64_t size = 0;  // of pieces; 0: equal shares
  if (heads > workers) {
    if (longest * config_.page_bytes * workers <= kWholeHead * heads) size = longest;
  } else {
    const auto pieces = [&] {
      int64_t count = 0;
      for (const Decode& d : decodes_)
        count += std::max<int64_t>(1, CeilDiv(d.end - d.begin, size));
      return count * kv_heads;
    };
    const int64_t share = CeilDiv(all, workers);
    size = std::max<int64_t>(kMinPiecePages, share);
    while (pieces() > workers) size += std::max<int64_t>(1, size / 32);
    if (size * config_.page_bytes > kSmallPiece &&
        static_cast<double>(size) > kNearlyEqual * static_cast<double>(share)) {
      size = 0;
    }
  }
  if (size > 0) {
    CutInPieces(q_begin, [&](int) { return static_cast<int>(size); });
  } else {
    CutInShares(q_begin, static_cast<double>(all) / static_cast<double>(workers));
  }
}

// All heads into pieces of at most size(pages) each, for whoever is free.
template <typename Size>
void Planner::CutInPieces(std::span<const int32_t> q_begin, const Size& size) {
  for (int32_t i = 0; i < std::ssize(decodes_); ++i) {
    const Decode& d = decodes_[i];
    const int pages = d.end - d.begin;
    const int64_t pieces = pages == 0 ? 1 : CeilDiv(pages, size(pages));
    if (pieces == 1) {
      for (int head = 0; head < config_.shape.kv_heads; ++head) AddWhole(i, head, -1);
      continue;
    }
    cuts_.clear();
    for (int64_t p = 1; p <= pieces; ++p) {
      cuts_.push_back({d.begin + static_cast<int32_t>(pages * p / pieces), -1});
    }
    for (int head = 0; head < config_.shape.kv_heads; ++head) {
      AddChunks(i, head, q_begin);
    }
  }
}

// All pages of all heads in a row, cut where a worker's share ends.
void Planner::CutInShares(std::span<const int32_t> q_begin, double share) {
  const auto end_of = [&](int worker) { return static_cast<int64_t>(share * (worker + 1) + 0.5); };
  int64_t done = 0;  // pages before this head
  int32_t worker = 0;
  int64_t end = end_of(0);  // of the worker's share
  const auto owner = [&] { return std::min(worker, config_.workers - 1); };
  for (int32_t i = 0; i < std::ssize(decodes_); ++i) {
    const Decode& d = decodes_[i];
    const int64_t pages = d.end - d.begin;
    for (int head = 0; head < config_.shape.kv_heads; ++head, done += CostOf(d)) {
      if (pages == 0) {
        while (end <= done && worker + 1 < config_.workers) end = end_of(++worker);
      }
      if (pages == 0 || end >= done + pages) {  // as most are in a large batch
        AddWhole(i, head, owner());
        continue;
      }
      cuts_.clear();
      for (; end < done + pages; end = end_of(++worker)) {
        if (end > done) cuts_.push_back({d.begin + static_cast<int32_t>(end - done), owner()});
      }
      cuts_.push_back({d.end, owner()});
      AddChunks(i, head, q_begin);
    }
  }
}

// Chunks to items: chains where they have owners, which all have or none; else large ones first.
void Planner::WriteDecodes(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                           std::byte* upload) {
  auto* items = ArrayAt<WorkItem>(upload, layout_.decode_items);
  auto* links = ArrayAt<ItemLink>(upload, layout_.decode_links);
  const auto write = [&](int32_t index, const Chunk& chunk) {
    const int32_t s = decodes_[chunk.decode].sequence;
    const int tokens = q_begin[s + 1] - q_begin[s];
    items[index] = {.sequence = s,
                    .head = chunk.head,
                    .q_row = q_begin[s],
                    .q_tokens = tokens,
                    .position = kv_len[s] - tokens,
                    .page_begin = chunk.begin,
                    .page_end = chunk.end,
                    .partial = chunk.partial};
    links[index] = {.combine = chunk.combine,
                    .next = -1,
                    .partial_begin = chunk.partial_begin,
                    .partials = chunk.partials};
  };
  for (int w = 0; w < config_.workers; ++w) items[w].sequence = -1;
  counts_.decode_shared = counts_.decode_items = 0;
  if (chunks_.empty()) return;

  if (chunks_[0].owner >= 0) {
    int32_t used = config_.workers, previous = -1, previous_owner = -1;
    for (const Chunk& chunk : chunks_) {
      const bool first = chunk.owner != previous_owner;
      const int32_t index = first ? chunk.owner : used++;
      write(index, chunk);
      if (!first) links[previous].next = index;
      previous = index;
      previous_owner = chunk.owner;
    }
    counts_.decode_shared = counts_.decode_items = used;
    return;
  }

  int32_t largest = 1;
  for (const Chunk& chunk : chunks_) largest = std::max(largest, chunk.end - chunk.begin);
  const float classes_per_page = (kSizeClasses - 1) / static_cast<float>(largest);
  const auto class_of = [&](const Chunk& chunk) {
    return static_cast<int>(static_cast<float>(largest - (chunk.end - chunk.begin)) *
                            classes_per_page);
  };
  int32_t next[kSizeClasses + 1] = {};
  for (const Chunk& chunk : chunks_) ++next[class_of(chunk) + 1];
  for (int c = 0; c < kSizeClasses; ++c) next[c + 1] += next[c];
  for (const Chunk& chunk : chunks_) write(next[class_of(chunk)]++, chunk);
  counts_.decode_shared = config_.workers;
  counts_.decode_items = std::max(config_.workers, static_cast<int>(chunks_.size()));
}

Planner::Block Planner::BlockOf(int sequence, int first_token, std::span<const int32_t> q_begin,
                                std::span<const int32_t> kv_len) const {
  const int tile = config_.prefill_tile_pages;
  const int all = q_begin[sequence + 1] - q_begin[sequence];
  const int tokens = std::min(config_.prefill_rows / prefill_pack(), all - first_token);
  const int position = kv_len[sequence] - all + first_token;
  // Padding, with kv_len 0, sees no page.
  const int end = std::max(0, position + tokens + kPageSize - 1) / kPageSize;
  return {.sequence = sequence,
          .first_token = first_token,
          .tokens = tokens,
          .begin = std::min(end, FirstPage(std::max(0, position)) / tile * tile),
          .end = end,
          .widen = 0};
}

int64_t Planner::TilesOf(const Block& block) const {
  return CeilDiv(block.end - block.begin, config_.prefill_tile_pages);
}

WidenItem Planner::PagesOf(int sequence, std::span<const int32_t> q_begin,
                           std::span<const int32_t> kv_len) const {
  return {.sequence = sequence,
          .page_begin = BlockOf(sequence, 0, q_begin, kv_len).begin,
          .page_end = static_cast<int32_t>(CeilDiv(kv_len[sequence], kPageSize))};
}

void Planner::WritePrefills(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                            std::byte* upload) {
  rounds_.clear();
  if (config_.prefill_rows == 0) return;
  if (config_.fp8_prefill) {
    auto* fp8 = ArrayAt<uint8_t>(upload, layout_.fp8_queries);
    std::fill_n(fp8, config_.limits.tokens, uint8_t{0});
    for (const int s : prefills_) std::fill(fp8 + q_begin[s], fp8 + q_begin[s + 1], uint8_t{1});
  }
  const int kv_heads = config_.shape.kv_heads;
  pieces_left_ = all_prefill_pieces_;
  std::span<const int32_t> left = prefills_;
  do {
    // All heads of as many sequences as there is room for, or some of one.
    size_t count = left.size();
    int heads = kv_heads;
    if (config_.widened_pages > 0 && count > 0) {
      int64_t pages = 0;
      for (count = 0; count < left.size(); ++count) {
        const WidenItem next = PagesOf(left[count], q_begin, kv_len);
        const int64_t with = pages + next.page_end - next.page_begin;
        if (count > 0 && with * kv_heads > config_.widened_pages) break;
        pages = with;
      }
      const int64_t room = config_.widened_pages / std::max<int64_t>(1, pages);
      OCTAVO_CHECK(room > 0, pages, config_.widened_pages);
      heads = static_cast<int>(CeilDiv(kv_heads, CeilDiv(kv_heads, room)));
    }
    for (int head = 0; head < kv_heads; head += heads) {
      WriteRound(left.first(count), head, std::min(heads, kv_heads - head), q_begin, kv_len,
                 upload);
    }
    left = left.subspan(count);
  } while (!left.empty());
  OCTAVO_CHECK(std::ssize(rounds_) <= max_rounds_, rounds_.size(), max_rounds_);
  auto* rounds = ArrayAt<PrefillRound>(upload, layout_.prefill_rounds);
  std::fill(std::copy(rounds_.begin(), rounds_.end(), rounds), rounds + max_rounds_,
            PrefillRound{});
}

void Planner::WriteRound(std::span<const int32_t> sequences, int first_kv_head, int kv_heads,
                         std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                         std::byte* upload) {
  PrefillRound round;
  if (!rounds_.empty()) {
    const auto behind = [](const ListRange& range) { return range.first + range.count; };
    const PrefillRound& last = rounds_.back();
    round.items.first = behind(last.items);
    round.combines.first = behind(last.combines);
    round.widens.first = behind(last.widens);
  }
  auto* items = ArrayAt<WorkItem>(upload, layout_.prefill_items) + round.items.first;
  auto* combines = ArrayAt<CombineItem>(upload, layout_.prefill_combines) + round.combines.first;
  auto* widens = ArrayAt<WidenItem>(upload, layout_.widens) + round.widens.first;
  const int pack = prefill_pack(), tile = config_.prefill_tile_pages;
  const int block_tokens = config_.prefill_rows / pack;

  // Cut only what is longer than an equal share of everything that is not yet written: what comes
  // last must keep everybody busy to the end.
  int64_t tiles_left = 0;
  for (const int s : sequences) {
    for (int first = 0; first < q_begin[s + 1] - q_begin[s]; first += block_tokens) {
      tiles_left += TilesOf(BlockOf(s, first, q_begin, kv_len)) * kv_heads * (group_ / pack);
    }
    if (config_.widened_pages == 0) continue;
    WidenItem& widen = widens[round.widens.count++] = PagesOf(s, q_begin, kv_len);
    widen.first_kv_head = first_kv_head;
    widen.kv_heads = kv_heads;
    widen.to = round.widened_pages;
    round.widened_pages += kv_heads * (widen.page_end - widen.page_begin);
  }
  OCTAVO_CHECK(round.widened_pages <= config_.widened_pages, round.widened_pages);
  const int64_t equal_share = CeilDiv(tiles_left, config_.workers);
  const int64_t smallest =
      std::max({int64_t{kMinPieceTiles}, std::min(equal_share, int64_t{kGoodPieceTiles}),
                equal_share / kPiecesOfShare});
  int32_t partial_rows = 0;

  const auto write = [&](const Block& b, int head) {
    const int64_t tiles = TilesOf(b);
    const int64_t share = std::max(smallest, CeilDiv(tiles_left, config_.workers));
    tiles_left -= tiles;
    const int64_t room =
        std::min(pieces_left_, prefill_pieces_ - partial_rows / config_.prefill_rows);
    int64_t pieces = std::min(CeilDiv(tiles, share), room);
    if (pieces < 2) pieces = 1;
    WorkItem item{.sequence = b.sequence,
                  .head = head,
                  .q_row = q_begin[b.sequence] + b.first_token,
                  .q_tokens = b.tokens,
                  .position = kv_len[b.sequence] - (q_begin[b.sequence + 1] - q_begin[b.sequence]) +
                              b.first_token,
                  .page_begin = b.begin,
                  .page_end = b.end,
                  .partial = -1};
    if (config_.widened_pages > 0) {
      const WidenItem& widen = widens[b.widen];
      const int before = (head / group_ - first_kv_head) * (widen.page_end - widen.page_begin);
      item.sequence = widen.to + before - widen.page_begin;
    }
    if (pieces > 1) {
      pieces_left_ -= pieces;
      combines[round.combines.count++] = {.head = head,
                                          .q_row = item.q_row,
                                          .q_tokens = b.tokens,
                                          .pack = pack,
                                          .partial_begin = partial_rows,
                                          .partials = static_cast<int32_t>(pieces),
                                          .stride = config_.prefill_rows};
    }
    for (int64_t piece = 0; piece < pieces; ++piece) {
      item.page_begin = b.begin + static_cast<int32_t>(tiles * piece / pieces) * tile;
      item.page_end =
          std::min(b.end, b.begin + static_cast<int32_t>(tiles * (piece + 1) / pieces) * tile);
      if (pieces > 1)
        item.partial = std::exchange(partial_rows, partial_rows + config_.prefill_rows);
      items[round.items.count++] = item;
    }
  };

  // Groups: some heads of one long sequence, or all heads of several short ones.
  for (size_t i = 0; i < sequences.size();) {
    int64_t bytes = 0;
    int group_heads = kv_heads;
    const size_t group_begin = i;
    blocks_.clear();
    while (i < sequences.size()) {
      const int s = sequences[i];
      const int64_t head_bytes = CeilDiv(kv_len[s], kPageSize) * config_.prefill_page_bytes;
      if (i > group_begin && bytes + head_bytes * kv_heads > kHeadGroupBytes) break;
      bytes += head_bytes * kv_heads;
      for (int first = 0; first < q_begin[s + 1] - q_begin[s]; first += block_tokens) {
        blocks_.push_back(BlockOf(s, first, q_begin, kv_len));
        blocks_.back().widen = static_cast<int32_t>(i);
      }
      ++i;
      if (bytes > kHeadGroupBytes) {
        group_heads =
            static_cast<int>(std::clamp<int64_t>(kHeadGroupBytes / head_bytes, 1, kv_heads));
        break;
      }
    }
    std::sort(blocks_.begin(), blocks_.end(), [](const Block& a, const Block& b) {
      return std::pair(b.end - b.begin, b.end) < std::pair(a.end - a.begin, a.end);
    });
    for (int first = 0; first < kv_heads; first += group_heads) {
      const int begin = (first_kv_head + first) * group_;
      const int end = (first_kv_head + std::min(kv_heads, first + group_heads)) * group_;
      for (const Block& b : blocks_) {
        for (int head = begin; head < end; head += pack) write(b, head);
      }
    }
  }
  rounds_.push_back(round);
}

}  // namespace octavo::cuda
