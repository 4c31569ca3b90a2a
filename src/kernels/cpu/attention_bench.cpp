// Attention against the limits of the machine, measured in the same run: decode against the bandwidth of reading the same
// number of bytes, prefill against the peak of multiply-adds. The last range argument is the number of threads.
//
//   octavo_kernels_bench --benchmark_filter='Decode|Read'
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_bench.cpp"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

float ReadAll(const float* p, size_t count) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  auto a = hn::Zero(d), b = a, c = a, e = a;
  for (size_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    a = hn::Max(a, hn::Load(d, p + i));
    b = hn::Max(b, hn::Load(d, p + i + lanes));
    c = hn::Max(c, hn::Load(d, p + i + 2 * lanes));
    e = hn::Max(e, hn::Load(d, p + i + 3 * lanes));
  }
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(a, b), hn::Max(c, e))));
}

// Returns the number of multiply-adds done.
int64_t MultiplyAdds(int64_t rounds, float* out) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const V x = hn::Set(d, 0.5f), y = hn::Set(d, 1.0f);
  V s0 = y, s1 = y, s2 = y, s3 = y, s4 = y, s5 = y, s6 = y, s7 = y, s8 = y, s9 = y;
  for (int64_t i = 0; i < rounds; ++i) {
    s0 = hn::MulAdd(s0, x, y), s1 = hn::MulAdd(s1, x, y), s2 = hn::MulAdd(s2, x, y), s3 = hn::MulAdd(s3, x, y);
    s4 = hn::MulAdd(s4, x, y), s5 = hn::MulAdd(s5, x, y), s6 = hn::MulAdd(s6, x, y), s7 = hn::MulAdd(s7, x, y);
    s8 = hn::MulAdd(s8, x, y), s9 = hn::MulAdd(s9, x, y);
  }
  const V sum = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + (s8 + s9);
  *out = hn::GetLane(sum);
  return rounds * 10 * static_cast<int64_t>(hn::Lanes(d));
}

}  // namespace octavo::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <cmath>
#include <cstring>

#include "base/float_bits.h"
#include "kernels/cpu/append.h"
#include "kernels/cpu/attention.h"

namespace octavo {
namespace {

HWY_EXPORT(ReadAll);
HWY_EXPORT(MultiplyAdds);

constexpr int64_t kReadBytes = int64_t{256} << 20;  // eight times this machine's last-level cache

void BM_Read(benchmark::State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  static const Buffer memory(kReadBytes);
  constexpr int64_t kPiece = 1 << 18;  // floats
  for (auto _ : state) {
    pool.ForEach(kReadBytes / 4 / kPiece, [&](int64_t i, int) {
      const auto* p = reinterpret_cast<const float*>(memory.data()) + i * kPiece;
      benchmark::DoNotOptimize(HWY_DYNAMIC_DISPATCH(ReadAll)(p, kPiece));
    });
  }
  state.SetBytesProcessed(state.iterations() * kReadBytes);
}
BENCHMARK(BM_Read)->Arg(1)->Arg(2)->UseRealTime();

void BM_MultiplyAdds(benchmark::State& state) {
  int64_t count = 0;
  float out = 0;
  for (auto _ : state) {
    count += HWY_DYNAMIC_DISPATCH(MultiplyAdds)(100000, &out);
    benchmark::DoNotOptimize(out);
  }
  state.counters["GFMA/s"] = benchmark::Counter(static_cast<double>(count) * 1e-9, benchmark::Counter::kIsRate);
}
BENCHMARK(BM_MultiplyAdds);

// `layers` caches of one sequence, filled with pseudo-random numbers, pages in a scattered order.
class Cache {
 public:
  Cache(KvFormat format, int kv_heads, int head_dim, int context, int layers)
      : layout_{format, format, kv_heads, head_dim}, context_(context) {
    const int pages = (context + kPageSize - 1) / kPageSize;
    page_bytes_ = layout_.ClaimBytes() * layers;
    arena_ = Buffer(static_cast<size_t>(page_bytes_) * pages);
    for (int i = 0; i < pages; ++i) {
      // 97 is prime to any number of pages used here.
      table_.push_back(static_cast<uint32_t>(int64_t{i} * 97 % pages * (page_bytes_ / kPageUnit)));
    }
    scales_.assign(kv_heads, 0.01f);
    Fill(layers);
  }
  KvLayer Layer(int layer) const {
    return {.layout = layout_, .arena = arena_.data(), .claim_offset = layer * layout_.ClaimBytes(),
            .k_scale = scales_.data(), .v_scale = scales_.data()};
  }
  Tensor table() const { return Tensor(table_.data(), DType::kI32, {1, static_cast<int64_t>(table_.size())}); }
  const KvLayout& layout() const { return layout_; }

