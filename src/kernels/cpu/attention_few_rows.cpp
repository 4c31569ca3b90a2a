// Attention for few query rows (decode): vectors run along head_dim in q k^T and along tokens in p v, so that K and V are
// read exactly as they are stored, each vector once for up to four rows.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_few_rows.cpp"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"
#include "kernels/cpu/attention_common-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {

// Adds to the tree of `kRows` x kLanes dot products two at a time: sums[r] holds inputs 2n and 2n + 1 of row r, already
// added pairwise. After the last (n = kLanes / 2 - 1), sums[r] is the finished vector.
template <int kRows>
struct Tree {
  VF levels[kLaneBits][kRows];

  HWY_INLINE void Add(size_t n, VF (&sums)[kRows]) {
    int level = 0;
    for (; n & 1; n >>= 1, ++level) {
      for (int r = 0; r < kRows; ++r) sums[r] = PairSum(levels[level][r], sums[r]);
    }
    for (int r = 0; r < kRows; ++r) levels[level][r] = sums[r];
  }
};

// s[r, position] = q[r] . k[order[position]]
template <class Loader, int kRows>
void Scores(const AttentionBlock& block, const uint8_t* k, const float* q, float* s) {
  const DF d;
  const size_t dim = block.head_dim, stride = block.row_stride;
  const size_t whole = dim / kLanes * kLanes;
  for (size_t first = 0; first < kPageSize; first += kLanes) {
    Tree<kRows> tree;
    VF sums[kRows];
    for (size_t pair = 0; pair < kLanes / 2; ++pair) {
      const uint8_t* k0 = k + block.order[first + 2 * pair] * dim * Loader::kSize;
      const uint8_t* k1 = k + block.order[first + 2 * pair + 1] * dim * Loader::kSize;
      VF a[kRows], b[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = b[r] = hn::Zero(d);
      for (size_t i = 0; i < whole; i += kLanes) {
        const VF x0 = Loader::Load(k0 + i * Loader::kSize), x1 = Loader::Load(k1 + i * Loader::kSize);
        for (int r = 0; r < kRows; ++r) {
          const VF y = hn::Load(d, q + r * stride + i);
          a[r] = hn::MulAdd(y, x0, a[r]);
          b[r] = hn::MulAdd(y, x1, b[r]);
        }
      }
      if (whole != dim) {
        const VF x0 = LoadTail<Loader>(k0 + whole * Loader::kSize, dim - whole);
        const VF x1 = LoadTail<Loader>(k1 + whole * Loader::kSize, dim - whole);
        for (int r = 0; r < kRows; ++r) {
          const VF y = hn::Load(d, q + r * stride + whole);
          a[r] = hn::MulAdd(y, x0, a[r]);
          b[r] = hn::MulAdd(y, x1, b[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) sums[r] = PairSum(a[r], b[r]);
      tree.Add(pair, sums);
    }
    for (int r = 0; r < kRows; ++r) hn::Store(sums[r], d, s + r * kPageSize + first);
  }
}

// o[r, d] = o[r, d] * alpha[r] + p[r] . v[d]. kMasked: values that row r does not see (keep[r] is 0) count as zero,
// whatever they are.
template <class Loader, int kRows, bool kMasked>
void Values(const AttentionBlock& block, const uint8_t* v, const float* p, const float* keep, const float* alpha,
            float* o) {
  const DF d;
  const size_t dim = block.head_dim, stride = block.row_stride;
  for (size_t first = 0; first < dim; first += kLanes) {
    Tree<kRows> tree;
    VF sums[kRows];
    for (size_t pair = 0; pair < kLanes / 2; ++pair) {
      // Behind head_dim: any row, the lane is padding.
      const uint8_t* v0 = v + std::min(first + 2 * pair, dim - 1) * kPageSize * Loader::kSize;
      const uint8_t* v1 = v + std::min(first + 2 * pair + 1, dim - 1) * kPageSize * Loader::kSize;
      VF a[kRows], b[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = b[r] = hn::Zero(d);
      for (size_t i = 0; i < kPageSize; i += kLanes) {
        const VF x0 = Loader::Load(v0 + i * Loader::kSize), x1 = Loader::Load(v1 + i * Loader::kSize);
        for (int r = 0; r < kRows; ++r) {
          const VF y = hn::Load(d, p + r * kPageSize + i);
          if constexpr (kMasked) {
            const VF mask = hn::Load(d, keep + r * kPageSize + i);
            a[r] = hn::MulAdd(y, hn::And(x0, mask), a[r]);
            b[r] = hn::MulAdd(y, hn::And(x1, mask), b[r]);
          } else {
            a[r] = hn::MulAdd(y, x0, a[r]);
            b[r] = hn::MulAdd(y, x1, b[r]);
          }
        }
      }
      for (int r = 0; r < kRows; ++r) sums[r] = PairSum(a[r], b[r]);
      tree.Add(pair, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      float* to = o + r * stride + first;
      hn::Store(hn::MulAdd(hn::Load(d, to), hn::Set(d, alpha[r]), sums[r]), d, to);
    }
  }
}

// keep[position] is all ones where a row at `last` sees the token, else all zeros.
void VisibleTokens(const AttentionBlock& block, int first_token, int last, float* keep) {
  const DF d;
  const DI di;
  const auto end = hn::Set(di, last - first_token);
  const auto begin = hn::Set(di, last - block.window - first_token);
  for (size_t i = 0; i < kPageSize; i += kLanes) {
    const auto token = hn::LoadU(di, block.order + i);
    const auto visible = hn::AndNot(hn::VecFromMask(di, hn::Gt(token, end)), hn::VecFromMask(di, hn::Gt(token, begin)));
    hn::Store(hn::BitCast(d, visible), d, keep + i);
  }
}

// Turns one row's products into probabilities, updates m and l, and returns the factor of what was summed before.
float Softmax(const AttentionBlock& block, const PageReader& page, const float* keep, float* s, float& m, float& l) {
  const DF d;
  constexpr size_t kVectors = kPageSize / kLanes;
  const VF minus_inf = hn::Set(d, -std::numeric_limits<float>::infinity());
  const float cap = block.args->soft_cap;
  const VF inverse_cap = hn::Set(d, cap > 0 ? 1.0f / cap : 0.0f);
  const VF cap_log2e = hn::Set(d, cap * 1.44269504f);
  VF x[kVectors];
  VF max = minus_inf;
  for (size_t i = 0; i < kVectors; ++i) {
    x[i] = hn::Mul(hn::Load(d, s + i * kLanes), hn::Load(d, page.score_factor + i * kLanes));
    if (cap > 0) x[i] = SoftCap(x[i], inverse_cap, cap_log2e);
    if (page.masked) {
      const auto hidden = hn::Eq(hn::BitCast(DI(), hn::Load(d, keep + i * kLanes)), hn::Zero(DI()));
      x[i] = hn::IfThenElse(hn::RebindMask(d, hidden), minus_inf, x[i]);
    }
    max = hn::Max(max, x[i]);
  }
  const VF m_old = hn::Set(d, m);
  const VF m_new = hn::Max(m_old, hn::MaxOfLanes(d, max));
  const VF base = Subtrahend(m_new);
  VF sum = hn::Zero(d);
  for (size_t i = 0; i < kVectors; ++i) {
    VF p = Exp2(hn::Sub(x[i], base));
    sum = hn::Add(sum, p);
    if (page.scales_values()) {
      p = hn::Mul(p, hn::Load(d, page.value_factor + i * kLanes));
      if (page.masked) p = hn::And(p, hn::Load(d, keep + i * kLanes));
    }
    hn::Store(p, d, s + i * kLanes);
  }
  const VF alpha = Exp2(hn::Sub(m_old, base));
  l = hn::GetLane(hn::MulAdd(hn::Set(d, l), alpha, hn::Set(d, TreeSum(sum))));
  m = hn::GetLane(m_new);
  return hn::GetLane(alpha);
}

// The kernels of a K format and of a V format, for 1, 2 and 4 rows.
using ScoresFunction = void (*)(const AttentionBlock&, const uint8_t*, const float*, float*);
using ValuesFunction = void (*)(const AttentionBlock&, const uint8_t*, const float*, const float*, const float*, float*);

template <class Loader>
struct ScoresEntry {
  static constexpr ScoresFunction kValue[3] = {Scores<Loader, 1>, Scores<Loader, 2>, Scores<Loader, 4>};
};
template <class Loader>
struct ValuesEntry {
  static constexpr ValuesFunction kValue[3] = {Values<Loader, 1, false>, Values<Loader, 2, false>,
                                               Values<Loader, 4, false>};
};
template <class Loader>
struct MaskedValuesEntry {
  static constexpr ValuesFunction kValue[3] = {Values<Loader, 1, true>, Values<Loader, 2, true>,
                                               Values<Loader, 4, true>};
};

// The largest power of two, at most 4, of the rows that are left: its logarithm.
int StepLog2(int left) { return left >= 4 ? 2 : left >= 2 ? 1 : 0; }

void AttendFew(const AttentionBlock& block, int page_begin, int page_end, const AttentionState& state) {
  const KvLayout& layout = block.args->cache.layout;
  const ScoresFunction* scores = ByStorage<ScoresEntry>(StorageDType(layout.k_format));
  const ValuesFunction* values = ByStorage<ValuesEntry>(StorageDType(layout.v_format));
  const ValuesFunction* masked_values = ByStorage<MaskedValuesEntry>(StorageDType(layout.v_format));
  const int rows = block.rows;
  std::fill_n(state.m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.l, rows, 0.0f);
  std::fill_n(state.o, rows * block.row_stride, 0.0f);

  HWY_ALIGN float s[kFewRows * kPageSize];  // products, then probabilities
  HWY_ALIGN float keep[kFewRows * kPageSize];
  float alpha[kFewRows];
  PageReader page(block);
  for (int index = page_begin; index < page_end; ++index) {
    page.Open(index);
    for (int r = 0; r < rows; r += 1 << StepLog2(rows - r)) {
      scores[StepLog2(rows - r)](block, page.k, block.q + r * block.row_stride, s + r * kPageSize);
    }
    for (int r = 0; r < rows; ++r) {
      if (page.masked) VisibleTokens(block, page.first_token, block.position(r), keep + r * kPageSize);
      alpha[r] = Softmax(block, page, keep + r * kPageSize, s + r * kPageSize, state.m[r], state.l[r]);
    }
    for (int r = 0; r < rows; r += 1 << StepLog2(rows - r)) {
      (page.masked ? masked_values : values)[StepLog2(rows - r)](
          block, page.v, s + r * kPageSize, keep + r * kPageSize, alpha + r, state.o + r * block.row_stride);
    }
  }
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {

HWY_EXPORT(AttendFew);

void AttendFewRows(const AttentionBlock& block, int page_begin, int page_end, const AttentionState& state) {
  HWY_DYNAMIC_DISPATCH(AttendFew)(block, page_begin, page_end, state);
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
