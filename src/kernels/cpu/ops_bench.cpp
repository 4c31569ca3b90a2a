// The other ops of a layer at the sizes of real models. GB/s counts the bytes that must move:
// weights for experts, activations for norm and activation, logits once for sampling.
#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/mxfp4.h"

namespace octavo {
namespace {

benchmark::Counter Rate(double bytes) {
  return benchmark::Counter(bytes / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

// Qwen3-30B-A3B: hidden 2048, 128 experts of 768, 8 chosen. 128 experts are 1.2 GB: nothing stays
// in a cache.
void Experts(benchmark::State& state) {
  constexpr int64_t kHidden = 2048, kIntermediate = 768, kExpertCount = 128, kTopK = 8;
  const DType dtype = state.range(2) == 0 ? DType::kBF16 : DType::kMxfp4;
  const int64_t rows = state.range(0), matrix = dtype == DType::kBF16
                                                    ? kHidden * kIntermediate * 2
                                                    : mxfp4::Bytes(kIntermediate, kHidden);
  const auto backend = MakeCpuBackend(static_cast<int>(state.range(1)));
  const Buffer weights(3 * kExpertCount * matrix), x(rows * kHidden * 4), out(rows * kHidden * 4);
  if (dtype == DType::kBF16) {
    for (size_t i = 1; i < weights.size(); i += 2) weights.data()[i] = std::byte{0x3C};
  } else {
    std::memset(weights.data(), 0x78, weights.size());  // scales of 2^-7
  }
  std::vector<Expert> experts(kExpertCount);
  const std::byte* at = weights.data();
  for (Expert& e : experts) {
    e.gate = Tensor(at, dtype, {kIntermediate, kHidden});
    e.up = Tensor(at + matrix, dtype, {kIntermediate, kHidden});
    e.down = Tensor(at + 2 * matrix, dtype, {kHidden, kIntermediate});
    at += 3 * matrix;
  }
  std::mt19937 random(1);
  std::vector<int32_t> ids(rows * kTopK);
  std::vector<float> logits(rows * kExpertCount), weight(rows * kTopK);
  const Tensor ids_tensor(ids.data(), DType::kI32, {rows, kTopK});
  const Tensor weight_tensor(weight.data(), DType::kF32, {rows, kTopK});
  const auto choose = [&] {
    for (float& x : logits) x = std::normal_distribution<float>()(random);
    backend->Route({.logits = Tensor(logits.data(), DType::kF32, {rows, kExpertCount}),
                    .top_k = kTopK,
                    .ids = ids_tensor,
                    .weights = weight_tensor});
  };
  double used = 0;
  for (auto _ : state) {
    state.PauseTiming();
    choose();
    std::vector<bool> seen(kExpertCount);
    for (int32_t id : ids) seen[id] = true;
    for (bool b : seen) used += b;
    state.ResumeTiming();
    backend->Experts({.x = Tensor(x.data(), DType::kF32, {rows, kHidden}),
                      .ids = ids_tensor,
                      .weights = weight_tensor,
                      .experts = experts,
                      .out = Tensor(out.data(), DType::kF32, {rows, kHidden})});
  }
  state.counters["GB/s"] =
      Rate(used / static_cast<double>(state.iterations()) * 3 * static_cast<double>(matrix));
  state.counters["GFLOP/s"] =
      Rate(2.0 * 3 * static_cast<double>(rows * kTopK * kHidden * kIntermediate));
}
BENCHMARK(Experts)
    ->ArgNames({"rows", "threads", "mxfp4"})
    ->ArgsProduct({{1, 4, 256}, {1, 2}, {0, 1}})
    ->UseRealTime();

void NormBF16(benchmark::State& state) {
  const int64_t rows = state.range(0), columns = 4096;
  const auto backend = MakeCpuBackend(1);
  const Buffer x(rows * columns * 2), out(rows * columns * 2), weight(columns * 2);
  for (auto _ : state) {
    backend->Norm({.x = Tensor(x.data(), DType::kBF16, {rows, columns}),
                   .weight = Tensor(weight.data(), DType::kBF16, {1, columns}),
                   .eps = 1e-5f,
                   .out = Tensor(out.data(), DType::kBF16, {rows, columns})});
  }
  state.counters["GB/s"] = Rate(static_cast<double>(2 * rows * columns * 2));
}
BENCHMARK(NormBF16)->ArgName("rows")->Arg(1)->Arg(512);

void ActivationBF16(benchmark::State& state) {
  const int64_t rows = 64, columns = 8192;
  const auto backend = MakeCpuBackend(1);
  const Buffer gate(rows * columns * 2), up(rows * columns * 2);
  const Tensor g(gate.data(), DType::kBF16, {rows, columns}),
      u(up.data(), DType::kBF16, {rows, columns});
  for (auto _ : state) {
    backend->GatedActivation({.activation = static_cast<Activation>(state.range(0)),
                              .limit = 7,
                              .gate = g,
                              .up = u,
                              .out = g});
  }
  state.counters["GB/s"] = Rate(static_cast<double>(3 * rows * columns * 2));
}
BENCHMARK(ActivationBF16)->ArgName("activation")->Arg(0)->Arg(1)->Arg(2);

// One row of Qwen3's vocabulary, 151,936.
void SampleOneRow(benchmark::State& state, const SampleRow& row) {
  constexpr int64_t kVocab = 151936;
  const auto backend = MakeCpuBackend(1);
  std::mt19937 random(1);
  std::vector<float> fresh(kVocab), logits(kVocab);
  for (float& x : fresh) x = 3 * std::normal_distribution<float>()(random);
  SampledToken out;
  for (auto _ : state) {
    std::memcpy(logits.data(), fresh.data(), kVocab * sizeof(float));
    backend->Sample({.logits = Tensor(logits.data(), DType::kF32, {1, kVocab}),
                     .rows = std::span(&row, 1),
                     .out = std::span(&out, 1)});
  }
  state.counters["GB/s"] = Rate(kVocab * sizeof(float));
}
BENCHMARK_CAPTURE(SampleOneRow, greedy, SampleRow{});
BENCHMARK_CAPTURE(SampleOneRow, all, SampleRow{.temperature = 1});
BENCHMARK_CAPTURE(SampleOneRow, top_k_50,
                  SampleRow{.temperature = 0.7f, .top_k = 50, .top_p = 0.9f});
BENCHMARK_CAPTURE(SampleOneRow, top_p, SampleRow{.temperature = 0.7f, .top_p = 0.95f});
BENCHMARK_CAPTURE(SampleOneRow, min_p, SampleRow{.temperature = 1, .min_p = 0.05f});

}  // namespace
}  // namespace octavo
