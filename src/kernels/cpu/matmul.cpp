#include "kernels/cpu/matmul.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "base/error.h"
#include "kernels/cpu/pairs.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cpp"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/mxfp4_product-inl.h"
#include "kernels/cpu/pairs-inl.h"
#include "kernels/cpu/vector_math-inl.h"

#ifndef OCTAVO_KERNELS_CPU_MATMUL_ONCE
#define OCTAVO_KERNELS_CPU_MATMUL_ONCE
namespace octavo::cpu {
// Columns summed in one accumulator. A tile's part of x (6 rows x 4 KiB) stays in L1 while weights
// stream from L2.
inline constexpr int64_t kPanel = 1024;
// Rows of x that one pass over the weights serves: bounds the scratch, and 240 rows are far past
// bandwidth-bound. One thread, 128 outputs of 4096 columns: 219 GFLOP/s at 240 rows, 208 at 480
// (sums then compete for L2).
inline constexpr int64_t kRowChunk = 240;
inline constexpr int64_t kMaxTileRows = 6;
// Up to here, whole rows of x fit in L1, and each row of weights is read from end to end: 33 GB/s
// of a possible 41. With more rows, panels of x stay in L1: 30 GB/s for 4 rows rather than 22.
inline constexpr int64_t kOnePassRows = 2;
}  // namespace octavo::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

// Register tiles, rows x outs: accumulators + weights + one x within 32 (AVX-512, NEON) or 16
// (AVX2) registers, and at least 8 accumulators to cover the latency of the multiply-add; but one
// row is bound by memory, and four streams of weights are better than eight (34 GB/s, 33).
template <size_t kRows>
constexpr size_t TileOuts() {
  constexpr bool kManyRegisters = HWY_TARGET != HWY_AVX2;
  if (kRows == 1) return 4;
  if (kRows == 2) return kManyRegisters ? 8 : 4;
  if (kRows == 3) return 4;
  return kManyRegisters ? 4 : 2;
}
constexpr int64_t kTileRows = kMaxTileRows;

// What a tile prefetches while it computes: the next tile's weights, as they come from memory when
// they are used for the first time. The rows of a tile are 4 to 8 streams a page or more apart,
// which the hardware's prefetchers follow badly: without this, one row reads 26 GB/s of the 41 that
// a Zen 5 core can, with it 33.
struct Ahead {
  const char* from;
  // Bytes from one column to the next, from one vector of a cache line to the next, and between the
  // cache lines that a step fetches. A tile of at most kOnePassRows rows takes row = 0 and line =
  // 64 for granted: it has fewer instructions to spare between its loads (33 GB/s, 30 without).
  int64_t step, row, line;
};

// Elements of a W, and x * w + sum.
template <class W>
constexpr int64_t kElements = 1;
template <class W>
HWY_INLINE V MulAddOf(V x, V w, V sum) {
  return hn::MulAdd(x, w, sum);
}

#if OCTAVO_PAIRS
template <>
constexpr int64_t kElements<BF16Pair> = 2;
template <>
HWY_INLINE V MulAddOf<BF16Pair>(V x, V w, V sum) {
  return MulAddPairs(x, w, sum);
}
#endif

// Vectors of W in a cache line.
template <class W>
constexpr int64_t kLineVectors = HWY_MAX(64 / static_cast<int64_t>(kLanes * sizeof(W)), 1);

