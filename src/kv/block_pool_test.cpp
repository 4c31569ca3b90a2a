#include "kv/block_pool.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace octavo {
namespace {

constexpr LayerFormat kBf16 = {KvFormat::kBF16, KvFormat::kBF16};
constexpr LayerFormat kFp8 = {KvFormat::kFp8E4M3, KvFormat::kFp8E4M3};
constexpr LayerFormat kInt8 = {KvFormat::kInt8PerTokenHead, KvFormat::kInt8PerTokenHead};

using Tokens = std::vector<int32_t>;

GroupGeometry Geometry(const std::vector<int>& windows, const std::vector<LayerFormat>& formats,
                       int64_t bytes) {
  std::vector<KvLayerFacts> layers;
  for (const int window : windows) {
    layers.push_back({.window = window, .kv_heads = 1, .head_dim = 64});
  }
  return MakeGroups(layers, formats, bytes);
}

// An arena and a pool of `slabs` slabs.
struct Fixture {
  Fixture(const std::vector<int>& windows, const std::vector<LayerFormat>& formats, int64_t slabs)
      : geometry(Geometry(windows, formats, 1 << 20)),
        arena(nullptr, slabs * geometry.slab_bytes, geometry),
        pool(&arena, PrefixSeed("test", formats, {})) {}
  GroupGeometry geometry;
  Arena arena;
  BlockPool pool;
};

Tokens Text(int length, int seed = 0) {
  Tokens tokens(length);
  for (int i = 0; i < length; ++i) tokens[i] = seed * 1000003 + i;
  return tokens;
}

// Runs a whole prompt through in one chunk and lets go of it.
void Cache(BlockPool* pool, const Tokens& tokens) {
  SequencePages pages = pool->Acquire(tokens);
  ASSERT_TRUE(pages.Extend(tokens.size()));
  pages.Publish(tokens, tokens.size());
  pages.ReleaseBehindWindows();
}

TEST(PrefixSeed, CoversModelFormatsAndScales) {
  const std::vector<LayerFormat> a = {kFp8}, b = {kBf16};
  std::vector<LayerScales> one(1), two(1);
  one[0].k.values = {1.0f};
  two[0].v.values = {1.0f};
  const PageHash seed = PrefixSeed("m", a, one);
  EXPECT_EQ(seed, PrefixSeed("m", a, one));
  EXPECT_NE(seed, PrefixSeed("n", a, one));
  EXPECT_NE(seed, PrefixSeed("m", b, one));
  EXPECT_NE(seed, PrefixSeed("m", a, two));
  one[0].k.values = {1.5f};
  EXPECT_NE(seed, PrefixSeed("m", a, one));
}

TEST(BlockPool, OnlyFullPagesAreSharedAndOneTokenIsRecomputed) {
  Fixture f({0}, {kFp8}, 100);
  Cache(&f.pool, Text(200));
  EXPECT_EQ(f.pool.cached(0), 3);
  EXPECT_EQ(f.pool.Lookup(Text(200)), 192);
  EXPECT_EQ(f.pool.Lookup(Text(193)), 192);
  EXPECT_EQ(f.pool.Lookup(Text(192)), 128);
  EXPECT_EQ(f.pool.Lookup(Text(64)), 0);
  EXPECT_EQ(f.pool.Lookup(Text(1)), 0);
  EXPECT_EQ(f.pool.Lookup({}), 0);
  Tokens other = Text(200);
  other[70] = -1;
  EXPECT_EQ(f.pool.Lookup(other), 64);
}

TEST(BlockPool, SharedPagesAreCounted) {
  Fixture f({0}, {kFp8}, 100);
  Cache(&f.pool, Text(200));
  SequencePages a = f.pool.Acquire(Text(200)), b = f.pool.Acquire(Text(150));
  EXPECT_EQ(a.written(), 192);
  EXPECT_EQ(b.written(), 128);
  EXPECT_EQ(a.table(0)[0], b.table(0)[0]);
  EXPECT_EQ(f.pool.references(a.table(0)[0]), 2);
  EXPECT_EQ(f.pool.references(a.table(0)[2]), 1);
  EXPECT_EQ(f.pool.held(0), 3);
  EXPECT_EQ(f.pool.cached(0), 0);
  ASSERT_TRUE(a.Extend(200));
  EXPECT_EQ(a.PageForWrite(0, 192), a.table(0)[3]);
  a.Free();
  EXPECT_EQ(a.capacity(), 0);
  b = f.pool.Acquire({});
  EXPECT_EQ(f.pool.held(0), 0);
  EXPECT_EQ(f.pool.cached(0), 3);
}

TEST(BlockPoolDeathTest, SharedPagesAreNotWritten) {
  Fixture f({0}, {kFp8}, 100);
  Cache(&f.pool, Text(200));
  SequencePages pages = f.pool.Acquire(Text(200));
  EXPECT_DEATH(pages.PageForWrite(0, 191), "position >= written_");
  EXPECT_DEATH(pages.PageForWrite(0, 192), "position < capacity");
  ASSERT_TRUE(pages.Extend(193));
  EXPECT_DEATH(pages.Publish(Text(300), 300), "written <= capacity");
  EXPECT_DEATH(pages.Publish(Text(300), 191), "written >= written_");
  EXPECT_DEATH(pages.Publish(Text(192), 193), "tokens.size");
}

TEST(BlockPool, WindowsLetGoAndStillServePrefixes) {
  Fixture f({0, 100}, {kFp8, kBf16}, 100);
  SequencePages pages = f.pool.Acquire({});
  const Tokens text = Text(1000);
  ASSERT_TRUE(pages.Extend(1000));
  pages.Publish(text, 1000);
  EXPECT_EQ(f.pool.held(1), 16);
  pages.ReleaseBehindWindows();
  // The next query, at 1000, sees tokens from 901 on: page 14.
  EXPECT_EQ(pages.table(1)[13], kNoPage);
  EXPECT_NE(pages.table(1)[14], kNoPage);
  EXPECT_EQ(f.pool.held(1), 2);
  EXPECT_EQ(f.pool.cached(1), 14);
  EXPECT_EQ(f.pool.held(0), 16);
  const SequencePages other = f.pool.Acquire(Text(600));
  EXPECT_EQ(other.written(), 576);
  EXPECT_EQ(other.table(1)[6], kNoPage);  // 576 sees tokens from 477 on: page 7
  EXPECT_NE(other.table(1)[7], kNoPage);
  EXPECT_NE(other.table(1)[8], kNoPage);
}

TEST(BlockPool, ExtendIsAllOrNothingAndKeepsTheCacheWhenItCannotWork) {
  Fixture f({0}, {kFp8}, 10);
  ASSERT_EQ(f.geometry.PagesPerSlab(0), 1);
  Cache(&f.pool, Text(5 * 64));
  SequencePages pages = f.pool.Acquire({});
  EXPECT_FALSE(pages.Extend(11 * 64));
  EXPECT_EQ(pages.capacity(), 0);
  EXPECT_EQ(f.pool.cached(0), 5);
  EXPECT_TRUE(pages.Extend(7 * 64));
  EXPECT_EQ(f.pool.cached(0), 3);
  EXPECT_EQ(f.pool.Lookup(Text(1000)), 3 * 64);  // a prefix is evicted from its end
}

TEST(BlockPool, OneGroupsCacheMakesRoomForAnother) {
  Fixture f({0, 64}, {kFp8, kInt8}, 12);
  for (int i = 0; i < 5; ++i) Cache(&f.pool, Text(129, i));
  SequencePages pages = f.pool.Acquire({});
  int64_t tokens = 64;
  while (pages.Extend(tokens)) {
    pages.Publish(Text(tokens, 99), tokens);
    pages.ReleaseBehindWindows();
    tokens += 64;
  }
  EXPECT_EQ(f.pool.held(1), 1);
  // All memory but what one window needs went to the full-attention group.
  EXPECT_GE(f.pool.held(0), (f.arena.slabs() - 1) * f.geometry.PagesPerSlab(0) - 1);
}

// 10^5 random steps against a model that knows nothing of slabs, nodes or links: what the memory
// holds, who holds which page, which prefixes are published, and in which order pages were let go.
class RandomPool {
 public:
  RandomPool(const std::vector<int>& windows, const std::vector<LayerFormat>& formats,
             int64_t slabs, uint32_t seed)
      : f_(windows, formats, slabs), random_(seed), published_(groups()) {
    memory_.resize(f_.arena.slabs() * f_.geometry.slab_bytes / kPageUnit * kPageSize);
  }

