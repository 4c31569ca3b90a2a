#include "kernels/cuda/plan.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace octavo::cuda {
namespace {

// Items of cut sequences for each worker, at most: bounds the partial results.
constexpr int kPiecesPerWorker = 8;
// A chunk takes this share of what is left for one worker, as in guided self-scheduling: large
// chunks first, so that partial results are few, and a tail that no worker waits for long.
constexpr double kChunkShare = 0.75;
// No smaller chunks than this many bytes of K and V, unless workers would have nothing to do.
constexpr int64_t kChunkBytes = 128 << 10;
constexpr int kMinChunkPages = 2;
// --deterministic: pieces of a sequence, whatever else there is to do, and their smallest size.
constexpr int kFixedPieces = 16;
constexpr int kFixedPiecePages = 32;
// Prefill: K and V of the heads worked on together, in bytes; L2 holds 50 MB and more.
constexpr int64_t kHeadGroupBytes = 32 << 20;
// Prefill: no smaller pieces than this many tiles.
constexpr int kMinPieceTiles = 8;

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
    decode_pieces_ = int64_t{config_.workers} * kPiecesPerWorker;
    decode_partial_rows_ =
        decode_pieces_ * std::min<int64_t>(kDecodeRows, int64_t{limits.tokens} * group_);
  }
  decode_combines_ = std::min(sequences * shape.kv_heads, decode_pieces_ / 2);
  const int64_t decode_items = int64_t{limits.sequences} * shape.kv_heads + decode_pieces_;

  if (config_.prefill_rows > 0) {
    // Every sequence may end with a block that is not full.
    const int block_tokens = config_.prefill_rows / prefill_pack();
    prefill_blocks_ = (limits.tokens / block_tokens + sequences) * (shape.heads / prefill_pack());
    if (!config_.deterministic) prefill_pieces_ = 2 * config_.workers;
    prefill_partial_rows_ = prefill_pieces_ * config_.prefill_rows;
  }

  layout_.counts = Claim<PlanCounts>(1, &layout_.bytes);
  layout_.decode_items = Claim<WorkItem>(decode_items, &layout_.bytes);
  layout_.decode_combine = Claim<int32_t>(decode_items, &layout_.bytes);
  layout_.decode_combines = Claim<CombineItem>(decode_combines_, &layout_.bytes);
  layout_.fp8_queries = Claim<uint8_t>(limits.tokens, &layout_.bytes);
  layout_.prefill_items = Claim<WorkItem>(prefill_blocks_ + prefill_pieces_, &layout_.bytes);
  layout_.prefill_combines = Claim<CombineItem>(prefill_pieces_ / 2, &layout_.bytes);
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
    if (tokens * group_ > kDecodeRows) {
      prefills_.push_back(s);
      continue;
    }
    const int pages = static_cast<int>(CeilDiv(kv_len[s], kPageSize));
    const int begin = std::min(pages, FirstPage(std::max(0, kv_len[s] - tokens)));
    decodes_.push_back({.sequence = s, .begin = begin, .end = pages});
  }
  chunks_.clear();
  if (config_.deterministic) {
    CutDecodesByLength();
  } else {
    CutDecodes();
  }
  WriteDecodes(q_begin, kv_len, upload);
  WritePrefills(q_begin, kv_len, upload);
  *ArrayAt<PlanCounts>(upload, layout_.counts) = counts_;

  if (counts_.prefill_items > 0) {
    return counts_.prefill_combines == 0
               ? layout_.prefill_items + counts_.prefill_items * int64_t{sizeof(WorkItem)}
               : layout_.prefill_combines + counts_.prefill_combines * int64_t{sizeof(CombineItem)};
  }
  return layout_.prefill_items;
}