// sums[r * kOuts + o] = x[r] . w[o] over `columns`; x is zero from there to the next multiple of
// kLanes.
template <size_t kRows, size_t kOuts, class W>
HWY_INLINE void Tile(const float* HWY_RESTRICT x, int64_t x_stride, const W* HWY_RESTRICT w,
                     int64_t w_stride, int64_t columns, const Ahead& ahead,
                     float* HWY_RESTRICT sums) {
  V acc[kRows * kOuts];
  Clear(acc, std::make_index_sequence<kRows * kOuts>());
  constexpr int64_t kStep = kLanes;
  constexpr size_t kLines = HWY_MAX(kOuts * kLanes * sizeof(W) / 64, 1);
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) {
    const char* fetch = ahead.from + i * ahead.step;
    if constexpr (kRows > kOnePassRows) {
      fetch += i / kStep % kLineVectors<W> * ahead.row;
      OCTAVO_UNROLL for (size_t line = 0; line < kLines; ++line)
          hwy::Prefetch(fetch + line * ahead.line);
    } else {
      OCTAVO_UNROLL for (size_t line = 0; line < kLines; ++line) hwy::Prefetch(fetch + line * 64);
    }
    V weights[kOuts];
    OCTAVO_UNROLL for (size_t o = 0; o < kOuts; ++o) weights[o] = Load(w + o * w_stride + i);
    OCTAVO_UNROLL for (size_t r = 0; r < kRows; ++r) {
      const V row = Load(x + r * x_stride + i);
      OCTAVO_UNROLL for (size_t o = 0; o < kOuts; ++o) {
        acc[r * kOuts + o] = MulAddOf<W>(row, weights[o], acc[r * kOuts + o]);
      }
    }
  }
  if (i < columns) {
    V weights[kOuts];
    OCTAVO_UNROLL for (size_t o = 0; o < kOuts; ++o) {
      weights[o] = LoadN(w + o * w_stride + i, static_cast<size_t>(columns - i));
    }
    OCTAVO_UNROLL for (size_t r = 0; r < kRows; ++r) {
      const V row = Load(x + r * x_stride + i);
      OCTAVO_UNROLL for (size_t o = 0; o < kOuts; ++o) {
        acc[r * kOuts + o] = MulAddOf<W>(row, weights[o], acc[r * kOuts + o]);
      }
    }
  }
  ReduceAll<kRows * kOuts>(acc, sums);
}

// One panel of kRows rows with kOuts outputs, into (first panel) or onto `sums`.
template <size_t kRows, size_t kOuts, class W>
HWY_NOINLINE void AddTile(const float* x, int64_t x_stride, const W* w, int64_t w_stride,
                          int64_t columns, const Ahead& ahead, bool first, float* sums,
                          int64_t sums_stride) {
  HWY_ALIGN float tile[kRows * kOuts + kLanes];
  Tile<kRows, kOuts>(x, x_stride, w, w_stride, columns, ahead, tile);
  if (first) {
    OCTAVO_UNROLL for (size_t r = 0; r < kRows; ++r) {
      memcpy(sums + r * sums_stride, tile + r * kOuts, kOuts * sizeof(float));
    }
    return;
  }
  const hn::CappedTag<float, kOuts> d;
  OCTAVO_UNROLL for (size_t r = 0; r < kRows; ++r) {
    float* to = sums + r * sums_stride;
    for (size_t o = 0; o < kOuts; o += hn::Lanes(d)) {
      hn::StoreU(hn::Add(hn::LoadU(d, to + o), hn::LoadU(d, tile + r * kOuts + o)), d, to + o);
    }
  }
}

template <class W>
struct BlockOf {
  static constexpr int64_t kPanelStep = kPanel / kElements<W>;

  FloatRows x;
  const W* w;                 // of the block's first output
  int64_t w_stride, columns;  // in W
  int64_t outs;

  // Panels [panel, panel_end) of kRows rows and all outputs of the block.
  template <size_t kRows>
  HWY_INLINE void AddRows(int64_t row, int64_t panel, int64_t panel_end, float* sums) const {
    constexpr int64_t kOuts = TileOuts<kRows>();
    int64_t o = 0;
    for (; o + kOuts <= outs; o += kOuts) {
      for (int64_t p = panel; p < panel_end; ++p) Add<kRows, kOuts>(row, o, p, sums);
    }
    for (; o < outs; ++o) {
      for (int64_t p = panel; p < panel_end; ++p) Add<kRows, 1>(row, o, p, sums);
    }
  }

  template <size_t kRows, size_t kOuts>
  HWY_INLINE void Add(int64_t row, int64_t o, int64_t p, float* sums) const {
    const int64_t begin = p * kPanelStep;
    const W* tile = w + o * w_stride;
    const W* next = tile + static_cast<int64_t>(kOuts) * w_stride;
    constexpr int64_t kSize = sizeof(W);
    // By output, the next tile's weights follow in memory; by panel, they are the same columns of
    // the next rows.
    Ahead ahead{reinterpret_cast<const char*>(next + kOuts * begin), kOuts * kSize, 0, 64};
    if (kRows > kOnePassRows) {
      ahead = {reinterpret_cast<const char*>(next + begin), kSize, w_stride * kSize,
               kLineVectors<W> * w_stride * kSize};
    }
    // The first rows have fetched them for all: the same line again and again.
    if (row > 0) ahead = {reinterpret_cast<const char*>(tile), 0, 0, 0};
    AddTile<kRows, kOuts>(x.data + row * x.stride + begin, x.stride, tile + begin, w_stride,
                          HWY_MIN(kPanelStep, columns - begin), ahead, p == 0, sums + o, outs);
  }

