#include "kernels/cpu/moe.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "base/error.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/mxfp4.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/moe.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr int64_t kStep = kLanes;

// out = sum over k of weights[k] * y[places[k]], or out += that; rounded once.
template <class T>
HWY_INLINE void CombineRow(const float* y, int64_t y_stride, const int32_t* places,
                           const float* weights, int64_t top_k, int64_t columns, bool accumulate,
                           T* out) {
  for (int64_t i = 0; i < columns; i += kStep) {  // y's rows are padded to whole vectors
    V sum = hn::Mul(Set(weights[0]), Load(y + places[0] * y_stride + i));
    for (int64_t k = 1; k < top_k; ++k) {
      sum = hn::MulAdd(Set(weights[k]), Load(y + places[k] * y_stride + i), sum);
    }
    if (i + kStep <= columns) {
      if (accumulate) sum = hn::Add(Load(out + i), sum);
      Store(sum, out + i);
    } else {
      const size_t n = static_cast<size_t>(columns - i);
      if (accumulate) sum = hn::Add(LoadN(out + i, n), sum);
      StoreN(sum, out + i, n);
    }
  }
}

void CombineRows(const ExpertsArgs& args, const float* y, int64_t y_stride, const int32_t* places,
                 int64_t begin, int64_t end) {
  const auto combine = [&](int64_t r, auto* out) {
    const int64_t top_k = args.ids.columns();
    CombineRow(y, y_stride, places + r * top_k, args.weights.Row<float>(r), top_k,
               args.out.columns(), args.accumulate, out);
  };
  for (int64_t r = begin; r < end; ++r) {
    if (args.out.dtype == DType::kBF16) {
      combine(r, args.out.Row<BF16>(r));
    } else {
      combine(r, args.out.Row<float>(r));
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

HWY_EXPORT(CombineRows);

constexpr int kMaxTopK = 64;
constexpr int64_t kExpertChunk = 1024;     // rows routed together: bounds the scratch
constexpr int64_t kExpertBlockOuts = 128;  // as PlanMatMul
constexpr int64_t kWidenOuts = 32;         // of MXFP4, at a time: they stay in L2

// NaN above everything, as torch.topk orders it: a NaN logit must show in the result.
bool RanksAbove(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

// The top_k of `logits`, ties to the lower expert, in ascending order.
void TopExperts(const float* logits, int64_t experts, int top_k, int32_t* ids) {
  int count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int at = count;  // best first; a later expert goes behind its equals
    while (at > 0 && RanksAbove(logits[e], logits[ids[at - 1]])) --at;
    if (at == top_k) continue;
    if (count < top_k) ++count;
    for (int i = count - 1; i > at; --i) ids[i] = ids[i - 1];
    ids[at] = static_cast<int32_t>(e);
  }
  std::sort(ids, ids + top_k);
}

void RouteRow(const RouteArgs& args, int64_t row) {
  const float* logits = args.logits.Row<float>(row);
  const int64_t experts = args.logits.columns();
  int32_t* ids = args.ids.Row<int32_t>(row);
  float* weights = args.weights.Row<float>(row);
  TopExperts(logits, experts, args.top_k, ids);
  // Normalised, a softmax over all is a softmax over the chosen.
  const bool over_all = args.softmax_first && !args.normalize;
  double chosen[kMaxTopK], max = logits[ids[0]], sum = 0;
  for (int k = 1; k < args.top_k; ++k) max = std::max<double>(max, logits[ids[k]]);
  for (int k = 0; k < args.top_k; ++k) chosen[k] = std::exp(logits[ids[k]] - max);
  if (over_all) {
    for (int64_t e = 0; e < experts; ++e) sum += std::exp(logits[e] - max);
  } else {
    for (int k = 0; k < args.top_k; ++k) sum += chosen[k];
  }
  for (int k = 0; k < args.top_k; ++k) weights[k] = static_cast<float>(chosen[k] / sum);
}

// The (row, k) pairs of a chunk sorted by expert.
struct Grouping {
  int64_t pairs = 0, active = 0, most_rows = 0;
  int32_t* rows;     // [pairs] the row of each place
  int32_t* places;   // [rows, top_k] where a pair's result stands
  int32_t* experts;  // [active]
  int32_t* begins;   // [active + 1] first place of each active expert
};

Grouping GroupByExpert(const Tensor& ids, int64_t experts, Scratch& scratch) {
  const int64_t rows = ids.rows(), top_k = ids.columns(), pairs = rows * top_k;
  int32_t* memory = scratch.Get<int32_t>(2 * pairs + 3 * experts + 1);
  Grouping group{.pairs = pairs,
                 .rows = memory,
                 .places = memory + pairs,
                 .experts = memory + 2 * pairs,
                 .begins = memory + 2 * pairs + experts};
  int32_t* next = group.begins + experts + 1;  // [experts] where an expert's next row goes
  std::fill(next, next + experts, 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t expert = ids.Row<int32_t>(r)[k];
      OCTAVO_CHECK(0 <= expert && expert < experts, expert, experts);
      ++next[expert];
    }
  }
  int32_t place = 0;
  for (int32_t e = 0; e < experts; ++e) {
    const int32_t count = next[e];
    next[e] = place;
    if (count == 0) continue;
    group.experts[group.active] = e;
    group.begins[group.active++] = place;
    group.most_rows = std::max<int64_t>(group.most_rows, count);
    place += count;
  }
  group.begins[group.active] = place;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t at = next[ids.Row<int32_t>(r)[k]]++;
      group.rows[at] = static_cast<int32_t>(r);
      group.places[r * top_k + k] = at;
    }
  }
  return group;
}

