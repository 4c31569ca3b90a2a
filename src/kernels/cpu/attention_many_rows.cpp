// Attention for many query rows (prefill): vectors run along query rows, elements of K and V are
// broadcast. Each page is decoded once for all rows of the block, to floats or to pairs of
// bfloat16; scores stand as [position, rows], so that V is read as it is stored and the softmax is
// vertical.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_many_rows.cpp"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"
#include "kernels/cpu/attention_common-inl.h"
#include "kernels/cpu/attention_pairs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {

// A tile is kTileVectors row vectors that share broadcast elements, TileColumns of which are open
// at once, for kOpenClasses classes of the sum at once: 3 * 4 * 2 accumulators in the 32 registers
// of AVX-512 and NEON, 3 * 4 in the 16 of AVX2. 4 * 4 * 1 has fewer loads per multiply-add but
// stores every class for the tree, and 4 * 2 * 2 is bound by loads.
inline constexpr int kTileVectors = 3;
constexpr int TileColumns(int row_vectors) { return row_vectors == 1 ? 8 : 4; }
inline constexpr int kOpenClasses = HWY_TARGET != HWY_AVX2 ? 2 : 1;

inline constexpr int kPrefetchSteps = 16;  // of the next page, over the columns of this one

// The buffers of a block; "tile" ones serve one tile of rows at a time. A float of q, k, v and s
// may be a pair; strides are the same then.
struct Buffers {
  float* q;           // [row_stride, rows] transposed
  float* k;           // [kPageSize, row_stride] in the order of positions
  float* v;           // [head_dim, kPageSize]
  float* o;           // [head_dim, rows]
  float* s;           // [kPageSize, tile]
  float* keep;        // [kPageSize, tile] all ones where the row sees the token, else zeros
  int32_t* position;  // [rows]

  static constexpr int64_t kTile = kPageSize * kTileVectors * kLanes;
  static int64_t Floats(int64_t rows, int64_t row_stride) {
    return 2 * row_stride * rows + 2 * kPageSize * row_stride + 2 * kTile + rows;
  }
  Buffers(float* p, int64_t rows, int64_t row_stride) {
    auto take = [&](int64_t floats) {
      float* at = p;
      p += floats;
      return at;
    };
    q = take(row_stride * rows);
    k = take(kPageSize * row_stride);
    v = take(kPageSize * row_stride);
    o = take(row_stride * rows);
    s = take(kTile);
    keep = take(kTile);
    position = reinterpret_cast<int32_t*>(take(rows));
  }
};

// Sums over k = 0, kLanes, ... of a[k, r] * b[c, k], and, for a second class, over k = 2, kLanes +
// 2, ...: a is [n, a_stride] with vectors along its rows, b is [kColumns, b_stride]. Of two terms
// the second's rows of a lie a_terms further. kMasked: elements of b count as zero where keep
// (shaped like a) is zero, whatever they are.
template <class Math, int kRows, int kColumns, int kTerms, bool kMasked>
HWY_INLINE void ClassSums(const float* a, size_t a_stride, size_t a_terms, const float* keep,
                          const float* b, size_t b_stride, size_t n,
                          VF (&sums)[kOpenClasses][kRows * kColumns]) {
  const DF d;
  for (auto& of_class : sums) {
    for (VF& sum : of_class) sum = hn::Zero(d);
  }
  for (size_t k = 0; k < n; k += kLanes) {
    for (int j = 0; j < kOpenClasses; ++j) {
      for (int term = 0; term < kTerms; ++term) {
        const size_t row = k + 2 * j + term * a_terms;
        VF x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = hn::Load(d, a + row * a_stride + r * kLanes);
        for (int c = 0; c < kColumns; ++c) {
          const VF y = hn::Set(d, b[c * b_stride + k + 2 * j]);
          for (int r = 0; r < kRows; ++r) {
            VF& sum = sums[j][c * kRows + r];
            if constexpr (kMasked) {
              const VF seen = hn::And(y, hn::Load(d, keep + row * a_stride + r * kLanes));
              sum = Math::MulAdd(x[r], seen, sum);
            } else {
              sum = Math::MulAdd(x[r], y, sum);
            }
          }
        }
      }
    }
  }
}

