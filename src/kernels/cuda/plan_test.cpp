#include "kernels/cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <queue>
#include <random>
#include <set>
#include <tuple>

namespace octavo::cuda {
namespace {

PlanConfig Config(int heads, int kv_heads, int window = 0) {
  return {.shape = {.heads = heads, .kv_heads = kv_heads, .head_dim = 128, .window = window},
          .limits = {.tokens = 8192, .sequences = 256},
          .page_bytes = 16384,
          .workers = 132,
          .prefill_rows = 128,
          .prefill_tile_pages = 2,
          .prefill_page_bytes = 16384};
}

struct Batch {
  std::vector<int32_t> q_begin = {0}, kv_len;
  void Add(int tokens, int length) {
    q_begin.push_back(q_begin.back() + tokens);
    kv_len.push_back(length);
  }
};

// A made plan, as a device would see it.
struct Made {
  Made(Planner& planner, const Batch& batch)
      : bytes(static_cast<size_t>(planner.layout().bytes) + kGuardBytes, kGuard) {
    used = planner.Make(batch.q_begin, batch.kv_len, bytes.data());
    const PlanLayout& l = planner.layout();
    EXPECT_EQ(std::count(bytes.end() - kGuardBytes, bytes.end(), kGuard), kGuardBytes);
    counts = *At<PlanCounts>(l.counts);
    const auto* items = At<WorkItem>(l.decode_items);
    all_decode.assign(items, items + counts.decode_items);
    links = At<ItemLink>(l.decode_links);
    for (int i = 0; i < counts.decode_items; ++i) {
      if (items[i].sequence < 0) continue;  // a block that owns none
      decode.push_back(items[i]);
      link_of.push_back(links[i]);
    }
    rounds.assign(planner.rounds().begin(), planner.rounds().end());
    const PrefillRound& last = rounds.back();
    items = At<WorkItem>(l.prefill_items);
    prefill.assign(items, items + last.items.first + last.items.count);
    const auto* combines = At<CombineItem>(l.prefill_combines);
    prefill_combines.assign(combines, combines + last.combines.first + last.combines.count);
    widens = At<WidenItem>(l.widens);
    fp8 = At<uint8_t>(l.fp8_queries);
  }
  template <typename T>
  const T* At(int64_t offset) const {
    return reinterpret_cast<const T*>(bytes.data() + offset);
  }

  static constexpr int kGuardBytes = 1 << 16;
  static constexpr std::byte kGuard{0xEE};
  std::vector<std::byte> bytes;
  int64_t used;
  PlanCounts counts;
  std::vector<WorkItem> all_decode;
  const ItemLink* links;  // of all_decode
  std::vector<WorkItem> decode, prefill;
  std::vector<ItemLink> link_of;  // of decode
  std::vector<PrefillRound> rounds;
  const WidenItem* widens;
  std::vector<CombineItem> prefill_combines;
  const uint8_t* fp8;
};

// Every (query token, head) of the batch is covered by items whose pages lie end to end from the
// first page that a row sees (rounded down to `align`) to the last one.
void ExpectCovers(const PlanConfig& config, const Batch& batch, const std::vector<WorkItem>& items,
                  bool decode, int pack, int align) {
  const int group = config.shape.heads / config.shape.kv_heads;
  const int heads = config.shape.heads;
  std::vector<std::vector<WorkItem>> by_row(
      static_cast<size_t>(batch.q_begin.back() * heads));  // [token row, head]
  for (const WorkItem& item : items) {
    ASSERT_GE(item.q_tokens, 1);
    for (int t = 0; t < item.q_tokens; ++t) {
      for (int h = 0; h < pack; ++h)
        by_row[(item.q_row + t) * heads + item.head + h].push_back(item);
    }
  }
  for (int s = 0; s < std::ssize(batch.kv_len); ++s) {
    const int begin = batch.q_begin[s], tokens = batch.q_begin[s + 1] - begin;
    for (int t = 0; t < tokens; ++t) {
      for (int head = 0; head < heads; ++head) {
        auto& parts = by_row[(begin + t) * heads + head];
        if ((tokens * group <= kDecodeRows) != decode) {
          EXPECT_TRUE(parts.empty());
          continue;
        }
        ASSERT_FALSE(parts.empty()) << "row " << begin + t << " head " << head;
        std::sort(parts.begin(), parts.end(),
                  [](const WorkItem& a, const WorkItem& b) { return a.page_begin < b.page_begin; });
        const WorkItem& first = parts.front();
        EXPECT_EQ(first.sequence, s);
        EXPECT_EQ(first.position, batch.kv_len[s] - tokens + first.q_row - begin);
        const int window = config.shape.window;
        const int seen = window > 0 ? std::max(0, first.position - window + 1) : 0;
        EXPECT_EQ(first.page_begin, std::min(seen / kPageSize / align * align,
                                             (batch.kv_len[s] + kPageSize - 1) / kPageSize));
        const int last = first.position + first.q_tokens - 1;
        EXPECT_EQ(parts.back().page_end, std::max(0, last + kPageSize) / kPageSize);
        for (size_t i = 1; i < parts.size(); ++i) {
          EXPECT_EQ(parts[i].page_begin, parts[i - 1].page_end);
          EXPECT_EQ(parts[i].page_begin % align, 0);
          EXPECT_GE(parts[i].partial, 0);
          EXPECT_EQ(parts[i].partial - parts[i - 1].partial, parts[1].partial - parts[0].partial);
        }
        EXPECT_EQ(first.partial < 0, parts.size() == 1);
      }
    }
  }
}

// Partial results do not overlap and stay in the buffer.
void ExpectPartialsFit(const std::vector<WorkItem>& items, int rows_per_token, int fixed_rows,
                       int64_t capacity) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const WorkItem& item : items) {
    if (item.partial < 0) continue;
    const int rows = fixed_rows > 0 ? fixed_rows : item.q_tokens * rows_per_token;
    ranges.emplace_back(item.partial, item.partial + rows);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (i > 0) {
      EXPECT_GE(ranges[i].first, ranges[i - 1].second);
    }
    EXPECT_LE(ranges[i].second, capacity);
  }
}

