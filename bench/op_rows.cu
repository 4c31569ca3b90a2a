// The rows of attention_bench for norm, activation, routing, experts and sampling.
#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "kernels/cuda/ops.h"
#include "kernels/mxfp4_testing.h"
#include "rows.h"

namespace octavo::bench {
namespace {

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;

// Memory that turns with the sets, filled with normal numbers.
struct Numbered {
  std::vector<DeviceMemory> sets;
  Numbered(int count, DType dtype, int64_t elements, float scale = 1) {
    for (int i = 0; i < count; ++i) {
      sets.emplace_back(elements * static_cast<int64_t>(SizeOf(dtype)));
      const Element element = dtype == kF32 ? Element::kF32 : Element::kBF16;
      FillNormal(sets.back().as(), element, elements, scale, 500 + i);
    }
  }
};

int SetsOf(double bytes) {
  return std::min(static_cast<int>(static_cast<double>(kColdBytes) / bytes) + 2, 64);
}

// Each row is owed so many terms.
Row NormRow(int64_t rows, int64_t columns, int owed = 0) {
  const double bytes =
      static_cast<double>(rows * columns) * (owed > 0 ? 10 + 4 * owed : 6) + 2.0 * columns;
  const int sets = SetsOf(bytes);
  struct Work {
    Numbered x, weight, terms, out;
  };
  const auto work = std::make_shared<Work>(Work{{sets, kF32, rows * columns},
                                                {sets, kBF16, columns},
                                                {sets, kF32, rows * owed * columns},
                                                {sets, kBF16, rows * columns}});
  return {.group = "norm",
          .name = std::to_string(rows) + " x " + std::to_string(columns) +
                  (owed > 0 ? ", owed " + std::to_string(owed) : ""),
          .format = "f32 to bf16",
          .bytes = bytes,
          .sets = sets,
          .call = [=](int set, void* stream) {
            const Tensor x(work->x.sets[set].as(), kF32, {rows, columns});
            cuda::Owed some;
            if (owed > 0) some = {work->terms.sets[set].as<float>(), owed, x, true};
            cuda::Norm({.x = x,
                        .weight = Tensor(work->weight.sets[set].as(), kBF16, {columns}),
                        .eps = 1e-5f,
                        .out = Tensor(work->out.sets[set].as(), kBF16, {rows, columns})},
                       static_cast<cudaStream_t>(stream), some);
          }};
}

Row ActivationRow(int64_t rows, int64_t columns) {
  const double bytes = static_cast<double>(rows * columns) * 6;
  const int sets = SetsOf(bytes);
  struct Work {
    Numbered both, out;
  };
  const auto work = std::make_shared<Work>(
      Work{{sets, kBF16, 2 * rows * columns}, {sets, kBF16, rows * columns}});
  return {.group = "silu",
          .name = std::to_string(rows) + " x " + std::to_string(columns),
          .format = "bf16",
          .bytes = bytes,
          .sets = sets,
          .call = [=](int set, void* stream) {
            const Tensor both(work->both.sets[set].as(), kBF16, {rows, 2 * columns});
            cuda::GatedActivation({.gate = both.Columns(0, columns),
                                   .up = both.Columns(columns, 2 * columns),
                                   .out = Tensor(work->out.sets[set].as(), kBF16, {rows, columns})},
                                  static_cast<cudaStream_t>(stream));
          }};
}

Row RouteRow(int64_t rows, int64_t experts, int64_t top_k) {
  struct Work {
    Numbered logits;
    DeviceMemory ids, weights;
  };
  const auto work = std::make_shared<Work>(Work{
      {1, kF32, rows * experts}, DeviceMemory(rows * top_k * 4), DeviceMemory(rows * top_k * 4)});
  return {.group = "route",
          .name = std::to_string(rows) + " x " + std::to_string(top_k) + " of " +
                  std::to_string(experts),
          .format = "f32",
          .bytes = static_cast<double>(rows * (4 * experts + 8 * top_k)),
          .call = [=](int, void* stream) {
            cuda::Route({.logits = Tensor(work->logits.sets[0].as(), kF32, {rows, experts}),
                         .top_k = static_cast<int>(top_k),
                         .ids = Tensor(work->ids.as(), DType::kI32, {rows, top_k}),
                         .weights = Tensor(work->weights.as(), kF32, {rows, top_k})},
                        static_cast<cudaStream_t>(stream));
          }};
}

struct ExpertShape {
  const char* name;
  int experts, top_k;
  int64_t hidden, intermediate;
  Activation activation;
};

// Sets of the matrices of all experts, one behind the other. Of MXFP4, one expert again and again.
std::vector<DeviceMemory> ExpertMatrices(int sets, const ExpertShape& s, DType weights) {
  if (weights == kBF16)
    return Numbered(sets, kBF16, 3 * s.experts * s.hidden * s.intermediate, 50).sets;
  std::mt19937 random(8);
  std::vector<uint8_t> expert, all;
  for (const auto& [outs, in] : {std::pair{s.intermediate, s.hidden},
                                 {s.intermediate, s.hidden},
                                 {s.hidden, s.intermediate}}) {
    const std::vector<uint8_t> matrix = mxfp4::RandomMatrix(outs, in, 0.02, random);
    expert.insert(expert.end(), matrix.begin(), matrix.end());
  }
  for (int e = 0; e < s.experts; ++e) all.insert(all.end(), expert.begin(), expert.end());
  std::vector<DeviceMemory> memory;
  for (int i = 0; i < sets; ++i) memory.emplace_back(all);
  return memory;
}

struct ExpertWork {
  ExpertShape shape;
  DType weight_type;
  int64_t rows;
  int64_t used = 0;  // experts
  int sets;
  cuda::Experts op;
  std::vector<DeviceMemory> weights;
  Numbered x, out;
  DeviceMemory ids, pair_weights;