  void AddTileRows(int64_t row, int64_t rows, int64_t panel, int64_t panel_end, float* sums) const {
    switch (rows) {
      case 1:
        return AddRows<1>(row, panel, panel_end, sums);
      case 2:
        return AddRows<2>(row, panel, panel_end, sums);
      case 3:
        return AddRows<3>(row, panel, panel_end, sums);
      case 4:
        return AddRows<4>(row, panel, panel_end, sums);
      case 5:
        return AddRows<5>(row, panel, panel_end, sums);
      default:
        return AddRows<6>(row, panel, panel_end, sums);
    }
  }
};

template <class T, class B>
HWY_INLINE void FinishRow(const float* sums, const B* bias, bool accumulate, int64_t outs, T* out) {
  constexpr int64_t kStep = kLanes;
  int64_t o = 0;
  for (; o + kStep <= outs; o += kStep) {
    V v = Load(sums + o);
    if (bias != nullptr) v = hn::Add(v, Load(bias + o));
    if (accumulate) v = hn::Add(Load(out + o), v);
    Store(v, out + o);
  }
  if (o < outs) {
    const size_t n = static_cast<size_t>(outs - o);
    V v = LoadN(sums + o, n);
    if (bias != nullptr) v = hn::Add(v, LoadN(bias + o, n));
    if (accumulate) v = hn::Add(LoadN(out + o, n), v);
    StoreN(v, out + o, n);
  }
}

template <class T>
HWY_INLINE void FinishRowTo(const MatMulBlockArgs& args, const float* sums, int64_t row) {
  const int64_t begin = args.begin, outs = args.end - args.begin;
  T* out = args.out.Row<T>(row) + begin;
  switch (args.bias ? args.bias.dtype : DType::kF32) {
    case DType::kBF16:
      return FinishRow(sums, args.bias.Row<BF16>(0) + begin, args.accumulate, outs, out);
    case DType::kF16:
      return FinishRow(sums, args.bias.Row<F16>(0) + begin, args.accumulate, outs, out);
    default:
      return FinishRow(sums, args.bias ? args.bias.Row<float>(0) + begin : nullptr, args.accumulate,
                       outs, out);
  }
}

// sums + bias, and what was there before if asked; rounded once.
HWY_INLINE void Finish(const MatMulBlockArgs& args, const float* sums, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row_sums = sums + r * (args.end - args.begin);
    if (args.out.dtype == DType::kBF16) {
      FinishRowTo<BF16>(args, row_sums, row + r);
    } else {
      FinishRowTo<float>(args, row_sums, row + r);
    }
  }
}

template <class W>
HWY_INLINE void MatMulBlockOf(const MatMulBlockArgs& args) {
  const Tensor& weight = args.weight;
  const int64_t rows = args.x.rows;
  constexpr int64_t kOf = kElements<W>;
  const auto* w = static_cast<const W*>(weight.data) + args.begin * (weight.row_stride / kOf);
  const BlockOf<W> block{args.x, w, weight.row_stride / kOf, weight.columns() / kOf,
                         args.end - args.begin};
  constexpr int64_t kStep = BlockOf<W>::kPanelStep;
  const int64_t panels = HWY_MAX((block.columns + kStep - 1) / kStep, 1);
  if (panels == 1 || rows <= kOnePassRows) {  // each weight row is read from end to end
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t n = HWY_MIN(kTileRows, rows - row);
      block.AddTileRows(row, n, 0, panels, args.sums);
      Finish(args, args.sums, row, n);
    }
    return;
  }
  for (int64_t p = 0; p < panels; ++p) {  // a panel of the block's weights stays in L2 for all rows
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t n = HWY_MIN(kTileRows, rows - row);
      float* sums = args.sums + row * block.outs;
      block.AddTileRows(row, n, p, p + 1, sums);
      if (p + 1 == panels) Finish(args, sums, row, n);
    }
  }
}

