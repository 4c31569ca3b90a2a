// How attention's work is cut into items, for every backend. Made on the host, once per step and
// page group.
//
// An item is a block of query tokens of one sequence, times one kv head, times a range of KV pages.
// The cache is cut only at multiples of `split_pages` counted from page 0, so which cuts are used
// may depend on the load and the result need not.
#pragma once

#include "kernels/backend.h"

namespace octavo {

struct AttentionPlanOptions {
  int block_rows = 64;   // (token, query head of the group) pairs in an item; at least one token
  int split_pages = 16;  // pages of one split
  int workers = 1;       // whoever takes items; with one, nothing is split
  int dim_align = 16;    // of a partial result's rows, in floats
};

// The first position that a query at `position` sees; it is the last.
inline int FirstVisible(int position, int window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

AttentionPlan MakeAttentionPlan(const AttentionShape& shape, const BatchView& batch,
                                const AttentionPlanOptions& options);

}  // namespace octavo
