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
#include "kernels/cpu/attention_pairs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {

// Up to four rows share a converted vector of K or V (eight, two vectors open, measured a fifth
// slower than twice four), and OpenVectors of these (tokens in q k^T, dimensions in p v) are open
// at once: accumulators in 32 registers (AVX-512, NEON) or 16 (AVX2), at least eight for two
// multiply-adds a cycle.
inline constexpr bool kManyRegisters = HWY_TARGET != HWY_AVX2;
constexpr int OpenVectors(int rows) { return kManyRegisters ? 4 : 8 / rows; }

// products[t, r] += x[t] * y[r], y being rows of `stride` lanes; with two terms also what lies half
// a row further. With `keep`, x counts as zero where keep[r] is zero.
template <class Loader, int kRows, int kOpen, int kTerms, bool kMasked>
HWY_INLINE void Accumulate(const VF (&x)[kOpen], const float* y, const float* keep, size_t stride,
                           VF (&products)[kRows * kOpen]) {
  const DF d;
  for (int r = 0; r < kRows; ++r) {
    for (int term = 0; term < kTerms; ++term) {
      const VF row = hn::Load(d, y + r * stride + term * (stride / 2));
      for (int t = 0; t < kOpen; ++t) {
        VF& sum = products[t * kRows + r];
        if constexpr (kMasked) {
          sum = Loader::MulAdd(row, hn::And(x[t], hn::Load(d, keep + r * stride)), sum);
        } else {
          sum = Loader::MulAdd(row, x[t], sum);
        }
      }
    }
  }
}

// products[t, r] = the lanes of vectors[t] . y[r], `count` lanes' worth of elements.
template <class Loader, int kRows, int kOpen, int kTerms, bool kMasked>
HWY_INLINE void Products(const Loader& loader, const uint8_t* const (&vectors)[kOpen], size_t count,
                         const float* y, const float* keep, size_t stride,
                         VF (&products)[kRows * kOpen]) {
  for (VF& sum : products) sum = hn::Zero(DF());
  constexpr size_t kStep = Loader::kVectors * kLanes;
  Loaded<Loader> loaded[kOpen];
  auto accumulate = [&](size_t i, size_t end) HWY_ATTR __attribute__((always_inline)) {
    for (size_t v = 0; v < Loader::kVectors && i < end; ++v, i += kLanes) {
      VF x[kOpen];
      for (int t = 0; t < kOpen; ++t) x[t] = loaded[t].x[v];
      Accumulate<Loader, kRows, kOpen, kTerms, kMasked>(x, y + i, keep + i, stride, products);
    }
  };
  size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int t = 0; t < kOpen; ++t) loaded[t] = LoadWhole(loader, vectors[t] + i * Loader::kSize);
    accumulate(i, i + kStep);
  }
  if (i < count) {
    for (int t = 0; t < kOpen; ++t)
      loaded[t] = LoadTail(loader, vectors[t] + i * Loader::kSize, count - i);
    accumulate(i, count);
  }
}

// The tree's levels below that of kOpen vectors; their sums come to lie in the first kRows.
template <int kRows, int kOpen, int kLevel = 0>
HWY_INLINE void Fold(VF (&x)[kRows * kOpen]) {
  if constexpr ((1 << kLevel) < kOpen) {
    for (int t = 0; t < kOpen >> (kLevel + 1); ++t) {
      for (int r = 0; r < kRows; ++r)
        x[t * kRows + r] = PairSum<kLevel>(x[2 * t * kRows + r], x[(2 * t + 1) * kRows + r]);
    }
    Fold<kRows, kOpen, kLevel + 1>(x);
  }
}

// sums[r] lane i = y[r] . vector n * 2^kLevel + i, for the 2^kLevel lanes that a level has open:
// the tree depth first, so that few of its nodes wait. `products(n, out)` makes the leaves, the
// lanes of kOpen vectors from kOpen * n on.
template <int kRows, int kOpen, int kLevel = kLaneBits, class Leaves>
HWY_INLINE void TreeSums(size_t n, const Leaves& products, VF (&sums)[kRows]) {
  if constexpr ((1 << kLevel) == kOpen) {
    VF leaves[kRows * kOpen];
    products(n, leaves);
    Fold<kRows, kOpen>(leaves);
    for (int r = 0; r < kRows; ++r) sums[r] = leaves[r];
  } else {
    VF first[kRows];
    TreeSums<kRows, kOpen, kLevel - 1>(2 * n, products, first);
    TreeSums<kRows, kOpen, kLevel - 1>(2 * n + 1, products, sums);
    for (int r = 0; r < kRows; ++r) sums[r] = PairSum<kLevel - 1>(first[r], sums[r]);
  }
}