 private:
  void Fill(int layers) {
    ThreadPool pool(1);
    const int64_t columns = int64_t{layout_.kv_heads} * layout_.head_dim;
    std::vector<float> x(kPageSize * columns);
    uint32_t random = 1;
    for (float& value : x) {
      random = random * 1664525 + 1013904223;
      value = static_cast<float>(static_cast<int32_t>(random)) * 0x1p-31f;
    }
    const int32_t q_begin[] = {0, kPageSize}, kv_len[] = {kPageSize};
    std::vector<int64_t> slots(kPageSize);
    BatchView batch{.tokens = kPageSize, .q_begin = q_begin, .kv_len = kv_len, .slots = slots, .block_table = {}};
    AppendArgs args;
    args.q = args.k = args.v = Tensor(x.data(), DType::kF32, {kPageSize, columns});
    args.heads = layout_.kv_heads;
    args.batch = &batch;
    for (int layer = 0; layer < layers; ++layer) {
      args.cache = Layer(layer);
      for (uint32_t page : table_) {
        for (int i = 0; i < kPageSize; ++i) slots[i] = int64_t{page} * kPageSize + i;
        cpu::Append(args, pool);
      }
    }
  }

  KvLayout layout_;
  int context_;
  int64_t page_bytes_;
  Buffer arena_;
  std::vector<uint32_t> table_;
  std::vector<float> scales_;
};

// The last `tokens` tokens of a context attend to all of it.
void Run(benchmark::State& state, KvFormat format, int heads, int kv_heads, int head_dim, int tokens, int context,
         int layers, int threads) {
  const Cache cache(format, kv_heads, head_dim, context, layers);
  ThreadPool pool(threads);
  Buffer workspace;
  std::vector<float> q(int64_t{tokens} * heads * head_dim), out(q.size());
  for (size_t i = 0; i < q.size(); ++i) q[i] = std::sin(static_cast<float>(i % 1000));
  const int32_t q_begin[] = {0, tokens}, kv_len[] = {context};
  const BatchView batch{.tokens = tokens, .q_begin = q_begin, .kv_len = kv_len, .slots = {},
                        .block_table = cache.table()};
  const AttentionPlan plan =
      cpu::PlanAttention({.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim}, batch, threads);
  AttentionArgs args;
  args.q = Tensor(q.data(), DType::kF32, {tokens, int64_t{heads} * head_dim});
  args.out = Tensor(out.data(), DType::kF32, {tokens, int64_t{heads} * head_dim});
  args.batch = &batch;
  args.plan = &plan;
  args.scale = 1 / std::sqrt(static_cast<float>(head_dim));
  int layer = 0;
  for (auto _ : state) {
    args.cache = cache.Layer(layer);
    layer = (layer + 1) % layers;
    cpu::Attention(args, pool, workspace);
  }
  const double bytes = static_cast<double>(cache.layout().KBytes() + cache.layout().VBytes()) * kv_heads * context /
                       kPageSize;
  // Query i sees context - tokens + i + 1 tokens.
  const double pairs = tokens * (context - (tokens - 1) / 2.0);
  state.SetBytesProcessed(static_cast<int64_t>(static_cast<double>(state.iterations()) * bytes));
  state.counters["GFMA/s"] = benchmark::Counter(
      static_cast<double>(state.iterations()) * pairs * heads * head_dim * 2 * 1e-9, benchmark::Counter::kIsRate);
}

void BM_Decode(benchmark::State& state, KvFormat format) {
  const int context = static_cast<int>(state.range(0));
  const int layers = ElementSize(format) == 1 ? 4 : 2;  // 256 MB at 32k tokens
  Run(state, format, static_cast<int>(8 * state.range(1)), 8, 128, 1, context, layers, static_cast<int>(state.range(2)));
}
#define OCTAVO_DECODE(format)                                        \
  BENCHMARK_CAPTURE(BM_Decode, format, KvFormat::k##format)          \
      ->ArgNames({"context", "group", "threads"})                    \
      ->ArgsProduct({{256, 32768}, {1, 4, 8}, {1}})                    \
      ->UseRealTime()                                                \
      ->Unit(benchmark::kMillisecond)
OCTAVO_DECODE(BF16);
OCTAVO_DECODE(Fp8E4M3);
OCTAVO_DECODE(Fp8E5M2);
OCTAVO_DECODE(Fp8PerTokenHead);
OCTAVO_DECODE(Int8PerTokenHead);

// The shipped model's shape, one layer, and a wider one.
void BM_Prefill(benchmark::State& state, KvFormat format) {
  const int head_dim = static_cast<int>(state.range(1));
  Run(state, format, 4, 2, head_dim, 512, static_cast<int>(state.range(0)), 1, static_cast<int>(state.range(2)));
}
#define OCTAVO_PREFILL(format)                                       \
  BENCHMARK_CAPTURE(BM_Prefill, format, KvFormat::k##format)         \
      ->ArgNames({"context", "head_dim", "threads"})                 \
      ->ArgsProduct({{512, 8192}, {64, 128}, {1}})                   \
      ->UseRealTime()                                                \
      ->Unit(benchmark::kMillisecond)
OCTAVO_PREFILL(BF16);
OCTAVO_PREFILL(Fp8E4M3);
OCTAVO_PREFILL(Int8PerTokenHead);

}  // namespace
}  // namespace octavo
#endif  // HWY_ONCE