  ExpertWork(const ExpertShape& s, DType weight_type_, int64_t rows_)
      : shape(s),
        weight_type(weight_type_),
        rows(rows_),
        sets(rows_ <= 32 ? 2 : 1),  // a set is larger than L2 many times
        op({.rows = static_cast<int>(rows_),
            .experts = s.experts,
            .top_k = s.top_k,
            .hidden = s.hidden,
            .intermediate = s.intermediate}),
        weights(ExpertMatrices(sets, s, weight_type_)),
        x(sets, kBF16, rows_ * s.hidden),
        out(sets, kF32, rows_ * s.hidden) {
    std::mt19937 random(7);
    std::vector<int32_t> chosen, order(s.experts);
    std::vector<bool> seen(s.experts);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t r = 0; r < rows; ++r) {
      std::shuffle(order.begin(), order.end(), random);
      std::sort(order.begin(), order.begin() + s.top_k);
      for (int k = 0; k < s.top_k; ++k) {
        used += !seen[order[k]];
        seen[order[k]] = true;
        chosen.push_back(order[k]);
      }
    }
    ids = DeviceMemory(chosen);
    pair_weights = DeviceMemory(std::vector<float>(chosen.size(), 0.25f));
  }
  int64_t MatrixBytes(int64_t outs, int64_t in) const {
    return weight_type == kBF16 ? 2 * outs * in : mxfp4::Bytes(outs, in);
  }
  double Bytes() const {
    const int64_t expert = 2 * MatrixBytes(shape.intermediate, shape.hidden) +
                           MatrixBytes(shape.hidden, shape.intermediate);
    return static_cast<double>(used * expert + 6 * rows * shape.hidden);
  }
  double Flops() const {
    return 6.0 * static_cast<double>(rows * shape.top_k * shape.hidden * shape.intermediate);
  }
  void Run(int set, void* stream) {
    std::vector<Expert> list(shape.experts);
    auto* at = weights[set].as<std::byte>();
    const auto next = [&](int64_t outs, int64_t in) {
      const Tensor matrix(at, weight_type, {outs, in});
      at += MatrixBytes(outs, in);
      return matrix;
    };
    for (Expert& e : list) {
      e.gate = next(shape.intermediate, shape.hidden);
      e.up = next(shape.intermediate, shape.hidden);
      e.down = next(shape.hidden, shape.intermediate);
    }
    const ExpertsArgs args{.x = Tensor(x.sets[set].as(), kBF16, {rows, shape.hidden}),
                           .ids = Tensor(ids.as(), DType::kI32, {rows, shape.top_k}),
                           .weights = Tensor(pair_weights.as(), kF32, {rows, shape.top_k}),
                           .experts = list,
                           .activation = shape.activation,
                           .limit = 7,
                           .out = Tensor(out.sets[set].as(), kF32, {rows, shape.hidden})};
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    cuda::Settle(op.Run(args, cuda_stream), cuda_stream);
  }
};

double MedianSeconds(const std::function<void()>& call) {
  std::vector<double> times;
  for (int i = 0; i < 60; ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    times.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 30, times.end());
  return times[30];
}

}  // namespace

