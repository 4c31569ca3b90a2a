#include "kv/arena.h"

#include <map>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace octavo {
namespace {

constexpr LayerFormat kBf16 = {KvFormat::kBF16, KvFormat::kBF16};
constexpr LayerFormat kFp8 = {KvFormat::kFp8E4M3, KvFormat::kFp8E4M3};
constexpr LayerFormat kInt8 = {KvFormat::kInt8PerTokenHead, KvFormat::kInt8PerTokenHead};
constexpr int64_t kGiB = int64_t{1} << 30;

// gpt-oss-20b: 24 layers, windows of 128 in every other one, 8 kv heads of 64.
GroupGeometry GptOss(LayerFormat windows, LayerFormat full, int64_t bytes = kGiB) {
  std::vector<KvLayerFacts> layers;
  std::vector<LayerFormat> formats;
  for (int i = 0; i < 24; ++i) {
    layers.push_back({.window = i % 2 == 0 ? 128 : 0, .kv_heads = 8, .head_dim = 64});
    formats.push_back(i % 2 == 0 ? windows : full);
  }
  return MakeGroups(layers, formats, bytes);
}

TEST(MakeGroups, LayersOfOneWindowShareAPage) {
  const GroupGeometry geometry = GptOss(kBf16, kFp8);
  ASSERT_EQ(geometry.groups.size(), 2u);
  EXPECT_EQ(geometry.groups[0].window, 0);
  EXPECT_EQ(geometry.groups[1].window, 128);
  EXPECT_EQ(geometry.groups[0].BytesPerToken(), 12 * 2 * 8 * 64);
  EXPECT_EQ(geometry.groups[1].BytesPerToken(), 12 * 2 * 8 * 64 * 2);
  EXPECT_EQ(geometry.layers[0].group, 1);
  EXPECT_EQ(geometry.layers[3].group, 0);
  EXPECT_EQ(geometry.layers[3].claim_offset, geometry.layers[1].layout.ClaimBytes());
  EXPECT_EQ(geometry.slab_bytes,
            geometry.groups[1].page_bytes);  // two full pages, or one of the windows
  EXPECT_EQ(geometry.SlabWaste(0), 0);
  EXPECT_EQ(geometry.SlabWaste(1), 0);
}

TEST(MakeGroups, ClaimsNeitherOverlapNorLeaveHoles) {
  const std::vector<KvLayerFacts> layers = {
      {0, 4, 128}, {512, 1, 256}, {0, 2, 64}, {4096, 8, 80}, {512, 2, 72}};
  const std::vector<LayerFormat> formats = {
      kFp8, kInt8, {KvFormat::kFp8E4M3, KvFormat::kBF16}, kBf16, kInt8};
  const GroupGeometry geometry = MakeGroups(layers, formats, kGiB);
  EXPECT_EQ(geometry.groups.size(), 3u);
  for (const KvGroup& group : geometry.groups) {
    int64_t end = 0;
    for (const int layer : group.layers) {
      const LayerPlace& place = geometry.layers[layer];
      EXPECT_EQ(place.claim_offset, end);
      EXPECT_EQ(place.claim_offset % kPageUnit, 0);
      EXPECT_EQ(layers[layer].window, group.window);
      end += place.layout.ClaimBytes();
    }
    EXPECT_EQ(end, group.page_bytes);
  }
}

TEST(MakeGroups, SlabsWasteLittleWherePagesDoNotDivide) {
  for (const int64_t bytes : {kGiB, 16 * kGiB, 64 * kGiB}) {
    const GroupGeometry geometry = GptOss(kBf16, kInt8, bytes);  // pages of 816 and 1536 KiB
    for (int g = 0; g < 2; ++g) {
      EXPECT_LT(geometry.SlabWaste(g), geometry.slab_bytes / 50) << bytes << ' ' << g;
    }
    EXPECT_LT(geometry.slab_bytes, bytes / 32) << bytes;
  }
}

TEST(MakeGroups, TooLittleMemoryIsAnError) {
  EXPECT_THAT([] { GptOss(kBf16, kFp8, 2 << 20); },
              testing::Throws<Error>(testing::Property(
                  &Error::message, testing::HasSubstr("at least 3145728 bytes"))));
}

TEST(MakeGroups, TokensThatFit) {
  const GroupGeometry geometry = GptOss(kBf16, kFp8);
  EXPECT_EQ(WindowPages(128, 1), 3);
  EXPECT_EQ(WindowPages(1, 64), 2);
  EXPECT_EQ(WindowPages(64, 1), 2);
  // 10 slabs, 3 of them for one sequence's window; 7 slabs of 2 full pages.
  EXPECT_EQ(TokensThatFit(geometry, 10, 1, 1), 14 * 64);
  // 4 slabs are left for two sequences, one of which may use a page for a single token.
  EXPECT_EQ(TokensThatFit(geometry, 10, 2, 1), 8 * 64 - 63);
  EXPECT_EQ(TokensThatFit(geometry, 2, 1, 1), 64);
  EXPECT_EQ(TokensThatFit(geometry, 1, 1, 1), 0);
  const std::vector<KvLayerFacts> windows = {{128, 8, 64}};
  const GroupGeometry bounded = MakeGroups(windows, std::vector<LayerFormat>{kBf16}, kGiB);
  EXPECT_EQ(TokensThatFit(bounded, 100, 2, 64), kUnbounded);
  EXPECT_EQ(TokensThatFit(bounded, 3, 1, 64), 3 * 64);  // less than a window
  EXPECT_EQ(Describe(geometry, kGiB).size(), 3u);
}

TEST(Arena, SlabsReturnWhenTheirPagesAreFree) {
  const GroupGeometry geometry = GptOss(kBf16, kFp8);
  Arena arena(nullptr, 3 * geometry.slab_bytes, geometry);
  const uint32_t a = arena.Allocate(0), b = arena.Allocate(0), c = arena.Allocate(0);
  EXPECT_EQ(b - a, geometry.groups[0].page_bytes / kPageUnit);
  EXPECT_EQ(arena.lent_slabs(0), 2);
  const uint32_t d = arena.Allocate(1);
  EXPECT_EQ(arena.free_slabs(), 0);
  EXPECT_EQ(arena.Allocate(1), kNoPage);
  arena.Free(c);
  EXPECT_EQ(arena.free_slabs(), 1);
  EXPECT_NE(arena.Allocate(1), kNoPage);
  EXPECT_EQ(arena.GroupOf(d), 1);
  arena.Free(a);
  EXPECT_EQ(arena.free_slabs(), 0);
  arena.Free(b);
  EXPECT_EQ(arena.free_slabs(), 1);
}

TEST(ArenaDeathTest, WrongPagesAreOurMistake) {
  const GroupGeometry geometry = GptOss(kBf16, kFp8);
  Arena arena(nullptr, 3 * geometry.slab_bytes, geometry);
  const uint32_t page = arena.Allocate(0);
  EXPECT_DEATH(arena.Free(page + 1), "page_bytes");
  EXPECT_DEATH(arena.Free(kNoPage), "kNoPage");
  arena.Free(page);
  EXPECT_DEATH(arena.Free(page), "group >= 0");
}

// 10^5 random steps against a map of the bytes in use.
TEST(Arena, RandomSteps) {
  const std::vector<KvLayerFacts> layers = {{0, 2, 64}, {64, 1, 64}, {256, 3, 64}, {0, 1, 64}};
  const std::vector<LayerFormat> formats = {kFp8, kBf16, kInt8, kBf16};
  const GroupGeometry geometry = MakeGroups(layers, formats, int64_t{2} << 20);
  Arena arena(nullptr, int64_t{2} << 20, geometry);
  std::map<int64_t, std::pair<int64_t, int>> used;  // begin -> end, group
  std::vector<uint32_t> pages;
  std::mt19937 random(7);
  int refusals = 0;
  for (int step = 0; step < 100000; ++step) {
    const bool grow = random() % 1000 < (step / 5000 % 2 == 0 ? 560 : 440);
    if (grow) {
      const int group = static_cast<int>(random() % 3);
      const uint32_t page = arena.Allocate(group);
      if (page == kNoPage) {
        ++refusals;
        EXPECT_EQ(arena.free_slabs(), 0);
        EXPECT_EQ(arena.allocated(group), arena.lent_slabs(group) * geometry.PagesPerSlab(group));
        continue;
      }
      const int64_t begin = int64_t{page} * kPageUnit;
      const int64_t end = begin + geometry.groups[group].page_bytes;
      const auto after = used.lower_bound(begin);
      ASSERT_TRUE(after == used.end() || after->first >= end);
      ASSERT_TRUE(after == used.begin() || std::prev(after)->second.first <= begin);
      ASSERT_LE(end, arena.slabs() * geometry.slab_bytes);
      ASSERT_EQ(arena.GroupOf(page), group);
      ASSERT_LT(arena.IndexOf(page), arena.index_limit());
      used[begin] = {end, group};
      pages.push_back(page);
    } else if (!pages.empty()) {
      std::swap(pages[random() % pages.size()], pages.back());
      used.erase(int64_t{pages.back()} * kPageUnit);
      arena.Free(pages.back());
      pages.pop_back();
    }
    if (step % 100 != 0) continue;
    std::map<int64_t, int> slab_groups;
    std::vector<int64_t> allocated(3);
    for (const auto& [begin, page] : used) {
      const auto [slab, is_new] = slab_groups.emplace(begin / geometry.slab_bytes, page.second);
      ASSERT_TRUE(is_new || slab->second == page.second);
      ++allocated[page.second];
    }
    ASSERT_EQ(arena.free_slabs() + static_cast<int64_t>(slab_groups.size()), arena.slabs());
    for (int g = 0; g < 3; ++g) ASSERT_EQ(arena.allocated(g), allocated[g]);
  }
  EXPECT_GT(refusals, 1000);
  for (const uint32_t page : pages) arena.Free(page);
  EXPECT_EQ(arena.free_slabs(), arena.slabs());
}

}  // namespace
}  // namespace octavo