  void Run(int steps);

  int64_t hits = 0, refusals = 0, evictions = 0, shared = 0;

 private:
  struct Running {
    Tokens tokens;
    std::vector<uint64_t> prefixes;  // prefixes[i]: identifies tokens [0, i]
    SequencePages pages;
  };
  struct Cached {
    int group;
    uint32_t page;
  };

  int groups() const { return static_cast<int>(f_.geometry.groups.size()); }
  int Random(int limit) { return static_cast<int>(random_() % limit); }

  Tokens Prompt();
  static std::vector<uint64_t> Prefixes(const Tokens& tokens);
  void Start();
  void Advance(Running* sequence);
  void Write(Running* sequence, int64_t end);
  void Finish(size_t which);
  void Drop(int group, uint32_t page);
  void SyncEvictions();
  int64_t BruteForce(const std::vector<uint64_t>& prefixes) const;
  void CheckMemory(const Running& sequence) const;
  void CheckCounts() const;
  uint64_t* Slot(uint32_t page, int64_t unit, int64_t slot) {
    return &memory_[(page + unit) * kPageSize + slot];
  }
  // The prefix that a full page ends; 0: the page is not published.
  uint64_t PrefixOf(int group, uint32_t page) const {
    const auto found = prefix_of_.find({group, page});
    return found == prefix_of_.end() ? 0 : found->second;
  }