std::vector<Row> ElementwiseRows(int rows) {
  return {NormRow(rows, 2880),        NormRow(rows, 2880, 4), NormRow(rows, 4096),
          ActivationRow(rows, 14336), RouteRow(rows, 32, 4),  RouteRow(rows, 128, 8)};
}

std::vector<Row> ExpertRows(int rows) {
  const ExpertShape gpt_oss{"gpt-oss-20b", 32, 4, 2880, 2880, Activation::kSwigluOai},
      qwen3{"Qwen3-30B-A3B", 128, 8, 2048, 768, Activation::kSilu};
  std::vector<Row> list;
  for (const auto& [shape, weights] :
       {std::pair{gpt_oss, kBF16}, {gpt_oss, DType::kMxfp4}, {qwen3, kBF16}}) {
    const auto work = std::make_shared<ExpertWork>(shape, weights, rows);
    list.push_back({.group = "experts",
                    .name = std::to_string(rows) + " rows, " + shape.name,
                    .format = std::to_string(work->used) + " experts, " +
                              (weights == kBF16 ? "bf16" : Name(weights)),
                    .bytes = work->Bytes(),
                    .flops = rows > 16 ? work->Flops() : 0,
                    .sets = work->sets,
                    .call = [work](int set, void* stream) { work->Run(set, stream); }});
  }
  return list;
}

std::vector<Row> SampleRows(int rows) {
  std::vector<Row> list;
  for (const int64_t vocab : {128256, 262144}) {
    const Numbered logits(1, kF32, rows * vocab, 0.3f);
    cuda::Sampler sampler(rows, vocab);
    for (const auto& [name, row] :
         {std::pair{"greedy", SampleRow{}},
          {"temperature", SampleRow{.temperature = 1}},
          {"top_k 50", SampleRow{.temperature = 1, .top_k = 50}},
          {"top_k 50, top_p 0.9", SampleRow{.temperature = 1, .top_k = 50, .top_p = 0.9f}},
          {"top_p 0.9", SampleRow{.temperature = 1, .top_p = 0.9f}}}) {
      const std::vector<SampleRow> params(rows, row);
      std::vector<SampledToken> out(rows);
      const double seconds = MedianSeconds([&] {
        sampler.Run({.logits = Tensor(logits.sets[0].as(), kF32, {rows, vocab}),
                     .rows = params,
                     .out = out},
                    nullptr);
      });
      list.push_back({.group = "sample",
                      .name = std::to_string(rows) + " x " + std::to_string(vocab),
                      .format = name,
                      .bytes = 4.0 * static_cast<double>(rows * vocab),
                      .seconds = seconds});
    }
  }
  return list;
}

}  // namespace octavo::bench