// sums[c * kRows + r] = a[., r] . b[c, .]: the classes in the order of the tree's leaves, the tree
// depth first.
template <class Math, int kRows, int kColumns, int kTerms, bool kMasked>
HWY_INLINE void Products(const float* a, size_t a_stride, size_t a_terms, const float* keep,
                         const float* b, size_t b_stride, size_t n, VF (&sums)[kRows * kColumns]) {
  static_assert(LeafClass(1) == LeafClass(0) + 2 && LeafClass(3) == LeafClass(2) + 2,
                "the two classes of ClassSums");
  constexpr size_t kLeaves = kLanes / kOpenClasses;
  VF levels[kLaneBits][kRows * kColumns];
  for (size_t leaf = 0; leaf < kLeaves; ++leaf) {
    const size_t j = LeafClass(leaf * kOpenClasses);
    VF open[kOpenClasses][kRows * kColumns];
    ClassSums<Math, kRows, kColumns, kTerms, kMasked>(
        a + j * a_stride, a_stride, a_terms, keep + j * a_stride, b + j, b_stride, n, open);
    for (int i = 0; i < kRows * kColumns; ++i) {
      sums[i] = kOpenClasses == 1 ? open[0][i] : hn::Add(open[0][i], open[kOpenClasses - 1][i]);
    }
    int level = 0;
    for (size_t bits = leaf; bits & 1; bits >>= 1, ++level) {
      for (int i = 0; i < kRows * kColumns; ++i) sums[i] = hn::Add(levels[level][i], sums[i]);
    }
    if (leaf + 1 < kLeaves) {
      for (int i = 0; i < kRows * kColumns; ++i) levels[level][i] = sums[i];
    }
  }
}

// s[position, row] = k[position] . q[row]
template <class Math, int kRows>
void Scores(const AttentionBlock& block, const Buffers& buffers, size_t first_row, size_t rows,
            Prefetcher& next) {
  constexpr int kColumns = TileColumns(kRows);
  const DF d;
  const size_t count = hwy::RoundUpTo(block.head_dim / Math::kElements, kLanes);
  for (size_t s = 0; s < kPageSize; s += kColumns) {
    next.Step();
    VF sums[kRows * kColumns];
    Products<Math, kRows, kColumns, Math::kTermsOfQ, false>(
        buffers.q + first_row, rows, block.row_stride / 2, buffers.q,
        buffers.k + s * block.row_stride, block.row_stride, count, sums);
    for (int c = 0; c < kColumns; ++c) {
      for (int r = 0; r < kRows; ++r) {
        hn::Store(sums[c * kRows + r], d, buffers.s + ((s + c) * kRows + r) * kLanes);
      }
    }
  }
}

// o[d, row] = o[d, row] * alpha[row] + v[d] . p[row]
template <class Math, int kRows, bool kMasked>
void Values(const AttentionBlock& block, const Buffers& buffers, size_t first_row, size_t rows,
            const VF (&alpha)[kTileVectors], Prefetcher& next) {
  constexpr int kColumns = TileColumns(kRows);
  const DF d;
  for (int i = 0; i < block.head_dim; i += kColumns) {
    next.Step();
    VF sums[kRows * kColumns];
    Products<Math, kRows, kColumns, 1, kMasked>(buffers.s, kRows * kLanes, 0, buffers.keep,
                                                buffers.v + i * kPageSize, kPageSize,
                                                kPageSize / Math::kElements, sums);
    for (int c = 0; c < kColumns; ++c) {
      for (int r = 0; r < kRows; ++r) {
        float* to = buffers.o + (i + c) * rows + first_row + r * kLanes;
        hn::Store(hn::MulAdd(hn::Load(d, to), alpha[r], sums[c * kRows + r]), d, to);
      }
    }
  }
}

