// Who holds which page: block tables of sequences, reference counts, and the cache of prefixes.
//
// A SequencePages is one sequence's block tables, one per group. It allocates pages ahead of
// writing, publishes those that are full and written, lets go of those behind a window, and gives
// everything back when it dies. Its life:
//
//   SequencePages pages = pool.Acquire(prompt);          // shares the longest usable cached prefix
//   while (...) {
//     if (!pages.Extend(pages.written() + chunk)) ...    // all groups or none; false: no memory,
//     nothing changed
//     ... write tokens [written, written + chunk) at PageForWrite(group, position) ...
//     pages.Publish(tokens, written + chunk);            // full pages become shareable
//     pages.ReleaseBehindWindows();                      // entries become kNoPage
//   }
//
// Invariants:
//  * Only full, written pages are ever shared, and a published page is never written again, so
//  nothing is copied on write.
//    Writes go to positions >= written(); PageForWrite and Publish check that such pages belong to
//    this sequence alone.
//  * A page is in exactly one state: free (in the arena), held (references > 0), or cached
//  (published, no references).
//    Cached pages are evicted in the order in which they were let go, and only when an allocation
//    needs their memory.
//  * Pages are found by a chain of 128-bit hashes over token ids that starts from a seed
//  (PrefixSeed: model, formats, scales).
//    A node also keeps its parent's hash and its own token ids and a lookup compares both, so a
//    hash collision is a miss.
//  * A hit of length L needs every full-attention page below L and, in each window group, the pages
//  that cover
//    [L - window + 1, L). L is a multiple of kPageSize and less than the number of tokens: at least
//    one is recomputed.
//
// Not thread-safe: one thread (the engine's loop) owns it. A BlockPool must outlive its
// SequencePages, and does not move.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kv/arena.h"
#include "kv/policy.h"
#include "kv/scales.h"

namespace octavo {

struct PageHash {
  uint64_t low = 0, high = 0;
  bool operator==(const PageHash&) const = default;
};

// Of everything that decides the bytes of a page besides its tokens. `model` identifies the
// weights, not just a name.
PageHash PrefixSeed(std::string_view model, std::span<const LayerFormat> formats,
                    std::span<const LayerScales> scales);

class BlockPool;

class SequencePages {
 public:
  SequencePages(SequencePages&& other) noexcept;
  SequencePages& operator=(SequencePages&& other) noexcept;
  ~SequencePages() { Free(); }

  // Makes room for `tokens` tokens in every group, or changes nothing and returns false.
  [[nodiscard]] bool Extend(int64_t tokens);

  // The page of a position in [written(), capacity()); this sequence alone holds it.
  uint32_t PageForWrite(int group, int64_t position) const;

  // Tokens [0, written) are now in the pages; `tokens` are at least these ids. Full pages become
  // shareable.
  void Publish(std::span<const int32_t> tokens, int64_t written);

  // Lets go of pages that no query at written() or later can see.
  void ReleaseBehindWindows();

  // Gives back everything; written() and capacity() are 0 again and the next Extend starts an empty
  // sequence.
  void Free();

  std::span<const uint32_t> table(int group) const { return tables_[group]; }
  int64_t written() const { return written_; }
  int64_t capacity() const;  // tokens there is room for

 private:
  friend class BlockPool;
  explicit SequencePages(BlockPool* pool);

  BlockPool* pool_;
  std::vector<std::vector<uint32_t>> tables_;  // by group; all of one length
  std::vector<int64_t> first_held_;            // by group: entries before it are kNoPage
  int64_t written_ = 0;
  int64_t published_pages_ = 0;
  PageHash last_hash_;  // of the published pages
};

class BlockPool {
 public:
  BlockPool(Arena* arena, PageHash seed);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;
  ~BlockPool();

  // The length of the longest usable cached prefix: a multiple of kPageSize, less than
  // tokens.size().
  int64_t Lookup(std::span<const int32_t> tokens) const;

  // A sequence that shares that prefix; written() is its length. No tokens: an empty sequence.
  SequencePages Acquire(std::span<const int32_t> tokens);

  // Whether pages[g] more pages of every group g can be had, by evicting everything cached if need
  // be.
  bool CanAllocate(std::span<const int64_t> pages) const;

  void DropCache();  // evicts all cached pages

  const Arena& arena() const { return *arena_; }
  int64_t held(int group) const { return counts_[group].held; }      // pages with references
  int64_t cached(int group) const { return counts_[group].cached; }  // published pages without
  int references(uint32_t page) const { return PageOf(page).references; }

 private:
  friend class SequencePages;

  // A full page's tokens, as a link of the chain, and where each group keeps it.
  struct Node {
    PageHash parent;
    std::array<int32_t, kPageSize> tokens;
    std::vector<uint32_t> pages;  // by group; kNoPage: not cached there
  };
  struct Page {
    int references = 0;
    bool published = false;
    PageHash hash = {};                         // of its node, if published
    uint32_t older = kNoPage, newer = kNoPage;  // neighbours in the eviction order, if cached
  };
  struct GroupCounts {
    int64_t held = 0, cached = 0;
    int64_t pinned_slabs = 0;  // slabs with a held page
  };
  struct HashOfHash {
    size_t operator()(const PageHash& hash) const { return hash.low; }
  };
  // A prefix that Lookup found: its length in pages and the hashes of these pages.
  struct Prefix {
    int64_t pages = 0;
    std::vector<PageHash> hashes;
  };

  Page& PageOf(uint32_t page) { return pages_[arena_->IndexOf(page)]; }
  const Page& PageOf(uint32_t page) const { return pages_[arena_->IndexOf(page)]; }
  int groups() const { return static_cast<int>(counts_.size()); }
  int window(int group) const { return arena_->geometry().groups[group].window; }

  Prefix FindPrefix(std::span<const int32_t> tokens) const;
  const Node* FindNode(PageHash hash, PageHash parent, const int32_t* tokens) const;
  void PublishPage(int group, uint32_t page, PageHash hash, PageHash parent, const int32_t* tokens);

  uint32_t Allocate(int group);  // evicts as needed; kNoPage: nothing left to evict. One reference.
  void AddReference(int group, uint32_t page);
  void DropReference(int group, uint32_t page);
  void Pin(int group, uint32_t page);
  void Unpin(int group, uint32_t page);
  void Unlink(Page* page);
  void EvictOldest();

  Arena* arena_;
  PageHash seed_;
  std::unordered_map<PageHash, Node, HashOfHash> nodes_;
  std::vector<Page> pages_;  // by Arena::IndexOf
  std::vector<int32_t> held_in_slab_;
  std::vector<GroupCounts> counts_;
  uint32_t oldest_ = kNoPage, newest_ = kNoPage;
};

}  // namespace octavo
