// Attention for few query rows (decode): vectors run along head_dim in q k^T and along tokens in p
// v, so that K and V are read exactly as they are stored, each vector once for up to four rows.

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

// Up to four rows share a converted vector of K or V (eight, two vectors open, measured a fifth
// slower than twice four), and OpenVectors of these (tokens in q k^T, dimensions in p v) are open
// at once: accumulators in 32 registers (AVX-512, NEON) or 16 (AVX2), at least eight for two
// multiply-adds a cycle.
inline constexpr bool kManyRegisters = HWY_TARGET != HWY_AVX2;
constexpr int OpenVectors(int rows) { return rows * 4 <= (kManyRegisters ? 16 : 8) ? 4 : 2; }

// Dot products of kRows rows with kLanes vectors, kOpen at a time: products[t * kRows + r] are the
// lanes to be added of vector kOpen * n + t and row r. Add returns true after the last, with
// sums[r] lane i = row r times vector i.
template <int kRows, int kOpen>
class Tree {
 public:
  HWY_INLINE bool Add(size_t n, VF (&products)[kRows * kOpen], VF (&sums)[kRows]) {
    for (int r = 0; r < kRows; ++r) {
      sums[r] = PairSum<0>(products[r], products[kRows + r]);
      if constexpr (kOpen == 4) {
        sums[r] = PairSum<1>(sums[r], PairSum<0>(products[2 * kRows + r], products[3 * kRows + r]));
      }
    }
    if constexpr (kFirst < kLaneBits) {
      int level = kFirst;
      for (; n & 1; n >>= 1, ++level) {
        for (int r = 0; r < kRows; ++r)
          sums[r] = PairSumAt(level, levels_[level - kFirst][r], sums[r]);
      }
      if (level == kLaneBits) return true;
      for (int r = 0; r < kRows; ++r) levels_[level - kFirst][r] = sums[r];
      return false;
    } else {
      return true;
    }
  }

 private:
  static constexpr int kFirst = kOpen == 4 ? 2 : 1;  // levels below it are done at once
  static HWY_INLINE VF PairSumAt(int level, VF a, VF b) {
    if constexpr (kLaneBits > 3) {
      if (level == 3) return PairSum<3>(a, b);
    }
    if constexpr (kLaneBits > 2) {
      if (level == 2) return PairSum<2>(a, b);
    }
    return PairSum<1>(a, b);
  }
  VF levels_[kLaneBits][kRows];
};

// products[t, r] += x[t] * y[r], y being rows of `stride` floats. With `keep`, x counts as zero
// where keep[r] is zero.
template <int kRows, int kOpen, bool kMasked>
HWY_INLINE void Accumulate(const VF (&x)[kOpen], const float* y, const float* keep, size_t stride,
                           VF (&products)[kRows * kOpen]) {
  const DF d;
  for (int r = 0; r < kRows; ++r) {
    const VF row = hn::Load(d, y + r * stride);
    for (int t = 0; t < kOpen; ++t) {
      VF& sum = products[t * kRows + r];
      if constexpr (kMasked) {
        sum = hn::MulAdd(row, hn::And(x[t], hn::Load(d, keep + r * stride)), sum);
      } else {
        sum = hn::MulAdd(row, x[t], sum);
      }
    }
  }
}

// products[t, r] = the lanes of vectors[t] . y[r], `count` elements.
template <class Loader, int kRows, int kOpen, bool kMasked>
HWY_INLINE void Products(const uint8_t* const (&vectors)[kOpen], size_t count, const float* y,
                         const float* keep, size_t stride, VF (&products)[kRows * kOpen]) {
  for (VF& sum : products) sum = hn::Zero(DF());
  VF x0[kOpen], x1[kOpen];
  size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int t = 0; t < kOpen; ++t) Loader::Load2(vectors[t] + i * Loader::kSize, x0[t], x1[t]);
    Accumulate<kRows, kOpen, kMasked>(x0, y + i, keep + i, stride, products);
    Accumulate<kRows, kOpen, kMasked>(x1, y + i + kLanes, keep + i + kLanes, stride, products);
  }
  if (i + kLanes <= count) {
    for (int t = 0; t < kOpen; ++t) x0[t] = Loader::Load(vectors[t] + i * Loader::kSize);
    Accumulate<kRows, kOpen, kMasked>(x0, y + i, keep + i, stride, products);
    i += kLanes;
  }
  if (i < count) {
    for (int t = 0; t < kOpen; ++t)
      x0[t] = LoadTail<Loader>(vectors[t] + i * Loader::kSize, count - i);
    Accumulate<kRows, kOpen, kMasked>(x0, y + i, keep + i, stride, products);
  }
}

