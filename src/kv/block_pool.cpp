#include "kv/block_pool.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include <xxhash.h>

#include "base/error.h"

namespace octavo {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first token that a query at `position` sees.
int64_t FirstVisible(int window, int64_t position) {
  return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
}

PageHash HashBytes(const void* data, size_t bytes) {
  const XXH128_hash_t hash = XXH3_128bits(data, bytes);
  return {.low = hash.low64, .high = hash.high64};
}

PageHash ChainHash(PageHash parent, const int32_t* tokens) {
  struct {
    PageHash parent;
    int32_t tokens[kPageSize];
  } link;
  link.parent = parent;
  std::memcpy(link.tokens, tokens, sizeof(link.tokens));
  return HashBytes(&link, sizeof(link));
}

}  // namespace

PageHash PrefixSeed(std::string_view model, std::span<const LayerFormat> formats,
                    std::span<const LayerScales> scales) {
  std::string bytes(model);
  bytes += '\0';
  for (const LayerFormat& format : formats) {
    bytes += static_cast<char>(format.k);
    bytes += static_cast<char>(format.v);
  }
  for (const LayerScales& layer : scales) {
    for (const std::vector<float>& values : {layer.k.values, layer.v.values}) {
      bytes += static_cast<char>(values.size());
      bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    }
  }
  return HashBytes(bytes.data(), bytes.size());
}

// --- SequencePages

SequencePages::SequencePages(BlockPool* pool)
    : pool_(pool), tables_(pool->groups()), first_held_(pool->groups()), last_hash_(pool->seed_) {}

SequencePages::SequencePages(SequencePages&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)),
      tables_(std::move(other.tables_)),
      first_held_(std::move(other.first_held_)),
      written_(other.written_),
      published_pages_(other.published_pages_),
      last_hash_(other.last_hash_) {}

SequencePages& SequencePages::operator=(SequencePages&& other) noexcept {
  if (this == &other) return *this;
  Free();
  pool_ = std::exchange(other.pool_, nullptr);
  tables_ = std::move(other.tables_);
  first_held_ = std::move(other.first_held_);
  written_ = other.written_;
  published_pages_ = other.published_pages_;
  last_hash_ = other.last_hash_;
  return *this;
}

int64_t SequencePages::capacity() const {
  return static_cast<int64_t>(tables_[0].size()) * kPageSize;
}

bool SequencePages::Extend(int64_t tokens) {
  const int64_t have = static_cast<int64_t>(tables_[0].size());
  const int64_t more = CeilDiv(tokens, kPageSize) - have;
  if (more <= 0) return true;
  const std::vector<int64_t> needed(tables_.size(), more);
  if (!pool_->CanAllocate(needed)) return false;
  // An allocation may settle in a slab that eviction would have emptied for another group. Then
  // everything cached is evicted by now, and a second attempt packs as tightly as CanAllocate
  // counted.
  for (int attempt = 0; attempt < 2; ++attempt) {
    bool complete = true;
    for (int g = 0; g < pool_->groups() && complete; ++g) {
      for (int64_t i = 0; i < more && complete; ++i) {
        const uint32_t page = pool_->Allocate(g);
        complete = page != kNoPage;
        if (complete) tables_[g].push_back(page);
      }
    }
    if (complete) return true;
    for (int g = 0; g < pool_->groups(); ++g) {
      for (; static_cast<int64_t>(tables_[g].size()) > have; tables_[g].pop_back()) {
        pool_->DropReference(g, tables_[g].back());
      }
    }
  }
  OCTAVO_CHECK(false && "CanAllocate promised these pages", more);
  return false;
}

uint32_t SequencePages::PageForWrite(int group, int64_t position) const {
  OCTAVO_CHECK(position >= written_ && position < capacity(), position, written_, capacity());
  const uint32_t page = tables_[group][position / kPageSize];
  OCTAVO_CHECK(page != kNoPage, group, position);
  const BlockPool::Page& info = pool_->PageOf(page);
  OCTAVO_CHECK(info.references == 1 && !info.published, group, position, info.references);
  return page;
}

