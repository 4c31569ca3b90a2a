// Matrix products beside the two limits of the machine, measured in the same run: read bandwidth
// and the multiply-add peak. Weights rotate through at least 160 MiB, four times a 32 MiB cache and
// more, so they come from memory.
//
//   octavo_kernels_bench --benchmark_filter='Peak|MatMul'
#include <benchmark/benchmark.h>

#include <functional>
#include <thread>
#include <vector>

#include "base/float_bits.h"
#include "base/tensor.h"
#include "base/thread_pool.h"
#include "kernels/cpu/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_bench.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

// n a multiple of 128.
float ReadAll(const float* x, size_t n) {
  V sum0 = Zero(), sum1 = Zero(), sum2 = Zero(), sum3 = Zero();
  for (size_t i = 0; i < n; i += 4 * kLanes) {
    sum0 = hn::Add(sum0, Load(x + i));
    sum1 = hn::Add(sum1, Load(x + i + kLanes));
    sum2 = hn::Add(sum2, Load(x + i + 2 * kLanes));
    sum3 = hn::Add(sum3, Load(x + i + 3 * kLanes));
  }
  return hn::GetLane(hn::SumOfLanes(FloatTag(), hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3))));
}

// `rounds` times 12 independent multiply-adds; returns their number in FLOP. The chains start
// apart: equal ones would be merged by the compiler.
double MultiplyAdds(size_t rounds, float* out) {
  const V a = Set(out[0]), b = Set(out[1]);
  V s0 = Set(out[0]), s1 = Set(out[1]), s2 = Set(out[2]), s3 = Set(out[3]), s4 = Set(out[4]),
    s5 = Set(out[5]);
  V s6 = Set(out[6]), s7 = Set(out[7]), s8 = Set(out[8]), s9 = Set(out[9]), s10 = Set(out[10]),
    s11 = Set(out[11]);
  for (size_t i = 0; i < rounds; ++i) {
    s0 = hn::MulAdd(s0, b, a), s1 = hn::MulAdd(s1, b, a), s2 = hn::MulAdd(s2, b, a),
    s3 = hn::MulAdd(s3, b, a);
    s4 = hn::MulAdd(s4, b, a), s5 = hn::MulAdd(s5, b, a), s6 = hn::MulAdd(s6, b, a),
    s7 = hn::MulAdd(s7, b, a);
    s8 = hn::MulAdd(s8, b, a), s9 = hn::MulAdd(s9, b, a), s10 = hn::MulAdd(s10, b, a),
    s11 = hn::MulAdd(s11, b, a);
  }
  s0 =
      hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)), hn::Add(hn::Add(s4, s5), hn::Add(s6, s7)));
  out[0] = hn::GetLane(hn::Add(s0, hn::Add(hn::Add(s8, s9), hn::Add(s10, s11))));
  return 2.0 * 12 * kLanes * static_cast<double>(rounds);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {
namespace {

HWY_EXPORT(ReadAll);
HWY_EXPORT(MultiplyAdds);

constexpr int64_t kWorkingSet = int64_t{160} << 20;

int Threads() { return static_cast<int>(std::thread::hardware_concurrency()); }

benchmark::Counter Rate(double amount) {
  return benchmark::Counter(amount / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

void PeakRead(benchmark::State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  constexpr int64_t kPieces = 640;
  constexpr size_t kFloats = kWorkingSet / 4 / kPieces;
  const Buffer memory(kWorkingSet);
  std::memset(memory.data(), 1, memory.size());
  const auto read = [&](int64_t piece, int) {
    benchmark::DoNotOptimize(HWY_DYNAMIC_DISPATCH(ReadAll)(
        reinterpret_cast<const float*>(memory.data()) + piece * static_cast<int64_t>(kFloats),
        kFloats));
  };
  for (auto _ : state) pool.ForEach(kPieces, std::ref(read));
  state.counters["GB/s"] = Rate(static_cast<double>(kWorkingSet));
}
BENCHMARK(PeakRead)->ArgName("threads")->Arg(1)->Arg(Threads())->UseRealTime()->MinTime(1);

void PeakMultiplyAdd(benchmark::State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  double flop = 0;
  const auto multiply = [&](int64_t, int thread) {
    float values[12] = {0.5f, 0.25f, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    const double n = HWY_DYNAMIC_DISPATCH(MultiplyAdds)(1000000, values);
    benchmark::DoNotOptimize(values[0]);
    if (thread == 0) flop = n;
  };
  const int64_t items = state.range(0);
  for (auto _ : state) pool.ForEach(items, std::ref(multiply));
  state.counters["GFLOP/s"] = Rate(flop * static_cast<double>(items));
}
BENCHMARK(PeakMultiplyAdd)->ArgName("threads")->Arg(1)->Arg(Threads())->UseRealTime()->MinTime(0.5);

// rows, outs, columns, threads; x and weights: float32 or bfloat16.
void MatMulOf(benchmark::State& state, DType weight_type) {
  const int64_t rows = state.range(0), outs = state.range(1), columns = state.range(2);
  ThreadPool pool(static_cast<int>(state.range(3)));
  const int64_t bytes = outs * columns * static_cast<int64_t>(SizeOf(weight_type));
  // Few rows stream weights from memory; many rows reuse one matrix as a model's layer would.
  const int64_t copies = rows < 64 ? std::max<int64_t>(1, kWorkingSet / bytes) : 1;
  const Buffer weights(static_cast<size_t>(copies * bytes)),
      x(static_cast<size_t>(rows * columns * 4)), out(static_cast<size_t>(rows * outs * 4));
  for (size_t i = 1; i < weights.size(); i += 2)
    weights.data()[i] = std::byte{0x3C};  // small numbers
  for (size_t i = 1; i < x.size(); i += 2) x.data()[i] = std::byte{0x3C};
  MatMulScratch scratch;
  int64_t copy = 0;
  for (auto _ : state) {
    MatMul({.x = Tensor(x.data(), weight_type, {rows, columns}),
            .weight = Tensor(weights.data() + copy * bytes, weight_type, {outs, columns}),
            .bias = {},
            .out = Tensor(out.data(), DType::kF32, {rows, outs})},
           pool, scratch);
    if (++copy == copies) copy = 0;
  }
  state.counters["GB/s"] = Rate(static_cast<double>(bytes));
  state.counters["GFLOP/s"] = Rate(2.0 * static_cast<double>(rows * outs * columns));
}
void MatMulBF16(benchmark::State& state) { MatMulOf(state, DType::kBF16); }
void MatMulF32(benchmark::State& state) { MatMulOf(state, DType::kF32); }

void Shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"rows", "outs", "columns", "threads"})->UseRealTime();
  for (int threads : {1, Threads()}) {
    for (int64_t rows : {1, 2, 4, 8, 16}) bench->Args({rows, 4096, 4096, threads});
    bench->Args({1, 768, 256, threads})
        ->Args({512, 768, 256, threads})
        ->Args({512, 4096, 4096, threads});
  }
}
BENCHMARK(MatMulBF16)->Apply(Shapes);
BENCHMARK(MatMulF32)->Apply(Shapes);

}  // namespace
}  // namespace octavo::cpu
#endif  // HWY_ONCE
