// What an attention launch reads from device memory: lists of work items made on the host (plan.h),
// at fixed addresses, so that a captured graph serves every step. Plain data, shared by host and
// device.
//
// An item is a block of query rows of one sequence against a range of its pages. A row is a (query
// token, query head) pair: row r of an item is token r / pack, head `head` + r % pack, where `pack`
// is the number of query heads that the item holds of each token (the whole group, or one). Query
// token t of the item stands at `position` + t and sees keys up to itself.
#pragma once

#include <cstdint>

namespace octavo::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

struct WorkItem {
  int32_t sequence;  // row of the block table; of widened pages: the number that page 0 would have
  int32_t head;      // first query head
  int32_t q_row;     // row of q and out of the first query token
  int32_t q_tokens;  // query tokens
  int32_t position;  // of the first query token in its sequence
  int32_t page_begin, page_end;  // pages of this item
  int32_t partial;  // first of its rows in Partials, or -1: the item writes the output itself
};
static_assert(sizeof(WorkItem) == 32);

// What goes with a decode item.
struct ItemLink {
  int32_t combine;  // number of the cut head that it is a part of, or -1
  int32_t next;     // the item that the same block takes after it, or -1: a shared one
  // Of a cut head: the first row of its first part in Partials, and how many parts it has.
  int32_t partial_begin, partials;
};

struct PlanCounts {
  // Items from decode_shared on are taken by whoever is done with his own.
  int32_t decode_shared, decode_items;
};

// Pages of some heads of a sequence that become widened ones (widen_pages.h): page p of the h-th of
// these heads is number to + h * (page_end - page_begin) + p - page_begin.
struct WidenItem {
  int32_t sequence;
  int32_t first_kv_head, kv_heads;
  int32_t page_begin, page_end;
  int32_t to;
};

// Part of a list.
struct ListRange {
  int32_t first = 0, count = 0;
};

// Prefill that is launched together: one round for everything, or as many as it takes where pages
// are widened and not all fit at once.
struct PrefillRound {
  ListRange items, combines, widens;
  int32_t widened_pages = 0;
};

// Adds up the partial results of one block of rows: `partials` of them, `stride` rows apart.
struct CombineItem {
  int32_t head;
  int32_t q_row;
  int32_t q_tokens;
  int32_t pack;
  int32_t partial_begin;
  int32_t partials;
  int32_t stride;
};

// Partial results: for each row the weighted mean of the values it saw (without the v scale of
// static formats, which is applied last) and the base-2 logarithm of the sum of its exponentials,
// -inf if it saw nothing.
struct Partials {
  float* out;   // [rows, head_dim]
  float* lse2;  // [rows]
};

}  // namespace octavo::cuda
