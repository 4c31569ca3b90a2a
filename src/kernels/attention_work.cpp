#include "kernels/attention_work.h"

#include <algorithm>

#include "base/error.h"

namespace octavo {
namespace {

using Item = AttentionWork::Item;

// One item per block of query tokens and kv head, each over all the pages that its queries see.
std::vector<Item> WholeItems(const AttentionShape& shape, const BatchView& batch,
                             int block_tokens) {
  std::vector<Item> items;
  for (int sequence = 0; sequence < batch.sequences(); ++sequence) {
    const int tokens = batch.q_begin[sequence + 1] - batch.q_begin[sequence];
    const int before = batch.kv_len[sequence] - tokens;  // position of the first query
    for (int begin = 0; begin < tokens; begin += block_tokens) {
      const int end = std::min(tokens, begin + block_tokens);
      const int page_begin = FirstVisible(std::max(0, before + begin), shape.window) / kPageSize;
      const int page_end = std::max(page_begin, (before + end + kPageSize - 1) / kPageSize);
      for (int page = page_begin; page < page_end; ++page) {
        OCTAVO_CHECK(batch.block_table.Row<uint32_t>(sequence)[page] != kNoPage, sequence, page);
      }
      for (int head = 0; head < shape.kv_heads; ++head) {
        items.push_back({sequence, head, begin, end, page_begin, page_end, -1});
      }
    }
  }
  return items;
}

}  // namespace

AttentionWork MakeAttentionWork(const AttentionShape& shape, const BatchView& batch,
                                const AttentionWorkOptions& options) {
  OCTAVO_CHECK(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0, shape.heads,
               shape.kv_heads);
  const int group = shape.heads / shape.kv_heads;
  const int block_tokens = std::max(1, options.block_rows / group);
  auto rows = [&](const Item& item) { return (item.token_end - item.token_begin) * group; };
  auto cost = [&](const Item& item) {
    return int64_t{item.page_end - item.page_begin} * rows(item);
  };

  AttentionWork work;
  const std::vector<Item> whole = WholeItems(shape, batch, block_tokens);
  int64_t total = 0;
  for (const Item& item : whole) total += cost(item);

  // An item longer than a quarter of a worker's share would leave the others waiting.
  const int64_t largest = options.workers > 1 ? total / (4 * int64_t{options.workers}) : total;
  int partials = 0;
  int partial_rows = 0;
  for (const Item& item : whole) {
    const int first_cut = (item.page_begin / options.split_pages + 1) * options.split_pages;
    if (cost(item) <= largest || first_cut >= item.page_end) {
      work.items.push_back(item);
      continue;
    }
    const int partial_begin = partials;
    for (int page = item.page_begin; page < item.page_end;) {
      Item split = item;
      split.page_begin = page;
      page = split.page_end =
          std::min(item.page_end, (page / options.split_pages + 1) * options.split_pages);
      split.partial = partials++;
      work.items.push_back(split);
    }
    work.combines.push_back(
        {item.sequence, item.kv_head, item.token_begin, item.token_end, partial_begin, partials});
    partial_rows = std::max(partial_rows, rows(item));
  }
  // The longest first: the last to finish should be short.
  std::stable_sort(work.items.begin(), work.items.end(),
                   [&](const Item& a, const Item& b) { return cost(a) > cost(b); });

  // A partial result: maximum and sum per row (padded to dim_align), then the rows.
  auto align = [&](int n) {
    return (n + options.dim_align - 1) / options.dim_align * int64_t{options.dim_align};
  };
  work.partial_stride = 2 * align(partial_rows) + partial_rows * align(shape.head_dim);
  work.partial_floats = partials * work.partial_stride;
  return work;
}

}  // namespace octavo