  Fixture f_;
  std::mt19937 random_;
  std::vector<uint64_t>
      memory_;  // per kPageUnit and slot: the prefix whose last token was written there
  std::deque<Running> running_;
  std::map<uint32_t, int> references_;
  std::vector<std::map<uint64_t, uint32_t>> published_;  // by group: prefix -> page
  std::map<std::pair<int, uint32_t>, uint64_t> prefix_of_;
  std::deque<Cached> cached_;  // oldest first
};

Tokens RandomPool::Prompt() {
  // Two kinds of pages, so that prefixes meet.
  Tokens tokens;
  for (int pages = 1 + Random(7); pages > 0; --pages) tokens.insert(tokens.end(), 64, Random(2));
  tokens.resize(tokens.size() - Random(64));
  return tokens;
}

std::vector<uint64_t> RandomPool::Prefixes(const Tokens& tokens) {
  std::vector<uint64_t> prefixes;
  uint64_t prefix = 1;
  for (const int32_t token : tokens) {
    prefix = (prefix ^ static_cast<uint64_t>(token)) * 0x9E3779B97F4A7C15u;
    prefix ^= prefix >> 29;
    prefixes.push_back(prefix);
  }
  return prefixes;
}

int64_t RandomPool::BruteForce(const std::vector<uint64_t>& prefixes) const {
  for (int64_t length = (prefixes.size() - 1) / kPageSize * kPageSize; length > 0; length -= 64) {
    bool usable = true;
    for (int g = 0; g < groups(); ++g) {
      const int window = f_.geometry.groups[g].window;
      for (int64_t i = 0; i < length / kPageSize; ++i) {
        const bool visible = window == 0 || (i + 1) * kPageSize > length - window + 1;
        if (visible && !published_[g].contains(prefixes[(i + 1) * kPageSize - 1])) usable = false;
      }
    }
    if (usable) return length;
  }
  return 0;
}

void RandomPool::Start() {
  Tokens tokens = Prompt();
  std::vector<uint64_t> prefixes = Prefixes(tokens);
  const int64_t length = BruteForce(prefixes);
  ASSERT_EQ(f_.pool.Lookup(tokens), length);
  SequencePages pages = f_.pool.Acquire(tokens);
  ASSERT_EQ(pages.written(), length);
  hits += length > 0;
  for (int g = 0; g < groups(); ++g) {
    for (int64_t i = 0; i < length / kPageSize; ++i) {
      const uint32_t page = pages.table(g)[i];
      if (page == kNoPage) continue;
      ASSERT_EQ(page, published_[g].at(prefixes[(i + 1) * kPageSize - 1]));
      shared += references_[page] > 0;
      if (references_[page]++ > 0) continue;
      std::erase_if(cached_, [&](const Cached& c) { return c.group == g && c.page == page; });
    }
  }
  running_.push_back({std::move(tokens), std::move(prefixes), std::move(pages)});
  CheckMemory(running_.back());
}

void RandomPool::Write(Running* sequence, int64_t end) {
  for (int g = 0; g < groups(); ++g) {
    for (int64_t t = sequence->pages.written(); t < end; ++t) {
      const uint32_t page = sequence->pages.PageForWrite(g, t);
      ASSERT_EQ(references_.at(page), 1);
      ASSERT_EQ(PrefixOf(g, page), 0u);
      for (int64_t unit = 0; unit < f_.geometry.groups[g].page_bytes / kPageUnit; ++unit) {
        *Slot(page, unit, t % kPageSize) = sequence->prefixes[t];
      }
    }
  }
  const int64_t first_full = sequence->pages.written() / kPageSize;
  sequence->pages.Publish(sequence->tokens, end);
  for (int64_t i = first_full; i < end / kPageSize; ++i) {
    for (int g = 0; g < groups(); ++g) {
      const uint64_t prefix = sequence->prefixes[(i + 1) * kPageSize - 1];
      const uint32_t page = sequence->pages.table(g)[i];
      if (published_[g].emplace(prefix, page).second) prefix_of_[{g, page}] = prefix;
    }
  }
}

void RandomPool::Advance(Running* sequence) {
  const int64_t written = sequence->pages.written();
  const int64_t end =
      std::min<int64_t>(written + 1 + Random(150), static_cast<int64_t>(sequence->tokens.size()));
  const int64_t had = sequence->pages.capacity() / kPageSize;
  const bool fits = sequence->pages.Extend(end);
  SyncEvictions();
  refusals += !fits;
  if (!fits) {
    ASSERT_EQ(sequence->pages.capacity() / kPageSize, had);
    return;
  }
  for (int g = 0; g < groups(); ++g) {
    for (const uint32_t page : sequence->pages.table(g).subspan(had)) {
      ASSERT_EQ(references_[page]++, 0);
      ASSERT_EQ(PrefixOf(g, page), 0u);
    }
  }
  Write(sequence, end);
  CheckMemory(*sequence);
  if (Random(4) == 0) return;
  std::vector<std::vector<uint32_t>> before;
  for (int g = 0; g < groups(); ++g) {
    const auto table = sequence->pages.table(g);
    before.emplace_back(table.begin(), table.end());
  }
  sequence->pages.ReleaseBehindWindows();
  for (int g = 0; g < groups(); ++g) {
    for (size_t i = 0; i < before[g].size(); ++i) {
      if (before[g][i] != sequence->pages.table(g)[i]) Drop(g, before[g][i]);
    }
  }
}

void RandomPool::Drop(int group, uint32_t page) {
  if (--references_.at(page) > 0) return;
  references_.erase(page);
  if (PrefixOf(group, page) != 0) cached_.push_back({group, page});
}

void RandomPool::Finish(size_t which) {
  SequencePages& pages = running_[which].pages;
  for (int64_t i = pages.capacity() / kPageSize; i-- > 0;) {
    for (int g = 0; g < groups(); ++g) {
      if (pages.table(g)[i] != kNoPage) Drop(g, pages.table(g)[i]);
    }
  }
  std::swap(running_[which], running_.back());
  running_.pop_back();
}

// The pool says only how many pages it evicted; that they are the oldest is what the model asserts
// from here on.
void RandomPool::SyncEvictions() {
  int64_t left = 0;
  for (int g = 0; g < groups(); ++g) left += f_.pool.cached(g);
  for (; static_cast<int64_t>(cached_.size()) > left; cached_.pop_front(), ++evictions) {
    const auto [group, page] = cached_.front();
    published_[group].erase(PrefixOf(group, page));
    prefix_of_.erase({group, page});
  }
}

void RandomPool::CheckMemory(const Running& sequence) const {
  for (int g = 0; g < groups(); ++g) {
    const auto table = sequence.pages.table(g);
    for (int64_t t = 0; t < sequence.pages.written(); ++t) {
      const uint32_t page = table[t / kPageSize];
      const int window = f_.geometry.groups[g].window;
      const bool visible = window == 0 || t > sequence.pages.written() - window;
      ASSERT_TRUE(page != kNoPage || !visible) << g << ' ' << t;
      if (page == kNoPage) continue;
      const int64_t units = f_.geometry.groups[g].page_bytes / kPageUnit;
      for (const int64_t unit : {int64_t{0}, units - 1}) {
        ASSERT_EQ(memory_[(page + unit) * kPageSize + t % kPageSize], sequence.prefixes[t]);
      }
    }
  }
}

void RandomPool::CheckCounts() const {
  for (const auto& [page, references] : references_) {
    ASSERT_EQ(f_.pool.references(page), references);
  }
  for (int g = 0; g < groups(); ++g) {
    std::set<uint32_t> held;
    for (const Running& sequence : running_) {
      for (const uint32_t page : sequence.pages.table(g)) {
        if (page != kNoPage) held.insert(page);
      }
    }
    const int64_t cached = std::count_if(cached_.begin(), cached_.end(),
                                         [&](const Cached& c) { return c.group == g; });
    ASSERT_EQ(f_.pool.held(g), static_cast<int64_t>(held.size()));
    ASSERT_EQ(f_.pool.cached(g), cached);
    ASSERT_EQ(f_.arena.allocated(g), f_.pool.held(g) + f_.pool.cached(g));
  }
}

void RandomPool::Run(int steps) {
  for (int step = 0; step < steps && !testing::Test::HasFatalFailure(); ++step) {
    const int action = Random(100);
    if (running_.empty() || (running_.size() < 12 && action < 15)) {
      Start();
    } else if (action < 75) {
      Running& sequence = running_[Random(static_cast<int>(running_.size()))];
      if (sequence.pages.written() < static_cast<int64_t>(sequence.tokens.size()))
        Advance(&sequence);
    } else if (action < 90) {
      Finish(Random(static_cast<int>(running_.size())));
    } else {
      const Tokens tokens = Prompt();
      ASSERT_EQ(f_.pool.Lookup(tokens), BruteForce(Prefixes(tokens)));
    }
    if (step % 16 == 0) CheckCounts();
  }
  while (!running_.empty()) Finish(running_.size() - 1);
  CheckCounts();
  f_.pool.DropCache();
  EXPECT_EQ(f_.arena.free_slabs(), f_.arena.slabs());
}

TEST(BlockPool, RandomSteps) {
  struct Case {
    std::vector<int> windows;
    std::vector<LayerFormat> formats;
    int64_t slabs;
    int steps;
  };
  for (const Case& c : std::vector<Case>{
           {{0}, {kFp8}, 20, 100000},
           {{0, 100}, {kFp8, kBf16}, 30, 100000},
           {{0, 64, 200, 1}, {kFp8, kBf16, kInt8, kFp8}, 50, 30000},
           {{128}, {kInt8}, 16, 30000},
           {{0, 128}, {kInt8, kBf16}, 9, 30000},
       }) {
    RandomPool test(c.windows, c.formats, c.slabs, 11);
    test.Run(c.steps);
    if (testing::Test::HasFatalFailure()) return;
    EXPECT_GT(test.hits, c.steps / 100);
    EXPECT_GT(test.shared, c.steps / 200);
    EXPECT_GT(test.refusals, c.steps / 1000) << c.slabs;
    EXPECT_GT(test.evictions, c.steps / 100);
  }
}

}  // namespace
}  // namespace octavo