// Scales, caps and masks one row vector's scores in place; returns their maximum.
HWY_INLINE VF PrepareScores(const AttentionBlock& block, const PageReader& page,
                            const int32_t* position, float* s, float* keep, size_t tile) {
  const DF d;
  const DI di;
  const VF minus_inf = hn::Set(d, -std::numeric_limits<float>::infinity());
  const float cap = block.args->soft_cap;
  const VF inverse_cap = hn::Set(d, cap > 0 ? 1.0f / cap : 0.0f);
  const VF cap_log2e = hn::Set(d, cap * 1.44269504f);
  const auto end = hn::Sub(hn::Load(di, position), hn::Set(di, page.first_token));
  const auto begin = hn::Sub(end, hn::Set(di, block.window));
  VF max = minus_inf;
  for (size_t t = 0; t < kPageSize; ++t) {
    VF x = hn::Mul(hn::Load(d, s + t * tile), hn::Set(d, page.score_factor[t]));
    if (cap > 0) x = SoftCap(x, inverse_cap, cap_log2e);
    if (page.masked) {
      const auto token = hn::Set(di, block.order[t]);
      const auto visible = hn::AndNot(hn::VecFromMask(di, hn::Gt(token, end)),
                                      hn::VecFromMask(di, hn::Gt(token, begin)));
      hn::Store(hn::BitCast(d, visible), d, keep + t * tile);
      x = hn::IfThenElse(hn::RebindMask(d, hn::Ne(visible, hn::Zero(di))), x, minus_inf);
    }
    max = hn::Max(max, x);
    hn::Store(x, d, s + t * tile);
  }
  return max;
}

// One row vector's probabilities in place; returns their sum, in the canonical order.
HWY_INLINE VF Probabilities(const PageReader& page, VF base, float* s, const float* keep,
                            size_t tile) {
  const DF d;
  VF levels[kLaneBits];
  VF sum = hn::Zero(d);
  for (size_t leaf = 0; leaf < kLanes; ++leaf) {
    sum = hn::Zero(d);
    for (size_t t = LeafClass(leaf); t < kPageSize; t += kLanes) {
      VF p = Exp2(hn::Sub(hn::Load(d, s + t * tile), base));
      sum = hn::Add(sum, p);
      if (page.scales_values) {
        p = hn::Mul(p, hn::Set(d, page.value_factor[t]));
        if (page.masked) p = hn::And(p, hn::Load(d, keep + t * tile));
      }
      hn::Store(p, d, s + t * tile);
    }
    int level = 0;
    for (size_t bits = leaf; bits & 1; bits >>= 1, ++level) sum = hn::Add(levels[level], sum);
    if (leaf + 1 < kLanes) levels[level] = sum;
  }
  return sum;
}

// One page for the kRows row vectors from first_row on.
template <class Math, int kRows>
void AttendTile(const AttentionBlock& block, const PageReader& page, const Buffers& buffers,
                size_t first_row, size_t rows, const AttentionState& state, Prefetcher& next) {
  const DF d;
  constexpr size_t kTile = kRows * kLanes;
  Scores<Math, kRows>(block, buffers, first_row, rows, next);
  VF alpha[kTileVectors];
  for (size_t r = 0; r < kRows; ++r) {
    float* s = buffers.s + r * kLanes;
    float* keep = buffers.keep + r * kLanes;
    float* m = state.m + first_row + r * kLanes;
    float* l = state.l + first_row + r * kLanes;
    const VF max =
        PrepareScores(block, page, buffers.position + first_row + r * kLanes, s, keep, kTile);
    const VF m_old = hn::Load(d, m);
    const VF m_new = hn::Max(m_old, max);
    const VF base = Subtrahend(m_new);
    const VF sum = Probabilities(page, base, s, keep, kTile);
    if constexpr (Math::kElements == 2) {
      Math::PackRows(s, kTile);
      if (page.masked) Math::PackRows(keep, kTile);
    }
    alpha[r] = Exp2(hn::Sub(m_old, base));
    hn::Store(hn::MulAdd(hn::Load(d, l), alpha[r], sum), d, l);
    hn::Store(m_new, d, m);
  }
  if (page.masked) {
    Values<Math, kRows, true>(block, buffers, first_row, rows, alpha, next);
  } else {
    Values<Math, kRows, false>(block, buffers, first_row, rows, alpha, next);
  }
}

// `count` rows of `columns` lanes' worth of elements to rows of `to_stride` lanes, zero behind
// `columns`. Row i is read at order[i].
template <class Loader>
void Decode(const uint8_t* from, const int32_t* order, size_t count, size_t columns, float* to,
            size_t to_stride) {
  const DF d;
  const Loader loader;
  constexpr size_t kStep = Loader::kVectors * kLanes;
  for (size_t i = 0; i < count; ++i, to += to_stride) {
    const uint8_t* row = from + (order ? order[i] : i) * columns * Loader::kSize;
    for (size_t j = 0; j < columns; j += kStep) {
      const uint8_t* p = row + j * Loader::kSize;
      const auto loaded =
          j + kStep <= columns ? LoadWhole(loader, p) : LoadTail(loader, p, columns - j);
      for (size_t v = 0; v < Loader::kVectors && j + v * kLanes < columns; ++v)
        hn::Store(loaded.x[v], d, to + j + v * kLanes);
    }
    for (size_t j = hwy::RoundUpTo(columns, kLanes); j < to_stride; j += kLanes)
      hn::Store(hn::Zero(d), d, to + j);
  }
}