// s[r, position] = q[r] . k[order[position]]
template <class Loader, int kRows>
void Scores(const AttentionBlock& block, const uint8_t* k, const float* q, float* s,
            Prefetcher& next) {
  constexpr int kOpen = OpenVectors(kRows);
  const size_t dim = block.head_dim;
  for (size_t first = 0; first < kPageSize; first += kLanes) {
    Tree<kRows, kOpen> tree;
    VF products[kRows * kOpen], sums[kRows];
    size_t n = 0;
    do {
      next.Step();
      const uint8_t* rows[kOpen];
      for (int t = 0; t < kOpen; ++t)
        rows[t] = k + block.order[first + kOpen * n + t] * dim * Loader::kSize;
      Products<Loader, kRows, kOpen, false>(rows, dim, q, q, block.row_stride, products);
    } while (!tree.Add(n++, products, sums));
    for (int r = 0; r < kRows; ++r) hn::Store(sums[r], DF(), s + r * kPageSize + first);
  }
}

// o[r, d] = o[r, d] * alpha[r] + p[r] . v[d]. kMasked: values that row r does not see (keep[r] is
// 0) count as zero, whatever they are.
template <class Loader, int kRows, bool kMasked>
void Values(const AttentionBlock& block, const uint8_t* v, const float* p, const float* keep,
            const float* alpha, float* o, Prefetcher& next) {
  constexpr int kOpen = OpenVectors(kRows);
  const DF d;
  const size_t dim = block.head_dim;
  for (size_t first = 0; first < dim; first += kLanes) {
    Tree<kRows, kOpen> tree;
    VF products[kRows * kOpen], sums[kRows];
    size_t n = 0;
    do {
      next.Step();
      const uint8_t* rows[kOpen];
      for (int t = 0; t < kOpen; ++t) {
        // Behind head_dim: any row, the lane is padding.
        rows[t] = v + std::min(first + kOpen * n + t, dim - 1) * kPageSize * Loader::kSize;
      }
      Products<Loader, kRows, kOpen, kMasked>(rows, kPageSize, p, keep, kPageSize, products);
    } while (!tree.Add(n++, products, sums));
    for (int r = 0; r < kRows; ++r) {
      float* to = o + r * block.row_stride + first;
      hn::Store(hn::MulAdd(hn::Load(d, to), hn::Set(d, alpha[r]), sums[r]), d, to);
    }
  }
}

// A page's K, and its V, is asked for a page ahead, in as many steps as the smallest head_dim
// makes.
inline constexpr int kPrefetchSteps = 16;

// keep[position] is all ones where a row at `last` sees the token, else all zeros.
void VisibleTokens(const AttentionBlock& block, int first_token, int last, float* keep) {
  const DF d;
  const DI di;
  const auto end = hn::Set(di, last - first_token);
  const auto begin = hn::Set(di, last - block.window - first_token);
  for (size_t i = 0; i < kPageSize; i += kLanes) {
    const auto token = hn::LoadU(di, block.order + i);
    const auto visible = hn::AndNot(hn::VecFromMask(di, hn::Gt(token, end)),
                                    hn::VecFromMask(di, hn::Gt(token, begin)));
    hn::Store(hn::BitCast(d, visible), d, keep + i);
  }
}