// Rounds over the sequences; in each round a sequence gives one chunk per kv head, of a size that
// shrinks with what is left of all. Long sequences are cut often and evenly, short ones never.
void Planner::CutDecodes() {
  const int kv_heads = config_.shape.kv_heads;
  int64_t left = 0;
  for (const Decode& d : decodes_) left += int64_t{d.end - d.begin} * kv_heads;
  const int64_t per_worker = CeilDiv(left, config_.workers);
  const auto smallest =
      std::max<int64_t>(kMinChunkPages, std::min(kChunkBytes / config_.page_bytes, per_worker));
  int64_t pieces_left = decode_pieces_ / kv_heads;

  const auto count = static_cast<int32_t>(decodes_.size());
  for (bool more = count > 0, first = true; more; first = false) {
    more = false;
    for (int32_t i = 0; i < count; ++i) {
      Decode& d = decodes_[i];
      const int64_t pages = d.end - d.begin;
      if (pages == 0 && !first) continue;
      const auto share =
          static_cast<int64_t>(kChunkShare * static_cast<double>(left) / config_.workers);
      int64_t take = std::max(smallest, share);
      // What would be left behind is worth a chunk; the first cut makes two of them.
      const int needs = d.pieces == 0 ? 2 : 1;
      if (take + take / 4 >= pages || pieces_left < needs) {
        take = pages;
      } else {
        pieces_left -= needs;
        more = true;
      }
      chunks_.push_back({.decode = i,
                         .begin = d.begin,
                         .end = d.begin + static_cast<int32_t>(take),
                         .piece = d.pieces++});
      d.begin += static_cast<int32_t>(take);
      left -= take * kv_heads;
    }
  }
}

// Chunks whose boundaries follow from the sequence's own length. Long sequences first.
void Planner::CutDecodesByLength() {
  const auto count = static_cast<int32_t>(decodes_.size());
  for (int32_t i = 0; i < count; ++i) {
    Decode& d = decodes_[i];
    const int pages = d.end - d.begin;
    const int size = std::max(kFixedPiecePages, static_cast<int>(CeilDiv(pages, kFixedPieces)));
    do {
      const int end = std::min(d.end, d.begin + size);
      chunks_.push_back({.decode = i, .begin = d.begin, .end = end, .piece = d.pieces++});
      d.begin = end;
    } while (d.begin < d.end);
  }
  std::stable_sort(chunks_.begin(), chunks_.end(), [](const Chunk& a, const Chunk& b) {
    return a.end - a.begin > b.end - b.begin;
  });
}

void Planner::WriteDecodes(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                           std::byte* upload) {
  auto* items = ArrayAt<WorkItem>(upload, layout_.decode_items);
  auto* item_combine = ArrayAt<int32_t>(upload, layout_.decode_combine);
  auto* combines = ArrayAt<CombineItem>(upload, layout_.decode_combines);
  const int kv_heads = config_.shape.kv_heads;
  int32_t combine_count = 0, partial_rows = 0;
  for (Decode& d : decodes_) {
    if (d.pieces < 2) continue;
    const int tokens = q_begin[d.sequence + 1] - q_begin[d.sequence];
    const int rows = tokens * group_;
    d.combine_begin = combine_count;
    d.partial_begin = partial_rows;
    for (int head = 0; head < kv_heads; ++head) {
      combines[combine_count++] = {.head = head * group_,
                                   .q_row = q_begin[d.sequence],
                                   .q_tokens = tokens,
                                   .pack = group_,
                                   .partial_begin = partial_rows,
                                   .partials = d.pieces,
                                   .stride = rows};
      partial_rows += d.pieces * rows;
    }
  }
  OCTAVO_CHECK(combine_count <= decode_combines_ && partial_rows <= decode_partial_rows_,
               combine_count, partial_rows);

  int32_t count = 0;
  for (const Chunk& chunk : chunks_) {
    const Decode& d = decodes_[chunk.decode];
    const int tokens = q_begin[d.sequence + 1] - q_begin[d.sequence];
    const int rows = tokens * group_;
    const bool cut = d.pieces > 1;
    for (int head = 0; head < kv_heads; ++head) {
      items[count] = {
          .sequence = d.sequence,
          .head = head * group_,
          .q_row = q_begin[d.sequence],
          .q_tokens = tokens,
          .position = kv_len[d.sequence] - tokens,
          .page_begin = chunk.begin,
          .page_end = chunk.end,
          .partial = cut ? d.partial_begin + (head * d.pieces + chunk.piece) * rows : -1};
      item_combine[count++] = cut ? d.combine_begin + head : -1;
    }
  }
  counts_.decode_items = count;
}