struct Matrices {
  FloatRows x, gate, up, down;
};

Tensor AsTensor(const FloatRows& rows, int64_t begin, int64_t end, int64_t columns) {
  Tensor tensor(rows.data + begin * rows.stride, DType::kF32, {end - begin, columns});
  tensor.row_stride = rows.stride;
  return tensor;
}

// What a thread needs for itself.
struct ItemScratch {
  float* sums;
  uint16_t* widened;  // of MXFP4 only
};

Tensor Part(const Tensor& vector, int64_t begin, int64_t end) {
  Tensor part = vector;
  if (!part) return part;
  part.data = static_cast<std::byte*>(part.data) + begin * static_cast<int64_t>(SizeOf(part.dtype));
  part.shape[part.rank - 1] = end - begin;
  return part;
}

// Outputs [begin, end) of an expert's matrix.
void Project(const FloatRows& x, const Tensor& weight, const Tensor& bias, int64_t begin,
             int64_t end, const Tensor& out, const ItemScratch& scratch) {
  if (weight.dtype != DType::kMxfp4 || x.rows <= Mxfp4Rows()) {
    MatMulBlock({.x = x,
                 .weight = weight,
                 .bias = bias,
                 .begin = begin,
                 .end = end,
                 .out = out,
                 .sums = scratch.sums});
    return;
  }
  for (int64_t from = begin; from < end; from += kWidenOuts) {
    const int64_t to = std::min(from + kWidenOuts, end);
    MatMulBlock({.x = x,
                 .weight = WidenMxfp4(weight, from, to, scratch.widened),
                 .bias = Part(bias, from, to),
                 .begin = 0,
                 .end = to - from,
                 .out = out.Columns(from, to),
                 .sums = scratch.sums});
  }
}

// One block of outputs of one active expert: gate, up and the activation.
void GateUpItem(const ExpertsArgs& args, const Grouping& group, const Matrices& m, int64_t active,
                int64_t begin, const ItemScratch& scratch) {
  const Expert& expert = args.experts[group.experts[active]];
  const int64_t from = group.begins[active], to = group.begins[active + 1];
  const int64_t columns = expert.gate.rows(), end = std::min(begin + kExpertBlockOuts, columns);
  const Tensor gate = AsTensor(m.gate, from, to, columns), up = AsTensor(m.up, from, to, columns);
  const FloatRows x = m.x.Rows(from, to);
  Project(x, expert.gate, expert.gate_bias, begin, end, gate, scratch);
  Project(x, expert.up, expert.up_bias, begin, end, up, scratch);
  GatedActivationBlock(
      {.activation = args.activation, .limit = args.limit, .gate = gate, .up = up, .out = gate},
      begin, end);
}

void DownItem(const ExpertsArgs& args, const Grouping& group, const Matrices& m, int64_t active,
              int64_t begin, const ItemScratch& scratch) {
  const Expert& expert = args.experts[group.experts[active]];
  const int64_t from = group.begins[active], to = group.begins[active + 1];
  const int64_t columns = expert.down.rows();
  Project(m.gate.Rows(from, to), expert.down, expert.down_bias, begin,
          std::min(begin + kExpertBlockOuts, columns), AsTensor(m.down, from, to, columns),
          scratch);
}

