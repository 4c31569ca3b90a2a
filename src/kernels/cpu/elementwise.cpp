#include "kernels/cpu/elementwise.h"

#include "base/error.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr int64_t kStep = kLanes;

template <class W, class T>
HWY_INLINE void ScaleRow(const W* from, float scale, int64_t columns, T* to) {
  const V s = Set(scale);
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) Store(hn::Mul(Load(from + i), s), to + i);
  if (i < columns) {
    const size_t n = static_cast<size_t>(columns - i);
    StoreN(hn::Mul(LoadN(from + i, n), s), to + i, n);
  }
}

template <class T>
HWY_INLINE void GatherRow(const GatherArgs& args, int64_t row) {
  const int64_t id = args.ids.Row<int32_t>(0)[row], columns = args.table.columns();
  T* to = args.out.Row<T>(row);
  switch (args.table.dtype) {
    case DType::kBF16:
      return ScaleRow(args.table.Row<BF16>(id), args.scale, columns, to);
    case DType::kF16:
      return ScaleRow(args.table.Row<F16>(id), args.scale, columns, to);
    default:
      return ScaleRow(args.table.Row<float>(id), args.scale, columns, to);
  }
}

void GatherRows(const GatherArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    if (args.out.dtype == DType::kBF16) {
      GatherRow<BF16>(args, r);
    } else {
      GatherRow<float>(args, r);
    }
  }
}

// Four accumulators hide the latency of the multiply-add.
template <class T>
HWY_INLINE float SumSquares(const T* x, int64_t columns) {
  V sum0 = Zero(), sum1 = Zero(), sum2 = Zero(), sum3 = Zero();
  int64_t i = 0;
  for (; i + 4 * kStep <= columns; i += 4 * kStep) {
    const V x0 = Load(x + i), x1 = Load(x + i + kStep);
    const V x2 = Load(x + i + 2 * kStep), x3 = Load(x + i + 3 * kStep);
    sum0 = hn::MulAdd(x0, x0, sum0);
    sum1 = hn::MulAdd(x1, x1, sum1);
    sum2 = hn::MulAdd(x2, x2, sum2);
    sum3 = hn::MulAdd(x3, x3, sum3);
  }
  for (; i + kStep <= columns; i += kStep) {
    const V v = Load(x + i);
    sum0 = hn::MulAdd(v, v, sum0);
  }
  if (i < columns) {
    const V v = LoadN(x + i, static_cast<size_t>(columns - i));
    sum1 = hn::MulAdd(v, v, sum1);
  }
  const V sum = hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3));
  return hn::GetLane(hn::SumOfLanes(FloatTag(), sum));
}

template <bool kAccumulate, class T, class W, class O>
HWY_INLINE void NormRow(const T* x, const W* weight, float offset, float scale, int64_t columns,
                        O* out) {
  const V s = Set(scale), add = Set(offset);
  const auto normed = [&](V v, V w) { return hn::Mul(hn::Mul(v, s), hn::Add(w, add)); };
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) {
    V v = normed(Load(x + i), Load(weight + i));
    if constexpr (kAccumulate) v = hn::Add(Load(out + i), v);
    Store(v, out + i);
  }
  if (i < columns) {
    const size_t n = static_cast<size_t>(columns - i);
    V v = normed(LoadN(x + i, n), LoadN(weight + i, n));
    if constexpr (kAccumulate) v = hn::Add(LoadN(out + i, n), v);
    StoreN(v, out + i, n);
  }
}

template <bool kAccumulate, class T, class O>
HWY_INLINE void NormRowOf(const NormArgs& args, int64_t row) {
  const int64_t columns = args.x.columns();
  const T* x = args.x.Row<T>(row);
  const float mean = SumSquares(x, columns) / static_cast<float>(columns);
  const float scale = 1.0f / sqrtf(mean + args.eps);
  O* out = args.out.Row<O>(row);
  switch (args.weight.dtype) {
    case DType::kBF16:
      return NormRow<kAccumulate>(x, args.weight.Row<BF16>(0), args.offset, scale, columns, out);
    case DType::kF16:
      return NormRow<kAccumulate>(x, args.weight.Row<F16>(0), args.offset, scale, columns, out);
    default:
      return NormRow<kAccumulate>(x, args.weight.Row<float>(0), args.offset, scale, columns, out);
  }
}

void NormRows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    if (args.accumulate) {
      NormRowOf<true, float, float>(args, r);
    } else if (args.x.dtype == DType::kBF16) {
      NormRowOf<false, BF16, BF16>(args, r);
    } else if (args.out.dtype == DType::kBF16) {
      NormRowOf<false, float, BF16>(args, r);
    } else {
      NormRowOf<false, float, float>(args, r);
    }
  }
}

template <Activation kActivation>
HWY_INLINE V Activate(V gate, V up, V limit) {
  if constexpr (kActivation == Activation::kSilu) {
    return hn::Mul(MulSigmoid(gate, gate), up);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2u), without the cancellation at u << 0. 2 sqrt(2/pi), and that
    // times 0.044715.
    const V cubic = hn::MulAdd(hn::Mul(gate, gate), Set(0.07135481627159f), Set(1.59576912160573f));
    return hn::Mul(MulSigmoid(gate, hn::Mul(gate, cubic)), up);
  } else {
    const V g = ClampAbove(gate, limit);
    const V u = ClampBelow(ClampAbove(up, limit), hn::Neg(limit));
    return hn::Mul(hn::Add(u, Set(1.0f)), MulSigmoid(g, hn::Mul(g, Set(1.702f))));
  }
}