void SequencePages::Publish(std::span<const int32_t> tokens, int64_t written) {
  OCTAVO_CHECK(written >= written_ && written <= capacity(), written, written_, capacity());
  OCTAVO_CHECK(static_cast<int64_t>(tokens.size()) >= written, tokens.size(), written);
  for (; (published_pages_ + 1) * kPageSize <= written; ++published_pages_) {
    const int32_t* page_tokens = tokens.data() + published_pages_ * kPageSize;
    const PageHash hash = ChainHash(last_hash_, page_tokens);
    for (int g = 0; g < pool_->groups(); ++g) {
      const uint32_t page = PageForWrite(g, std::max(written_, published_pages_ * kPageSize));
      pool_->PublishPage(g, page, hash, last_hash_, page_tokens);
    }
    last_hash_ = hash;
  }
  written_ = written;
}

void SequencePages::ReleaseBehindWindows() {
  for (int g = 0; g < pool_->groups(); ++g) {
    const int64_t keep = FirstVisible(pool_->window(g), written_) / kPageSize;
    for (; first_held_[g] < keep; ++first_held_[g]) {
      pool_->DropReference(g, std::exchange(tables_[g][first_held_[g]], kNoPage));
    }
  }
}

void SequencePages::Free() {
  if (pool_ == nullptr) return;
  // The last pages first: they become the oldest, so that eviction shortens a prefix from its end.
  for (int64_t i = static_cast<int64_t>(tables_[0].size()); i-- > 0;) {
    for (int g = 0; g < pool_->groups(); ++g) {
      if (i >= first_held_[g]) pool_->DropReference(g, tables_[g][i]);
    }
  }
  for (auto& table : tables_) table.clear();
  std::fill(first_held_.begin(), first_held_.end(), 0);
  written_ = published_pages_ = 0;
  last_hash_ = pool_->seed_;
}

// --- BlockPool: prefixes

BlockPool::BlockPool(Arena* arena, PageHash seed)
    : arena_(arena),
      seed_(seed),
      pages_(arena->index_limit()),
      held_in_slab_(arena->slabs()),
      counts_(arena->geometry().groups.size()) {}

BlockPool::~BlockPool() {
  for (const GroupCounts& counts : counts_) {
    OCTAVO_CHECK(counts.held == 0 && "a sequence outlives its pool", counts.held);
  }
  DropCache();
}

const BlockPool::Node* BlockPool::FindNode(PageHash hash, PageHash parent,
                                           const int32_t* tokens) const {
  const auto found = nodes_.find(hash);
  if (found == nodes_.end()) return nullptr;
  const Node& node = found->second;
  if (node.parent != parent) return nullptr;
  return std::equal(node.tokens.begin(), node.tokens.end(), tokens) ? &node : nullptr;
}

BlockPool::Prefix BlockPool::FindPrefix(std::span<const int32_t> tokens) const {
  Prefix prefix;
  std::vector<int64_t> run(groups());  // by group: cached pages in a row that end at page i
  const int64_t limit = (static_cast<int64_t>(tokens.size()) - 1) / kPageSize;
  PageHash parent = seed_;
  for (int64_t i = 0; i < limit; ++i) {
    const int32_t* page_tokens = tokens.data() + i * kPageSize;
    const PageHash hash = ChainHash(parent, page_tokens);
    const Node* node = FindNode(hash, parent, page_tokens);
    prefix.hashes.push_back(hash);
    parent = hash;

    const int64_t length = (i + 1) * kPageSize;
    bool usable = true;
    for (int g = 0; g < groups(); ++g) {
      run[g] = node != nullptr && node->pages[g] != kNoPage ? run[g] + 1 : 0;
      const int64_t first = FirstVisible(window(g), length) / kPageSize;
      const bool enough = run[g] >= i + 1 - first;
      if (!enough && window(g) == 0) {  // and no longer prefix can have it
        prefix.hashes.resize(prefix.pages);
        return prefix;
      }
      usable = usable && enough;
    }
    if (usable) prefix.pages = i + 1;
  }
  prefix.hashes.resize(prefix.pages);
  return prefix;
}

int64_t BlockPool::Lookup(std::span<const int32_t> tokens) const {
  return tokens.empty() ? 0 : FindPrefix(tokens).pages * kPageSize;
}