void Planner::WritePrefills(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                            std::byte* upload) {
  if (config_.fp8_prefill && config_.prefill_rows > 0) {
    auto* fp8 = ArrayAt<uint8_t>(upload, layout_.fp8_queries);
    std::fill_n(fp8, config_.limits.tokens, uint8_t{0});
    for (const int s : prefills_) std::fill(fp8 + q_begin[s], fp8 + q_begin[s + 1], uint8_t{1});
  }
  if (prefills_.empty()) return;
  const int pack = prefill_pack();
  const int block_tokens = config_.prefill_rows / pack;
  const int tile = config_.prefill_tile_pages;
  const int kv_heads = config_.shape.kv_heads, items_per_head = group_ / pack;

  const auto block_of = [&](int s, int first) {
    const int tokens = std::min(block_tokens, q_begin[s + 1] - q_begin[s] - first);
    const int position = kv_len[s] - (q_begin[s + 1] - q_begin[s]) + first;
    return Block{.sequence = s,
                 .first_token = first,
                 .tokens = tokens,
                 .begin = FirstPage(position) / tile * tile,
                 .end = (position + tokens + kPageSize - 1) / kPageSize};
  };
  const auto tiles_of = [&](const Block& b) { return CeilDiv(b.end - b.begin, tile); };

  // Cut only what is longer than an equal share of everything.
  int64_t all_tiles = 0;
  for (const int s : prefills_) {
    for (int first = 0; first < q_begin[s + 1] - q_begin[s]; first += block_tokens) {
      all_tiles += tiles_of(block_of(s, first)) * kv_heads * items_per_head;
    }
  }
  const int64_t share = std::max<int64_t>(kMinPieceTiles, CeilDiv(all_tiles, config_.workers));

  auto* items = ArrayAt<WorkItem>(upload, layout_.prefill_items);
  auto* combines = ArrayAt<CombineItem>(upload, layout_.prefill_combines);
  int64_t pieces_left = prefill_pieces_;
  int32_t partial_rows = 0;

  const auto write = [&](const Block& b, int head) {
    const int64_t tiles = tiles_of(b);
    int64_t pieces = std::min(CeilDiv(tiles, share), pieces_left);
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
    if (pieces > 1) {
      pieces_left -= pieces;
      combines[counts_.prefill_combines++] = {.head = head,
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
      items[counts_.prefill_items++] = item;
    }
  };

  // Groups: some heads of one long sequence, or all heads of several short ones.
  for (size_t i = 0; i < prefills_.size();) {
    int64_t bytes = 0;
    int group_heads = kv_heads;
    const size_t group_begin = i;
    blocks_.clear();
    while (i < prefills_.size()) {
      const int s = prefills_[i];
      const int64_t head_bytes = CeilDiv(kv_len[s], kPageSize) * config_.page_bytes;
      if (i > group_begin && bytes + head_bytes * kv_heads > kHeadGroupBytes) break;
      bytes += head_bytes * kv_heads;
      for (int first = 0; first < q_begin[s + 1] - q_begin[s]; first += block_tokens) {
        blocks_.push_back(block_of(s, first));
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
    for (int first_head = 0; first_head < kv_heads; first_head += group_heads) {
      const int end_head = std::min(kv_heads, first_head + group_heads);
      for (const Block& b : blocks_) {
        for (int head = first_head * group_; head < end_head * group_; head += pack) write(b, head);
      }
    }
  }
}

}  // namespace octavo::cuda
