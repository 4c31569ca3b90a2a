// How a step's attention is cut into work items: pure host code, the same on any machine.
//
// Sequences with at most kDecodeRows rows (query tokens times group) become decode items, one per
// kv head and range of pages; the others become blocks of rows for prefill. Where a machine has
// more room than there are items, ranges of pages are cut at whole pages (prefill: whole KV tiles)
// counted from page 0, and combine items say which partial results belong together.
//
// Decodes are laid end to end and dealt out in equal shares, cut wherever a share ends, so that
// all blocks of a persistent grid finish together. Item w is the first of block w, which finds the
// rest of its share by links; a block without one has sequence -1 there. Where nothing is cut,
// items are shared: blocks take them as they get done, large ones first. Prefill items stand in
// groups of heads whose K and V fit in L2, longest first within. Where prefill reads widened pages
// (widen_pages.h), it goes in rounds of what there is room for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/work.h"
#include "octavo/attention.h"

namespace octavo::cuda {

inline constexpr int kDecodeRows = 16;  // of an item, at most

struct PlanConfig {
  AttentionShape shape;
  AttentionLimits limits;
  bool deterministic = false;
  bool fp8_prefill = false;        // prefill reads e4m3 queries
  int64_t page_bytes = 0;          // K and V of one page and kv head, in the cache
  int workers = 0;                 // items that the machine works on at a time
  int prefill_rows = 0;            // of a block; 0: there is no prefill
  int prefill_tile_pages = 1;      // of a KV tile
  int64_t prefill_page_bytes = 0;  // as page_bytes, as prefill reads them
  int64_t widened_pages = 0;       // room for so many, of one kv head each; 0: none are widened
};

// Pages of a sequence that prefill reads, at most.
int64_t MaxPrefillPages(const AttentionShape& shape, const AttentionLimits& limits);

// What is copied to the device: byte offsets of arrays in one buffer. What a step uses stands in
// front wherever that is possible.
struct PlanLayout {
  int64_t counts = 0;            // PlanCounts
  int64_t decode_items = 0;      // WorkItem []
  int64_t decode_links = 0;      // ItemLink [decode items]
  int64_t fp8_queries = 0;       // uint8_t [limits.tokens]
  int64_t prefill_rounds = 0;    // PrefillRound []
  int64_t widens = 0;            // WidenItem []
  int64_t prefill_items = 0;     // WorkItem []
  int64_t prefill_combines = 0;  // CombineItem []
  int64_t bytes = 0;
};

class Planner {
 public:
  explicit Planner(const PlanConfig& config);

  const PlanConfig& config() const { return config_; }
  const PlanLayout& layout() const { return layout_; }
  // Rows of partial results and number of cut heads of decodes that any step may need.
  int64_t decode_partial_rows() const { return decode_partial_rows_; }
  int64_t prefill_partial_rows() const { return prefill_partial_rows_; }
  int64_t decode_combines() const { return decode_combines_; }
  // Of the last Make: at least one where there may be prefill. Up to max_rounds() empty ones follow
  // on the device.
  std::span<const PrefillRound> rounds() const { return rounds_; }
  int max_rounds() const { return max_rounds_; }
  // Query heads that an item holds of each token.
  int decode_pack() const { return group_; }
  int prefill_pack() const { return 64 % group_ == 0 ? group_ : 1; }

  // Writes a step's lists to `upload` ([layout().bytes], which it need not clear); returns how many
  // of its bytes count. Arguments as in AttentionPlan::Make, already checked.
  int64_t Make(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
               std::byte* upload);

 private:
  struct Decode {
    int32_t sequence, begin, end;  // pages that any of its rows sees
  };
  struct Chunk {
    int32_t decode, head, begin, end;
    int32_t partial, combine;  // or -1
    int32_t partial_begin, partials;
    int32_t owner;  // the block that takes it, or -1: shared
  };
  struct Cut {
    int32_t page, owner;  // of the chunk that ends there
  };
  struct Block {
    int32_t sequence, first_token, tokens, begin, end;
    int32_t widen;  // index of its WidenItem in the round
  };

  static int64_t CostOf(const Decode& decode);  // of one of its heads, in pages
  int FirstPage(int position) const;
  void CutDecodes(std::span<const int32_t> q_begin);
  template <typename Size>
  void CutInPieces(std::span<const int32_t> q_begin, const Size& size);
  void CutInShares(std::span<const int32_t> q_begin, double share);
  void AddWhole(int32_t decode, int head, int32_t owner);
  // Adds the chunks of one kv head that end at the pages in cuts_.
  void AddChunks(int32_t decode, int head, std::span<const int32_t> q_begin);
  void WriteDecodes(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                    std::byte* upload);
  Block BlockOf(int sequence, int first_token, std::span<const int32_t> q_begin,
                std::span<const int32_t> kv_len) const;
  int64_t TilesOf(const Block& block) const;
  // The pages that prefill of a sequence reads.
  WidenItem PagesOf(int sequence, std::span<const int32_t> q_begin,
                    std::span<const int32_t> kv_len) const;
  void WritePrefills(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                     std::byte* upload);
  void WriteRound(std::span<const int32_t> sequences, int first_kv_head, int kv_heads,
                  std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                  std::byte* upload);

  PlanConfig config_;
  PlanLayout layout_;
  PlanCounts counts_{};
  int group_ = 1;
  int64_t decode_pieces_ = 0;  // of cut sequences, times kv heads, at most
  int64_t decode_partial_rows_ = 0, decode_combines_ = 0;
  int64_t prefill_pieces_ = 0, all_prefill_pieces_ = 0;  // of cut blocks: a round's, a step's
  int64_t prefill_partial_rows_ = 0, prefill_blocks_ = 0;

  // Scratch, kept so that planning does not allocate.
  std::vector<Decode> decodes_;
  std::vector<Chunk> chunks_;
  std::vector<Cut> cuts_;
  int32_t combine_count_ = 0, partial_rows_ = 0;
  std::vector<int32_t> prefills_;
  std::vector<Block> blocks_;
  std::vector<PrefillRound> rounds_;
  int max_rounds_ = 0;
  int64_t pieces_left_ = 0;  // of all_prefill_pieces_
};

}  // namespace octavo::cuda