void ExpertsChunk(const ExpertsArgs& args, ThreadPool& pool, ExpertsScratch& scratch) {
  const int64_t rows = args.x.rows(), hidden = args.x.columns(),
                intermediate = args.experts[0].gate.rows();
  const Grouping group =
      GroupByExpert(args.ids, static_cast<int64_t>(args.experts.size()), scratch.order);
  const int64_t x_stride = FloatRowStride(hidden), h_stride = FloatRowStride(intermediate);
  const Matrices m{
      .x = {scratch.x.Get<float>(group.pairs * x_stride), x_stride, group.pairs},
      .gate = {scratch.gate.Get<float>(group.pairs * h_stride), h_stride, group.pairs},
      .up = {scratch.up.Get<float>(group.pairs * h_stride), h_stride, group.pairs},
      .down = {scratch.down.Get<float>(group.pairs * x_stride), x_stride, group.pairs}};
  const int64_t sums_size = MatMulSums(group.most_rows, kExpertBlockOuts);
  float* sums = scratch.sums.Get<float>(sums_size * pool.threads());
  const int64_t widened_size = args.experts[0].gate.dtype == DType::kMxfp4
                                   ? Mxfp4WidenedSize(kWidenOuts, std::max(hidden, intermediate))
                                   : 0;
  uint16_t* widened = scratch.widened.Get<uint16_t>(widened_size * pool.threads());
  ForRows(pool, group.pairs, hidden, [&](int64_t begin, int64_t end, int) {
    WidenRows(args.x, group.rows + begin, m.x.Rows(begin, end));
    // The down projection reads whole vectors of the activations.
    for (int64_t p = begin; p < end; ++p) {
      std::fill(m.gate.data + p * h_stride + intermediate, m.gate.data + (p + 1) * h_stride, 0.0f);
    }
  });
  const auto run = [&](int64_t outs, auto item_function) {
    const int64_t blocks = (outs + kExpertBlockOuts - 1) / kExpertBlockOuts,
                  items = group.active * blocks;
    const auto item = [&](int64_t i, int thread) {
      item_function(args, group, m, i / blocks, i % blocks * kExpertBlockOuts,
                    {sums + thread * sums_size, widened + thread * widened_size});
    };
    if (!WorthThreads(group.pairs, intermediate, hidden)) {
      for (int64_t i = 0; i < items; ++i) item(i, 0);
    } else {
      pool.ForEach(items, std::ref(item));
    }
  };
  run(intermediate, GateUpItem);
  run(hidden, DownItem);
  ForRows(pool, rows, hidden * args.ids.columns(), [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(CombineRows)(args, m.down.data, m.down.stride, group.places, begin, end);
  });
}

}  // namespace

void Route(const RouteArgs& args, ThreadPool& pool) {
  const int64_t rows = args.logits.rows(), experts = args.logits.columns();
  OCTAVO_CHECK(args.logits.dtype == DType::kF32 && 0 < args.top_k && args.top_k <= experts &&
                   args.top_k <= kMaxTopK,
               ShapeString(args.logits), args.top_k);
  OCTAVO_CHECK(
      args.ids.rows() == rows && args.ids.columns() == args.top_k && args.ids.dtype == DType::kI32,
      ShapeString(args.ids));
  OCTAVO_CHECK(args.weights.rows() == rows && args.weights.columns() == args.top_k &&
                   args.weights.dtype == DType::kF32,
               ShapeString(args.weights));
  ForRows(pool, rows, 10 * experts, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) RouteRow(args, r);
  });
}

void Experts(const ExpertsArgs& args, ThreadPool& pool, ExpertsScratch& scratch) {
  const int64_t rows = args.x.rows();
  OCTAVO_CHECK(args.out.rows() == rows && args.out.columns() == args.x.columns(),
               ShapeString(args.x), ShapeString(args.out));
  OCTAVO_CHECK(args.ids.rows() == rows && args.weights.rows() == rows &&
                   args.ids.columns() == args.weights.columns(),
               ShapeString(args.ids), ShapeString(args.weights));
  const bool mxfp4 = args.experts[0].gate.dtype == DType::kMxfp4;
  for (const Expert& e : args.experts) {
    OCTAVO_CHECK(e.gate.rows() == e.up.rows() && e.gate.rows() == e.down.columns() &&
                     e.gate.columns() == args.x.columns() && e.up.columns() == args.x.columns() &&
                     e.down.rows() == args.x.columns() &&
                     e.gate.rows() == args.experts[0].gate.rows(),
                 ShapeString(e.gate), ShapeString(e.up), ShapeString(e.down));
    for (const Tensor* matrix : {&e.gate, &e.up, &e.down})
      OCTAVO_CHECK((matrix->dtype == DType::kMxfp4) == mxfp4, ShapeString(*matrix));
  }
  for (int64_t begin = 0; begin < rows; begin += kExpertChunk) {
    const int64_t end = std::min(begin + kExpertChunk, rows);
    ExpertsArgs chunk = args;
    chunk.x = args.x.Rows(begin, end);
    chunk.ids = args.ids.Rows(begin, end);
    chunk.weights = args.weights.Rows(begin, end);
    chunk.out = args.out.Rows(begin, end);
    ExpertsChunk(chunk, pool, scratch);
  }
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