// Turns one row's products into probabilities, updates m and l, and returns the factor of what was
// summed before.
float Softmax(const AttentionBlock& block, const PageReader& page, const float* keep, float* s,
              float& m, float& l) {
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
    if (page.scales_values) {
      p = hn::Mul(p, hn::Load(d, page.value_factor + i * kLanes));
      if (page.masked) p = hn::And(p, hn::Load(d, keep + i * kLanes));
    }
    hn::Store(p, d, s + i * kLanes);
  }
  const VF alpha = Exp2(hn::Sub(m_old, base));
  l = hn::GetLane(hn::MulAdd(hn::Set(d, l), alpha, TreeSum(sum)));
  m = hn::GetLane(m_new);
  return hn::GetLane(alpha);
}

// The kernels of a K format and of a V format, by the logarithm of the number of rows.
using ScoresFunction = void (*)(const AttentionBlock&, const uint8_t*, const float*, float*,
                                Prefetcher&);
using ValuesFunction = void (*)(const AttentionBlock&, const uint8_t*, const float*, const float*,
                                const float*, float*, Prefetcher&);

template <class Loader>
struct ScoresEntry {
  static constexpr ScoresFunction kValue[] = {Scores<Loader, 1>, Scores<Loader, 2>,
                                              Scores<Loader, 4>};
};
template <class Loader>
struct ValuesEntry {
  static constexpr ValuesFunction kValue[] = {Values<Loader, 1, false>, Values<Loader, 2, false>,
                                              Values<Loader, 4, false>};
};
template <class Loader>
struct MaskedValuesEntry {
  static constexpr ValuesFunction kValue[] = {Values<Loader, 1, true>, Values<Loader, 2, true>,
                                              Values<Loader, 4, true>};
};

// The logarithm of the number of rows to take next of those that are left.
int StepLog2(int left) { return left >= 4 ? 2 : left >= 2 ? 1 : 0; }

void AttendFew(const AttentionBlock& block, int page_begin, int page_end,
               const AttentionState& state) {
  const KvLayout& layout = block.args->cache.layout;
  const DType k_storage = StorageDType(layout.k_format), v_storage = StorageDType(layout.v_format);
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
    page.PrefetchNextScales(index);
    const bool simple_k = k_storage == DType::kF8E4M3 && !HasF8E4M3NaN(page.k, layout.KBytes());
    const ScoresFunction* scores =
        simple_k ? ScoresEntry<LoadF8E4M3Finite>::kValue : ByStorage<ScoresEntry>(k_storage);
    Prefetcher next_k = page.NextK(index, kPrefetchSteps);
    for (int r = 0; r < rows; r += 1 << StepLog2(rows - r)) {
      scores[StepLog2(rows - r)](block, page.k, block.q + r * block.row_stride, s + r * kPageSize,
                                 next_k);
    }
    for (int r = 0; r < rows; ++r) {
      if (page.masked)
        VisibleTokens(block, page.first_token, block.position(r), keep + r * kPageSize);
      alpha[r] =
          Softmax(block, page, keep + r * kPageSize, s + r * kPageSize, state.m[r], state.l[r]);
    }
    const bool simple_v =
        v_storage == DType::kF8E4M3 && !page.masked && !HasF8E4M3NaN(page.v, layout.VBytes());
    const ValuesFunction* values = simple_v      ? ValuesEntry<LoadF8E4M3Finite>::kValue
                                   : page.masked ? ByStorage<MaskedValuesEntry>(v_storage)
                                                 : ByStorage<ValuesEntry>(v_storage);
    Prefetcher next_v = page.NextV(index, kPrefetchSteps);
    for (int r = 0; r < rows; r += 1 << StepLog2(rows - r)) {
      values[StepLog2(rows - r)](block, page.v, s + r * kPageSize, keep + r * kPageSize, alpha + r,
                                 state.o + r * block.row_stride, next_v);
    }
  }
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {

HWY_EXPORT(AttendFew);

void AttendFewRows(const AttentionBlock& block, int page_begin, int page_end,
                   const AttentionState& state) {
  HWY_DYNAMIC_DISPATCH(AttendFew)(block, page_begin, page_end, state);
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