// Few rows of x, and MXFP4 weights as they are stored. Same sums as BlockOf, to the bit.
void MatMulMxfp4(const MatMulBlockArgs& args) {
  const int64_t outs = args.end - args.begin, columns = args.weight.columns();
  OCTAVO_CHECK(kMxfp4Rows > 0 && args.begin % mxfp4::kTileRows == 0 && columns % mxfp4::kBlock == 0,
               ShapeString(args.weight), args.begin);
  for (int64_t row = 0; row < args.x.rows; row += kMxfp4Rows) {
    const int64_t rows = HWY_MIN(kMxfp4Rows, args.x.rows - row);
    for (int64_t o = 0; o < outs; o += mxfp4::kTileRows) {
      const auto* tiles = static_cast<const uint8_t*>(args.weight.data) +
                          mxfp4::TileOffset(columns, args.begin + o, 0);
      for (int64_t begin = 0; begin < columns; begin += kPanel) {
        AddMxfp4(rows, args.x.data + row * args.x.stride + begin, args.x.stride,
                 tiles + mxfp4::TileOffset(columns, 0, begin), HWY_MIN(kPanel, columns - begin),
                 begin == 0, args.sums + o, outs, outs - o);
      }
    }
    Finish(args, args.sums, row, rows);
  }
}
int64_t Mxfp4RowsImpl() { return kMxfp4Rows; }

void MatMulBlockImpl(const MatMulBlockArgs& args) {
  switch (args.weight.dtype) {
    case DType::kMxfp4:
      return MatMulMxfp4(args);
    case DType::kBF16:
#if OCTAVO_PAIRS
      if (args.x.pairs) return MatMulBlockOf<BF16Pair>(args);
#endif
      return MatMulBlockOf<BF16>(args);
    case DType::kF16:
      return MatMulBlockOf<F16>(args);
    default:
      return MatMulBlockOf<float>(args);
  }
}

template <class T>
HWY_INLINE void WidenRow(const T* x, int64_t columns, float* out, int64_t stride) {
  constexpr int64_t kStep = kLanes;
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) Store(Load(x + i), out + i);
  if (i < columns) {
    Store(LoadN(x + i, static_cast<size_t>(columns - i)), out + i);
    i += kStep;
  }
  for (; i < stride; i += kStep) Store(Zero(), out + i);
}