// s[r, position] = q[r] . k[order[position]]
template <class Loader, int kRows>
void Scores(const AttentionBlock& block, const uint8_t* k, const float* q, float* s,
            Prefetcher& next) {
  constexpr int kOpen = OpenVectors(kRows);
  const size_t count = block.head_dim / Loader::kElements;
  const Loader loader;
  for (size_t first = 0; first < kPageSize; first += kLanes) {
    auto products = [&](size_t n, VF(&out)[kRows * kOpen]) HWY_ATTR __attribute__((always_inline)) {
      next.Step(kRows * kOpen * Loader::kTermsOfQ * count / kLanes);
      const uint8_t* rows[kOpen];
      for (int t = 0; t < kOpen; ++t)
        rows[t] = k + block.order[first + kOpen * n + t] * count * Loader::kSize;
      Products<Loader, kRows, kOpen, Loader::kTermsOfQ, false>(loader, rows, count, q, q,
                                                               block.row_stride, out);
    };
    VF sums[kRows];
    TreeSums<kRows, kOpen>(0, products, sums);
    for (int r = 0; r < kRows; ++r) hn::Store(sums[r], DF(), s + r * kPageSize + first);
  }
}

// o[r, d] = o[r, d] * alpha[r] + p[r] . v[d]. kMasked: values that row r does not see (keep[r] is
// 0) count as zero, whatever they are.
template <class Loader, int kRows, bool kMasked>
void Values(const AttentionBlock& block, const uint8_t* v, const float* p, const float* keep,
            const float* alpha, float* o, Prefetcher& next) {
  constexpr int kOpen = OpenVectors(kRows);
  constexpr size_t kCount = kPageSize / Loader::kElements;
  const DF d;
  const Loader loader;
  const size_t dim = block.head_dim;
  for (size_t first = 0; first < dim; first += kLanes) {
    auto products = [&](size_t n, VF(&out)[kRows * kOpen]) HWY_ATTR __attribute__((always_inline)) {
      next.Step(kRows * kOpen * kCount / kLanes);
      const uint8_t* rows[kOpen];
      for (int t = 0; t < kOpen; ++t) {
        // Behind head_dim: any row, the lane is padding.
        rows[t] = v + std::min(first + kOpen * n + t, dim - 1) * kCount * Loader::kSize;
      }
      Products<Loader, kRows, kOpen, 1, kMasked>(loader, rows, kCount, p, keep, kPageSize, out);
    };
    VF sums[kRows];
    TreeSums<kRows, kOpen>(0, products, sums);
    for (int r = 0; r < kRows; ++r) {
      float* to = o + r * block.row_stride + first;
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

// The kernels of an element type, by the logarithm of the number of rows.
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

// Work in steps of about the time of a multiply-add.
constexpr int64_t kSoftmaxSteps = 64;  // of a row
constexpr int64_t WidenSteps(size_t codes) { return codes / 16; }

// `count` codes, a multiple of four vectors of bits, to float16 bits, which are cheaper to widen
// from memory than codes are. Four at once: a loop over one took half as long again where its few
// instructions came to lie unluckily (Zen 3).
template <class Format>
void Expand(const uint8_t* codes, size_t count, int16_t* bits, Prefetcher& next) {
  const hn::Repartition<int16_t, DF> d16;
  constexpr size_t kVector = 2 * kLanes;
  for (size_t i = 0; i < count; i += 4 * kVector) {
    next.Step(WidenSteps(4 * kVector));
    for (size_t j = i; j < i + 4 * kVector; j += kVector)
      hn::StoreU(Format::Bits16(d16, LoadCodes(d16, codes + j)), d16, bits + j);
  }
}

// One head's K or V in a type that the kernels below read.
struct Elements {
  const uint8_t* data;
  DType type;
};

bool IsFloat8(DType storage) { return storage == DType::kF8E4M3 || storage == DType::kF8E5M2; }

// For Singles: float-8 becomes float16 in `expanded` (`count` of them), once for all rows.
Elements Widen(const uint8_t* data, DType storage, size_t count, int16_t* expanded,
               Prefetcher& next) {
  if (!IsFloat8(storage)) return {data, storage};
  if (storage == DType::kF8E5M2) {
    Expand<LoadF8E5M2>(data, count, expanded, next);
  } else if (HasF8E4M3NaN(data, count)) {
    Expand<LoadF8E4M3>(data, count, expanded, next);
  } else {
    Expand<F8E4M3Finite>(data, count, expanded, next);
  }
  return {reinterpret_cast<const uint8_t*>(expanded), DType::kF16};
}

// Entry's kernels of the types that Widen gives, or of any for pairs.
template <class Math, template <class> class Entry>
auto ByType(DType type) {
  if constexpr (Math::kElements == 2) return Math::template ByStorage<Entry>(type);
  switch (type) {
    case DType::kF32:
      return Entry<LoadF32>::kValue;
    case DType::kF16:
      return Entry<LoadF16>::kValue;
    case DType::kBF16:
      return Entry<LoadBF16>::kValue;
    default:
      return Entry<LoadI8>::kValue;
  }
}

// The logarithm of the number of rows to take next of those that are left.
int StepLog2(int left) { return left >= 4 ? 2 : left >= 2 ? 1 : 0; }

template <class Math>
void AttendFewBy(const AttentionBlock& block, int page_begin, int page_end,
                 const AttentionState& state, float* scratch) {
  const KvLayout& layout = block.args->cache.layout;
  const DType k_storage = StorageDType(layout.k_format), v_storage = StorageDType(layout.v_format);
  const size_t elements = kPageSize * static_cast<size_t>(block.head_dim);
  const int rows = block.rows;
  int64_t steps =
      rows * (kSoftmaxSteps + (Math::kTermsOfQ + 1) * elements / (Math::kElements * kLanes));
  constexpr bool kWidens = Math::kElements == 1;
  for (const DType storage : {k_storage, v_storage})
    steps += kWidens && IsFloat8(storage) ? WidenSteps(elements) : 0;
  std::fill_n(state.m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.l, rows, 0.0f);
  std::fill_n(state.o, rows * block.row_stride, 0.0f);

  HWY_ALIGN float s[kFewRows * kPageSize];  // products, then probabilities
  HWY_ALIGN float keep[kFewRows * kPageSize];
  float alpha[kFewRows];
  auto* expanded = reinterpret_cast<int16_t*>(scratch);
  PageReader page(block);
  for (int index = page_begin; index < page_end; ++index) {
    page.Open(index);
    Prefetcher next = page.Next(index, steps);
    const Elements k =
        kWidens ? Widen(page.k, k_storage, elements, expanded, next) : Elements{page.k, k_storage};
    const ScoresFunction* scores = ByType<Math, ScoresEntry>(k.type);
    for (int r = 0; r < rows; r += 1 << StepLog2(rows - r)) {
      scores[StepLog2(rows - r)](block, k.data, block.q + r * block.row_stride, s + r * kPageSize,
                                 next);
    }
    for (int r = 0; r < rows; ++r) {
      next.Step(kSoftmaxSteps);
      if (page.masked)
        VisibleTokens(block, page.first_token, block.position(r), keep + r * kPageSize);
      alpha[r] =
          Softmax(block, page, keep + r * kPageSize, s + r * kPageSize, state.m[r], state.l[r]);
      if constexpr (Math::kElements == 2) {
        Math::Pack(s + r * kPageSize);
        if (page.masked) Math::Pack(keep + r * kPageSize);
      }
    }
    const Elements v =
        kWidens ? Widen(page.v, v_storage, elements, expanded, next) : Elements{page.v, v_storage};
    const ValuesFunction* values =
        page.masked ? ByType<Math, MaskedValuesEntry>(v.type) : ByType<Math, ValuesEntry>(v.type);
    for (int r = 0; r < rows; r += 1 << StepLog2(rows - r)) {
      values[StepLog2(rows - r)](block, v.data, s + r * kPageSize, keep + r * kPageSize, alpha + r,
                                 state.o + r * block.row_stride, next);
    }
  }
}

void AttendFew(const AttentionBlock& block, int page_begin, int page_end,
               const AttentionState& state, float* scratch) {
#if OCTAVO_PAIRS
  if (block.pairs == 1) return AttendFewBy<Pairs<1>>(block, page_begin, page_end, state, scratch);
  if (block.pairs == 2) return AttendFewBy<Pairs<2>>(block, page_begin, page_end, state, scratch);
#endif
  AttendFewBy<Singles>(block, page_begin, page_end, state, scratch);
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {

HWY_EXPORT(AttendFew);

void AttendFewRows(const AttentionBlock& block, int page_begin, int page_end,
                   const AttentionState& state, float* scratch) {
  HWY_DYNAMIC_DISPATCH(AttendFew)(block, page_begin, page_end, state, scratch);
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