template <class Loader>
struct DecodeEntry {
  static constexpr auto kValue = Decode<Loader>;
};

// [rows, columns] to [columns, to_stride].
void Transpose(const float* from, size_t from_stride, size_t rows, size_t columns, float* to,
               size_t to_stride) {
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

template <class Math, template <class> class Entry>
auto ByStorageOf(DType storage) {
  if constexpr (Math::kElements == 2) {
    return Math::template ByStorage<Entry>(storage);
  } else {
    return ByStorage<Entry>(storage);
  }
}

template <class Math>
void AttendManyBy(const AttentionBlock& block, int page_begin, int page_end,
                  const AttentionState& state, float* scratch) {
  const KvLayout& layout = block.args->cache.layout;
  const auto decode_k = ByStorageOf<Math, DecodeEntry>(StorageDType(layout.k_format));
  const auto decode_v = ByStorageOf<Math, DecodeEntry>(StorageDType(layout.v_format));
  const size_t rows = AlignRow(block.rows);
  const Buffers buffers(scratch, rows, block.row_stride);
  std::fill_n(state.m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.l, rows, 0.0f);
  std::fill_n(buffers.o, block.row_stride * rows, 0.0f);
  std::fill_n(buffers.q, block.row_stride * rows, 0.0f);
  Transpose(block.q, block.row_stride, block.rows, block.row_stride, buffers.q, rows);
  for (size_t r = 0; r < rows; ++r)
    buffers.position[r] = block.position(std::min<int>(r, block.rows - 1));

  PageReader page(block);
  const size_t vectors = (block.rows + kLanes - 1) / kLanes;
  for (int index = page_begin; index < page_end; ++index) {
    page.Open(index);
    decode_k(page.k, block.order, kPageSize, block.head_dim / Math::kElements, buffers.k,
             block.row_stride);
    decode_v(page.v, nullptr, block.head_dim, kPageSize / Math::kElements, buffers.v, kPageSize);
    Prefetcher next = page.Next(index, kPrefetchSteps);
    for (size_t vector = 0; vector < vectors; vector += kTileVectors) {
      const size_t first_row = vector * kLanes;
      switch (std::min<size_t>(kTileVectors, vectors - vector)) {
        case 1:
          AttendTile<Math, 1>(block, page, buffers, first_row, rows, state, next);
          break;
        case 2:
          AttendTile<Math, 2>(block, page, buffers, first_row, rows, state, next);
          break;
        default:
          AttendTile<Math, 3>(block, page, buffers, first_row, rows, state, next);
      }
    }
  }
  Transpose(buffers.o, rows, block.head_dim, block.rows, state.o, block.row_stride);
}

void AttendMany(const AttentionBlock& block, int page_begin, int page_end,
                const AttentionState& state, float* scratch) {
#if OCTAVO_PAIRS
  if (block.pairs == 1) return AttendManyBy<Pairs<1>>(block, page_begin, page_end, state, scratch);
  if (block.pairs == 2) return AttendManyBy<Pairs<2>>(block, page_begin, page_end, state, scratch);
#endif
  AttendManyBy<Singles>(block, page_begin, page_end, state, scratch);
}

int64_t ManyScratchFloats(int rows, int64_t row_stride) {
  return Buffers::Floats(AlignRow(rows), row_stride);
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {

HWY_EXPORT(AttendMany);
HWY_EXPORT(ManyScratchFloats);

void AttendManyRows(const AttentionBlock& block, int page_begin, int page_end,
                    const AttentionState& state, float* scratch) {
  HWY_DYNAMIC_DISPATCH(AttendMany)(block, page_begin, page_end, state, scratch);
}

int64_t ManyRowsScratchFloats(int rows, int64_t row_stride) {
  return HWY_DYNAMIC_DISPATCH(ManyScratchFloats)(rows, row_stride);
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