Batch RandomBatch(std::mt19937& rng, int group) {
  Batch batch;
  const int sequences = static_cast<int>(rng() % 256) + 1;
  for (int s = 0; s < sequences; ++s) {
    const int left = 8192 - batch.q_begin.back() - (sequences - s);
    int tokens = 1;
    if (rng() % 4 == 0) tokens = static_cast<int>(rng() % (2 * kDecodeRows / group + 2));
    if (rng() % 32 == 0) tokens = static_cast<int>(rng() % 3000);
    tokens = std::clamp(tokens, 0, left);
    int length = tokens + static_cast<int>(rng() % (1 << rng() % 18));
    if (rng() % 16 == 0) length = (length + 63) / 64 * 64;
    if (rng() % 16 == 0) length = 0;  // padding
    batch.Add(tokens, length);
  }
  return batch;
}

TEST(CudaPlanTest, CoversRandomBatches) {
  std::mt19937 rng(1);
  for (const bool deterministic : {false, true}) {
    for (const int group : {1, 4, 5, 8, 16}) {
      for (const int window : {0, 1, 100, 128, 5000}) {
        PlanConfig config = Config(8 * group, 8, window);
        config.deterministic = deterministic;
        config.fp8_prefill = true;
        Planner planner(config);
        for (int round = 0; round < 2; ++round) {
          const Batch batch = RandomBatch(rng, group);
          const Made made(planner, batch);
          ExpectCovers(config, batch, made.decode, true, group, 1);
          ExpectCovers(config, batch, made.prefill, false, planner.prefill_pack(), 2);
          ExpectPartialsFit(made.decode, group, 0, planner.decode_partial_rows());
          ExpectPartialsFit(made.prefill, 0, 128, planner.prefill_partial_rows());
          for (int s = 0; s < std::ssize(batch.kv_len); ++s) {
            const bool prefill = (batch.q_begin[s + 1] - batch.q_begin[s]) * group > kDecodeRows;
            for (int row = batch.q_begin[s]; row < batch.q_begin[s + 1]; ++row) {
              EXPECT_EQ(made.fp8[row], prefill);
            }
          }
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(CudaPlanTest, CombinesNameTheirParts) {
  Planner planner(Config(32, 8));
  Batch batch;
  batch.Add(1, 131072);
  batch.Add(3, 40000);
  batch.Add(1, 70);
  const Made made(planner, batch);
  std::map<int, std::set<int>> parts;
  std::map<int, std::set<std::tuple<int, int, int, int, int>>> heads;
  for (size_t i = 0; i < made.decode.size(); ++i) {
    const WorkItem& item = made.decode[i];
    const ItemLink& link = made.link_of[i];
    ASSERT_EQ(item.partial < 0, link.combine < 0);
    if (item.partial < 0) continue;
    const int rows = item.q_tokens * planner.decode_pack();
    EXPECT_EQ((item.partial - link.partial_begin) % rows, 0);
    heads[link.combine].insert(
        {item.q_row, item.q_tokens, item.head, link.partial_begin, link.partials});
    parts[link.combine].insert((item.partial - link.partial_begin) / rows);
  }
  EXPECT_GE(parts.size(), 8u);
  for (const auto& [combine, found] : parts) {
    ASSERT_EQ(heads[combine].size(), 1u);  // all parts say the same
    const int partials = std::get<4>(*heads[combine].begin());
    EXPECT_EQ(std::ssize(found), partials);
    EXPECT_EQ(*found.rbegin(), partials - 1);
  }
}

// What the grid would need, every block working on its own items, then on shared ones, against an
// equal share of the pages. Every item must be reached once.
double Imbalance(const Made& made, int workers) {
  std::vector<int> reached(made.all_decode.size(), 0);
  int64_t all = 0;
  const auto pages = [&](int index) {
    ++reached[index];
    const int64_t n = made.all_decode[index].page_end - made.all_decode[index].page_begin;
    all += n;
    return n;
  };
  std::multiset<int64_t> busy;
  for (int w = 0; w < workers; ++w) {
    int64_t own = 0;
    if (made.all_decode[w].sequence >= 0) {
      for (int i = w; i >= 0; i = made.links[i].next) own += pages(i);
    }
    busy.insert(own);
  }
  for (int i = made.counts.decode_shared; i < made.counts.decode_items; ++i) {
    const int64_t start = *busy.begin();
    busy.erase(busy.begin());
    busy.insert(start + pages(i));
  }
  for (size_t i = 0; i < reached.size(); ++i) {
    EXPECT_EQ(reached[i], made.all_decode[i].sequence >= 0) << i;
  }
  return static_cast<double>(*busy.rbegin()) * workers / static_cast<double>(all);
}

TEST(CudaPlanTest, DecodesAreBalanced) {
  Planner planner(Config(32, 8));
  const auto batch_of = [](int count, int length) {
    Batch batch;
    for (int i = 0; i < count; ++i) batch.Add(1, length);
    return batch;
  };
  Batch skewed = batch_of(31, 4096);
  skewed.Add(1, 131072);
  for (const Batch& batch :
       {batch_of(1, 131072), batch_of(8, 32768), batch_of(64, 8192), batch_of(7, 50000), skewed}) {
    EXPECT_LT(Imbalance(Made(planner, batch), 132), 1.05);
  }
  std::mt19937 rng(2);
  for (int round = 0; round < 20; ++round) {
    const Batch batch = RandomBatch(rng, 4);
    const Made made(planner, batch);
    if (made.counts.decode_items > 0) Imbalance(made, 132);  // reaches all
  }
}

// Graphs pad batches. An item without pages has the latency of some.
TEST(CudaPlanTest, PaddingIsSpread) {
  Planner planner(Config(32, 8));
  for (const int padding : {1, 7, 30}) {
    Batch batch;
    for (int i = 0; i < 17; ++i) batch.Add(1, 8192);
    for (int i = 0; i < padding; ++i) batch.Add(1, 0);
    const Made made(planner, batch);
    Imbalance(made, 132);  // reaches all
    int all = 0, most = 0;
    for (int w = 0; w < 132; ++w) {
      int cost = 0;
      for (int i = w; i >= 0 && made.all_decode[w].sequence >= 0; i = made.links[i].next)
        cost += std::max(7, made.all_decode[i].page_end - made.all_decode[i].page_begin);
      all += cost;
      most = std::max(most, cost);
    }
    EXPECT_LT(most, all / 132 + 14) << padding;
  }
}

TEST(CudaPlanTest, DeterministicCutsIgnoreTheBatch) {
  PlanConfig config = Config(32, 8);
  config.deterministic = true;
  Planner planner(config);
  const auto cuts = [&](const Batch& batch, int sequence) {
    std::set<std::pair<int, int>> ranges;
    for (const WorkItem& item : Made(planner, batch).decode) {
      if (item.sequence == sequence) ranges.emplace(item.page_begin, item.page_end);
    }
    return ranges;
  };
  Batch alone, together;
  alone.Add(1, 100000);
  for (int i = 0; i < 200; ++i) together.Add(1, 1000 * i);
  together.Add(1, 100000);
  EXPECT_EQ(cuts(alone, 0), cuts(together, 200));
  EXPECT_GT(cuts(alone, 0).size(), 8u);
}

TEST(CudaPlanTest, AnyBatchWithinTheLimitsFits) {
  for (const bool deterministic : {false, true}) {
    PlanConfig config = Config(32, 8);
    config.deterministic = deterministic;
    Planner planner(config);
    Batch long_ones, short_ones, one_block;
    for (int s = 0; s < 256; ++s) {
      long_ones.Add(4, 1 << 20);
      short_ones.Add(5, 5);
    }
    one_block.Add(8192, 1 << 20);
    for (const Batch& batch : {long_ones, short_ones, one_block}) {
      const Made made(planner, batch);
      EXPECT_LE(made.used, planner.layout().bytes);
      EXPECT_GT(made.counts.decode_items + made.prefill.size(), 0);
    }
  }
}

TEST(CudaPlanTest, PrefillWorksOnHeadsThatFitInL2LongestFirst) {
  Planner planner(Config(32, 8));
  Batch batch;
  batch.Add(4096, 65536);  // 16 MiB of K and V per head
  const Made made(planner, batch);
  ASSERT_FALSE(made.prefill.empty());
  int last_group = 0, last_pages = 1 << 30;
  for (const WorkItem& item : made.prefill) {
    const int head_group = item.head / 4 / 2;
    if (head_group != last_group) {
      EXPECT_EQ(head_group, last_group + 1);
      last_pages = 1 << 30;
    }
    last_group = head_group;
    if (item.partial >= 0) continue;
    EXPECT_LE(item.page_end - item.page_begin, last_pages);
    last_pages = item.page_end - item.page_begin;
  }
  EXPECT_EQ(last_group, 3);
}

// Items go to whoever is free first.
TEST(CudaPlanTest, PrefillKeepsAllWorkersBusyToTheEnd) {
  for (const int rows : {128, 192}) {
    PlanConfig config = Config(32, 8);
    config.prefill_rows = rows;
    Planner planner(config);
    for (const auto& [tokens, length] :
         {std::pair(256, 65536), {512, 65536}, {1024, 65536}, {2048, 65536}, {8192, 16384}}) {
      Batch batch;
      batch.Add(tokens, length);
      const Made made(planner, batch);
      std::priority_queue<int, std::vector<int>, std::greater<>> busy_until(
          std::greater<>(), std::vector<int>(config.workers));
      int all = 0, end = 0;
      for (const WorkItem& item : made.prefill) {
        const int pages = item.page_end - item.page_begin, done = busy_until.top() + pages;
        busy_until.pop();
        busy_until.push(done);
        all += pages;
        end = std::max(end, done);
      }
      EXPECT_LE(end * config.workers, 1.12 * all) << tokens << " of " << length << ", " << rows;
    }
  }
}

TEST(CudaPlanTest, OneLongPrefillBlockIsCut) {
  Planner planner(Config(8, 8));
  Batch batch;
  batch.Add(17, 1 << 20);
  const Made made(planner, batch);
  EXPECT_GE(made.prefill.size(), 100u);
  EXPECT_EQ(made.prefill_combines.size(), 8u);
  int pieces = 0;
  for (const CombineItem& combine : made.prefill_combines) {
    EXPECT_EQ(combine.stride, 128);
    pieces += combine.partials;
  }
  EXPECT_EQ(pieces, std::ssize(made.prefill));
}

// However pieces are rounded up, they fit; of a step in many rounds the last ones stay whole.
TEST(CudaPlanTest, PrefillIsCutIntoNoMoreThanThereIsRoomFor) {
  std::mt19937 rng(6);
  bool filled = false, whole_at_the_end = false;
  for (int i = 0; i < 1000; ++i) {
    PlanConfig config = Config(8, 8);
    config.workers = 1 + i % 16;
    config.limits = {.tokens = 8 * 17, .sequences = 8, .kv_tokens = 1 << 19};
    if (i % 2 == 1) config.widened_pages = MaxPrefillPages(config.shape, config.limits);
    Planner planner(config);
    Batch batch;
    const int sequences = 1 + static_cast<int>(rng() % 8);
    const int shortest = 12 + static_cast<int>(rng() % 8);
    for (int s = 0; s < sequences; ++s) batch.Add(17, 1 << (shortest + rng() % (20 - shortest)));
    const Made made(planner, batch);
    ASSERT_LE(made.used, planner.layout().bytes) << config.workers << " workers";
    for (const PrefillRound& round : made.rounds) {
      const std::span items(made.prefill.data() + round.items.first, round.items.count);
      ExpectPartialsFit({items.begin(), items.end()}, 0, 128, planner.prefill_partial_rows());
      int rows = 0;
      for (const WorkItem& item : items) rows += item.partial >= 0 ? 128 : 0;
      filled |= rows == planner.prefill_partial_rows();
    }
    whole_at_the_end |=
        made.rounds.front().combines.count > 0 && made.rounds.back().combines.count == 0;
  }
  EXPECT_TRUE(filled);
  EXPECT_TRUE(whole_at_the_end);
}

// Every item finds its pages among those that its round widens, which fit in the buffer; with the
// rows of the block table put back, items are what they are without widening.
TEST(CudaPlanTest, WidensWhatItemsRead) {
  std::mt19937 rng(5);
  for (const int group : {1, 4, 16}) {
    for (const int window : {0, 100, 5000}) {
      PlanConfig config = Config(8 * group, 8, window);
      config.limits.kv_tokens = 1 << 18;
      config.limits.sequence_tokens = config.limits.tokens;
      const int64_t longest = MaxPrefillPages(config.shape, config.limits);
      for (const int64_t room : {longest, 3 * longest, 1000 * longest}) {
        config.widened_pages = room;
        Planner planner(config);
        const Batch batch = RandomBatch(rng, group);
        Made made(planner, batch);
        EXPECT_LE(made.used, planner.layout().bytes);
        if (room == 1000 * longest) {
          EXPECT_EQ(made.rounds.size(), 1u);
        }
        EXPECT_LE(std::ssize(made.rounds), planner.max_rounds());
        int first_item = 0, first_combine = 0;
        for (const PrefillRound& round : made.rounds) {
          EXPECT_EQ(round.items.first, std::exchange(first_item, first_item + round.items.count));
          EXPECT_EQ(round.combines.first,
                    std::exchange(first_combine, first_combine + round.combines.count));
          EXPECT_LE(round.widened_pages, room);
          const std::span items(made.prefill.data() + round.items.first, round.items.count);
          const std::span widens(made.widens + round.widens.first, round.widens.count);
          ExpectPartialsFit({items.begin(), items.end()}, 0, 128, planner.prefill_partial_rows());
          int to = 0;
          for (const WidenItem& widen : widens) {
            EXPECT_EQ(widen.to, to);
            to += widen.kv_heads * (widen.page_end - widen.page_begin);
          }
          EXPECT_EQ(to, round.widened_pages);
          for (WorkItem& item : items) {
            const auto owner = std::ranges::upper_bound(batch.q_begin, item.q_row);
            const int s = static_cast<int>(owner - batch.q_begin.begin()) - 1;
            const auto widen = std::ranges::find(widens, s, &WidenItem::sequence);
            ASSERT_NE(widen, widens.end());
            const int head = item.head / group - widen->first_kv_head;
            EXPECT_GE(head, 0);
            EXPECT_LT(head, widen->kv_heads);
            if (item.page_end > item.page_begin) {
              EXPECT_GE(item.page_begin, widen->page_begin);
              EXPECT_LE(item.page_end, widen->page_end);
            }
            EXPECT_EQ(item.sequence + widen->page_begin,
                      widen->to + head * (widen->page_end - widen->page_begin));
            item.sequence = s;
          }
        }
        EXPECT_EQ(first_item, std::ssize(made.prefill));
        ExpectCovers(config, batch, made.prefill, false, planner.prefill_pack(), 2);
        if (HasFailure()) return;
      }
    }
  }
}

TEST(CudaPlanTest, EmptyStep) {
  Planner planner(Config(32, 8));
  const Made made(planner, Batch{});
  EXPECT_EQ(made.counts.decode_items, 0);
  EXPECT_TRUE(made.prefill.empty());
  EXPECT_EQ(made.rounds.size(), 1u);
  EXPECT_GT(made.used, 0);
}

}  // namespace
}  // namespace octavo::cuda