SequencePages BlockPool::Acquire(std::span<const int32_t> tokens) {
  SequencePages sequence(this);
  if (tokens.empty()) return sequence;
  const Prefix prefix = FindPrefix(tokens);
  if (prefix.pages == 0) return sequence;
  sequence.written_ = prefix.pages * kPageSize;
  sequence.published_pages_ = prefix.pages;
  sequence.last_hash_ = prefix.hashes.back();
  for (int g = 0; g < groups(); ++g) {
    const int64_t first =
        std::min(FirstVisible(window(g), sequence.written_) / kPageSize, prefix.pages);
    sequence.first_held_[g] = first;
    sequence.tables_[g].assign(prefix.pages, kNoPage);
    for (int64_t i = first; i < prefix.pages; ++i) {
      const uint32_t page = nodes_.at(prefix.hashes[i]).pages[g];
      AddReference(g, page);
      sequence.tables_[g][i] = page;
    }
  }
  return sequence;
}

void BlockPool::PublishPage(int group, uint32_t page, PageHash hash, PageHash parent,
                            const int32_t* tokens) {
  auto [found, is_new] = nodes_.try_emplace(hash);
  Node& node = found->second;
  if (is_new) {
    node.parent = parent;
    std::copy_n(tokens, kPageSize, node.tokens.begin());
    node.pages.assign(groups(), kNoPage);
  }
  // The same tokens are cached already, or other tokens have the same hash: this page stays
  // private.
  if (node.pages[group] != kNoPage || FindNode(hash, parent, tokens) == nullptr) return;
  node.pages[group] = page;
  Page& info = PageOf(page);
  info.published = true;
  info.hash = hash;
}

// --- BlockPool: pages

bool BlockPool::CanAllocate(std::span<const int64_t> pages) const {
  int64_t slabs = arena_->slabs();
  for (int g = 0; g < groups(); ++g) {
    const int64_t per_slab = arena_->geometry().PagesPerSlab(g);
    const int64_t room = counts_[g].pinned_slabs * per_slab - counts_[g].held;
    slabs -= counts_[g].pinned_slabs + CeilDiv(std::max<int64_t>(0, pages[g] - room), per_slab);
  }
  return slabs >= 0;
}

uint32_t BlockPool::Allocate(int group) {
  uint32_t page = arena_->Allocate(group);
  while (page == kNoPage && oldest_ != kNoPage) {
    EvictOldest();
    page = arena_->Allocate(group);
  }
  if (page == kNoPage) return page;
  PageOf(page) = Page{.references = 1};
  Pin(group, page);
  return page;
}

void BlockPool::Pin(int group, uint32_t page) {
  ++counts_[group].held;
  if (held_in_slab_[arena_->SlabOf(page)]++ == 0) ++counts_[group].pinned_slabs;
}

void BlockPool::Unpin(int group, uint32_t page) {
  --counts_[group].held;
  if (--held_in_slab_[arena_->SlabOf(page)] == 0) --counts_[group].pinned_slabs;
}

void BlockPool::AddReference(int group, uint32_t page) {
  Page& info = PageOf(page);
  OCTAVO_CHECK(info.published, page);
  if (info.references++ > 0) return;
  Unlink(&info);
  --counts_[group].cached;
  Pin(group, page);
}

void BlockPool::DropReference(int group, uint32_t page) {
  Page& info = PageOf(page);
  OCTAVO_CHECK(info.references > 0, page);
  if (--info.references > 0) return;
  Unpin(group, page);
  if (!info.published) {
    arena_->Free(page);
    return;
  }
  ++counts_[group].cached;
  info.older = newest_;
  info.newer = kNoPage;
  (newest_ == kNoPage ? oldest_ : PageOf(newest_).newer) = page;
  newest_ = page;
}

void BlockPool::Unlink(Page* page) {
  (page->older == kNoPage ? oldest_ : PageOf(page->older).newer) = page->newer;
  (page->newer == kNoPage ? newest_ : PageOf(page->newer).older) = page->older;
  page->older = page->newer = kNoPage;
}

void BlockPool::EvictOldest() {
  const uint32_t page = oldest_;
  const int group = arena_->GroupOf(page);
  Page& info = PageOf(page);
  OCTAVO_CHECK(info.references == 0 && info.published, page, info.references);
  Unlink(&info);
  --counts_[group].cached;
  const auto node = nodes_.find(info.hash);
  OCTAVO_CHECK(node != nodes_.end() && node->second.pages[group] == page, page);
  auto& pages = node->second.pages;
  pages[group] = kNoPage;
  if (std::all_of(pages.begin(), pages.end(), [](uint32_t p) { return p == kNoPage; })) {
    nodes_.erase(node);
  }
  info = Page{};
  arena_->Free(page);
}

void BlockPool::DropCache() {
  while (oldest_ != kNoPage) EvictOldest();
}

}  // namespace octavo
