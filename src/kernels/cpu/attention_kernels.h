// What the attention driver (attention.cpp) and its two kernels share.
//
// Both kernels compute the same canonical sums and therefore the same bits. With L float lanes, a
// dot product over k has L classes: class j adds k = j, j + L, j + 2L, ... by fused multiply-add in
// that order, starting from zero; the L sums are added by a fixed binary tree (PairSum in
// attention_common-inl.h). Where pairs of bfloat16 are multiplied, k counts pairs. "Few rows"
// (decode) runs vectors along k and reduces across lanes; "many rows" (prefill) runs vectors along
// query rows and adds the classes one after another. Keys of a page are taken in the order in which
// V stores its tokens. Page results are added to a split's, splits (kSplitPages from page 0) to the
// row's, in order.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace octavo::cpu {

// 1024 tokens: enough work (a page and head of decode is about a microsecond) to hide merging two
// results, and short enough that 8k of context gives 8 workers something to do.
inline constexpr int kSplitPages = 16;
// Query rows of an item, which share each page's decoding to float: two tiles of AVX-512.
inline constexpr int kBlockRows = 96;
// Floats: rows, and halves of them, are padded to whole vectors of every target.
inline constexpr int kDimAlign = 32;

inline constexpr int64_t AlignRow(int64_t n) { return (n + kDimAlign - 1) / kDimAlign * kDimAlign; }

// Rows of (token, query head of the group), token-major, of one kv head and sequence.
struct AttentionBlock {
  const AttentionArgs* args = nullptr;
  int sequence = 0, kv_head = 0;
  int group = 0, rows = 0, head_dim = 0;
  int64_t row_stride = 0;          // AlignRow(head_dim)
  int first_token = 0;             // row of args->q
  int first_position = 0;          // of first_token in its sequence
  int window = 0;                  // larger than any position if there is none
  int page_end = 0;                // of the item; an attend call may stop before it
  float score_factor = 0;          // of q k^T, up to the K scale of a token: base 2 logarithms
  float value_factor = 0;          // of the result, up to the V scale of a token
  const int32_t* order = nullptr;  // [kPageSize] token at each position of V
  int pairs = 0;  // terms of q if pairs of bfloat16 are multiplied (attention_pairs-inl.h), else 0
  const float* q = nullptr;  // [rows, row_stride] floats; or [rows, 2, row_stride / 2] pairs, the
                             // terms. Zero behind head_dim

  int position(int row) const { return first_position + row / group; }
};

// Running softmax of a block: what a split, or several merged, came to. Row r stands for
// exp2(m) * (l, o).
struct AttentionState {
  float* m;  // [AlignRow(rows)] largest score
  float* l;  // [AlignRow(rows)] sum of probabilities
  float* o;  // [rows, row_stride] sum of probability * value

  static AttentionState At(float* p, int rows) {
    return {p, p + AlignRow(rows), p + 2 * AlignRow(rows)};
  }
  static int64_t Floats(int rows, int64_t row_stride) {
    return 2 * AlignRow(rows) + rows * row_stride;
  }
};

// Whether attention over such a cache, with such an output, multiplies pairs of bfloat16: where the
// output is bfloat16 what is multiplied may be so too, if the cache's elements are exact as such.
bool UsesPairs(KvFormat k_format, KvFormat v_format, DType out);

// q as float32 or pairs, zero behind head_dim.
void LoadQueries(const AttentionBlock& block, float* q);

// One split's pages [page_begin, page_end). `scratch`: ManyRowsScratchFloats; few rows use
// kPageSize * head_dim / 2 of them, which is fewer.
void AttendFewRows(const AttentionBlock& block, int page_begin, int page_end,
                   const AttentionState& state, float* scratch);
void AttendManyRows(const AttentionBlock& block, int page_begin, int page_end,
                    const AttentionState& state, float* scratch);
int64_t ManyRowsScratchFloats(int rows, int64_t row_stride);

// Up to this many rows AttendFewRows is the faster of the two: on Zen 5, head_dim 128, a page takes
// it 0.24 us a row (BF16), AttendManyRows 4.5 us whether 1 or 16 rows.
inline constexpr int kFewRows = 16;

// to = to + from, in that order.
void Merge(const AttentionBlock& block, const AttentionState& to, const AttentionState& from);

// Sinks, division, conversion: writes the block's rows of args->out.
void Finish(const AttentionBlock& block, const AttentionState& state);

}  // namespace octavo::cpu