template <Activation kActivation, class T>
HWY_INLINE void ActivateRow(const T* gate, const T* up, float limit, int64_t columns, T* out) {
  const V l = Set(limit);
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) {
    Store(Activate<kActivation>(Load(gate + i), Load(up + i), l), out + i);
  }
  if (i < columns) {
    const size_t n = static_cast<size_t>(columns - i);
    StoreN(Activate<kActivation>(LoadN(gate + i, n), LoadN(up + i, n), l), out + i, n);
  }
}

template <Activation kActivation>
HWY_INLINE void ActivateRowOf(const GatedActivationArgs& args, int64_t row, int64_t begin,
                              int64_t end) {
  if (args.out.dtype == DType::kBF16) {
    ActivateRow<kActivation>(args.gate.Row<BF16>(row) + begin, args.up.Row<BF16>(row) + begin,
                             args.limit, end - begin, args.out.Row<BF16>(row) + begin);
  } else {
    ActivateRow<kActivation>(args.gate.Row<float>(row) + begin, args.up.Row<float>(row) + begin,
                             args.limit, end - begin, args.out.Row<float>(row) + begin);
  }
}

struct Rectangle {
  int64_t row_begin, row_end, column_begin, column_end;
};

template <Activation kActivation>
HWY_INLINE void ActivateRows(const GatedActivationArgs& args, const Rectangle& at) {
  for (int64_t r = at.row_begin; r < at.row_end; ++r) {
    ActivateRowOf<kActivation>(args, r, at.column_begin, at.column_end);
  }
}

void ActivateRectangle(const GatedActivationArgs& args, int64_t row_begin, int64_t row_end,
                       int64_t begin, int64_t end) {
  const Rectangle at{row_begin, row_end, begin, end};
  switch (args.activation) {
    case Activation::kSilu:
      return ActivateRows<Activation::kSilu>(args, at);
    case Activation::kGeluTanh:
      return ActivateRows<Activation::kGeluTanh>(args, at);
    case Activation::kSwigluOai:
      return ActivateRows<Activation::kSwigluOai>(args, at);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {
namespace {

HWY_EXPORT(GatherRows);
HWY_EXPORT(NormRows);
HWY_EXPORT(ActivateRectangle);

bool IsActivation(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }
bool IsWeight(DType dtype) { return IsActivation(dtype) || dtype == DType::kF16; }
bool SameShape(const Tensor& a, const Tensor& b) {
  return a.rows() == b.rows() && a.columns() == b.columns() && a.dtype == b.dtype;
}

}  // namespace

void Gather(const GatherArgs& args, ThreadPool& pool) {
  const int64_t rows = args.ids.size();
  OCTAVO_CHECK(args.out.rows() == rows && args.out.columns() == args.table.columns(),
               ShapeString(args.table), ShapeString(args.out), rows);
  OCTAVO_CHECK(IsWeight(args.table.dtype) && IsActivation(args.out.dtype), ShapeString(args.table),
               ShapeString(args.out));
  for (const int32_t id : std::span(args.ids.Row<int32_t>(0), rows))
    OCTAVO_CHECK(0 <= id && id < args.table.rows(), id, ShapeString(args.table));
  ForRows(pool, rows, args.out.columns(), [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(GatherRows)(args, begin, end);
  });
}

void Norm(const NormArgs& args, ThreadPool& pool) {
  const Tensor& x = args.x;
  OCTAVO_CHECK(IsActivation(x.dtype) && !args.rounded, ShapeString(x));
  OCTAVO_CHECK(
      args.out.rows() == x.rows() && args.out.columns() == x.columns() &&
          (args.out.dtype == x.dtype || (x.dtype == DType::kF32 && IsActivation(args.out.dtype))) &&
          args.weight.size() == x.columns() && IsWeight(args.weight.dtype),
      ShapeString(x), ShapeString(args.out), ShapeString(args.weight));
  OCTAVO_CHECK(!args.accumulate || (x.dtype == DType::kF32 && args.out.dtype == DType::kF32),
               ShapeString(x), ShapeString(args.out));
  ForRows(pool, x.rows(), x.columns(), [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(NormRows)(args, begin, end);
  });
}

void GatedActivation(const GatedActivationArgs& args, ThreadPool& pool) {
  OCTAVO_CHECK(IsActivation(args.gate.dtype) && SameShape(args.gate, args.up) &&
                   SameShape(args.gate, args.out),
               ShapeString(args.gate), ShapeString(args.up), ShapeString(args.out));
  const int64_t columns = args.gate.columns();
  // An exp costs some ten times what streaming an element does.
  ForRows(pool, args.gate.rows(), 10 * columns, [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(ActivateRectangle)(args, begin, end, 0, columns);
  });
}

void GatedActivationBlock(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(ActivateRectangle)(args, 0, args.gate.rows(), begin, end);
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