void WidenRowsImpl(const Tensor& x, const int32_t* ids, const FloatRows& out) {
  for (int64_t r = 0; r < out.rows; ++r) {
    const int64_t from = ids != nullptr ? ids[r] : r;
    float* to = out.data + r * out.stride;
    if (out.pairs) {
      memcpy(to, x.Row<BF16>(from), x.columns() * sizeof(BF16));
      std::fill(to + x.columns() / 2, to + out.stride, 0.0f);
    } else if (x.dtype == DType::kBF16) {
      WidenRow(x.Row<BF16>(from), x.columns(), to, out.stride);
    } else {
      WidenRow(x.Row<float>(from), x.columns(), to, out.stride);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {
namespace {

HWY_EXPORT(MatMulBlockImpl);
HWY_EXPORT(Mxfp4RowsImpl);
HWY_EXPORT(WidenRowsImpl);

bool IsActivation(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }
bool IsWeight(DType dtype) { return IsActivation(dtype) || dtype == DType::kF16; }

constexpr int64_t kWidenRows = 32;  // rows per work item

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t FloatRowStride(int64_t columns) { return CeilDiv(columns, 16) * 16; }

void WidenRows(const Tensor& x, const int32_t* ids, const FloatRows& out) {
  HWY_DYNAMIC_DISPATCH(WidenRowsImpl)(x, ids, out);
}

int64_t Mxfp4Rows() { return HWY_DYNAMIC_DISPATCH(Mxfp4RowsImpl)(); }

void MatMulBlock(const MatMulBlockArgs& args) { HWY_DYNAMIC_DISPATCH(MatMulBlockImpl)(args); }

MatMulGrid PlanMatMul(int64_t rows, int64_t outs, int64_t columns, int threads) {
  const auto grid = [&](int64_t block_rows, int64_t block_outs) {
    return MatMulGrid{block_rows, block_outs, CeilDiv(rows, block_rows), CeilDiv(outs, block_outs)};
  };
  // 128 outputs x 1024 columns of bf16 weights are 256 KiB, a quarter of L2.
  MatMulGrid best = grid(std::max<int64_t>(rows, 1), 128);
  if (threads == 1 || !WorthThreads(rows, outs, columns)) return best;
  // Four items per thread level the load; below 32 outputs or 96 rows an item's fixed cost shows.
  while (best.items() < 4 * threads && best.block_outs > 32)
    best = grid(best.block_rows, best.block_outs / 2);
  while (best.items() < 4 * threads && best.block_rows > 96) {
    best = grid(CeilDiv(CeilDiv(best.block_rows, 2), kMaxTileRows) * kMaxTileRows, best.block_outs);
  }
  return best;
}

void MatMul(const MatMulArgs& args, ThreadPool& pool, MatMulScratch& scratch) {
  const int64_t rows = args.x.rows(), columns = args.x.columns(), outs = args.weight.rows();
  OCTAVO_CHECK(
      args.weight.columns() == columns && args.out.rows() == rows && args.out.columns() == outs,
      ShapeString(args.x), ShapeString(args.weight), ShapeString(args.out));
  OCTAVO_CHECK(
      IsActivation(args.x.dtype) && IsActivation(args.out.dtype) && IsWeight(args.weight.dtype),
      ShapeString(args.x), ShapeString(args.weight), ShapeString(args.out));
  OCTAVO_CHECK(!args.accumulate || args.out.dtype == DType::kF32, ShapeString(args.out));
  OCTAVO_CHECK(!args.bias || (args.bias.size() == outs && IsWeight(args.bias.dtype)),
               ShapeString(args.bias));
  const int64_t stride = FloatRowStride(columns);
  const int64_t chunks = CeilDiv(rows, kRowChunk);
  const int64_t chunk =
      chunks <= 1 ? rows : CeilDiv(CeilDiv(rows, chunks), kMaxTileRows) * kMaxTileRows;
  FloatRows x{scratch.x.Get<float>(chunk * stride), stride, chunk};
  x.pairs = args.x.dtype == DType::kBF16 && args.weight.dtype == DType::kBF16 && columns % 2 == 0 &&
            args.weight.row_stride % 2 == 0 && MultipliesPairs();
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    x.rows = std::min(chunk, rows - begin);
    const MatMulGrid grid = PlanMatMul(x.rows, outs, columns, pool.threads());
    const int64_t sums_size = MatMulSums(grid.block_rows, grid.block_outs);
    float* sums = scratch.sums.Get<float>(sums_size * pool.threads());
    const bool parallel = WorthThreads(x.rows, outs, columns);
    const Tensor from = args.x.Rows(begin, begin + x.rows),
                 to = args.out.Rows(begin, begin + x.rows);
    const auto widen = [&](int64_t block, int) {
      const int64_t row = block * kWidenRows, row_end = std::min(row + kWidenRows, x.rows);
      WidenRows(from.Rows(row, row_end), nullptr, x.Rows(row, row_end));
    };
    const auto multiply = [&](int64_t item, int thread) {
      const int64_t row = item / grid.out_blocks * grid.block_rows;
      const int64_t out = item % grid.out_blocks * grid.block_outs;
      const int64_t row_end = std::min(row + grid.block_rows, x.rows);
      MatMulBlock({.x = x.Rows(row, row_end),
                   .weight = args.weight,
                   .bias = args.bias,
                   .begin = out,
                   .end = std::min(out + grid.block_outs, outs),
                   .out = to.Rows(row, row_end),
                   .sums = sums + thread * sums_size,
                   .accumulate = args.accumulate});
    };
    // std::ref: a std::function made of it does not allocate.
    const int64_t widen_blocks = CeilDiv(x.rows, kWidenRows);
    if (parallel) {
      pool.ForEach(widen_blocks, std::ref(widen));
      pool.ForEach(grid.items(), std::ref(multiply));
    } else {
      for (int64_t i = 0; i < widen_blocks; ++i) widen(i, 0);
      for (int64_t i = 0; i < grid.items(); ++i) multiply(i, 0);
    }
  }
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
