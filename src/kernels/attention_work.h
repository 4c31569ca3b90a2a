// How attention's work is cut into items. Made on the host, once per step and page group.
//
// An item is a block of query tokens of one sequence, times one kv head, times a range of KV pages.
// The cache is cut only at multiples of `split_pages` counted from page 0, so which cuts are used
// may depend on the load and the result need not.
#pragma once

#include <vector>

#include "kernels/backend.h"

namespace octavo {

struct AttentionWork {
  struct Item {
    int32_t sequence, kv_head;
    int32_t token_begin, token_end;  // query tokens of the sequence
    int32_t page_begin, page_end;    // KV pages
    int32_t partial;  // index into the partial results, or -1: writes the output itself
  };
  struct Combine {
    int32_t sequence, kv_head, token_begin, token_end;
    int32_t partial_begin, partial_end;
  };
  std::vector<Item> items;
  std::vector<Combine> combines;
  int64_t partial_stride = 0;  // floats of one partial result
  int64_t partial_floats = 0;  // workspace
};

struct AttentionWorkOptions {
  int block_rows = 64;   // (token, query head of the group) pairs in an item; at least one token
  int split_pages = 16;  // pages of one split
  int workers = 1;       // whoever takes items; with one, nothing is split
  int dim_align = 16;    // of a partial result's rows, in floats
};

// The first position that a query at `position` sees; it is the last.
inline int FirstVisible(int position, int window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

AttentionWork MakeAttentionWork(const AttentionShape& shape, const BatchView& batch,
                                const AttentionWorkOptions& options);

}  // namespace octavo
