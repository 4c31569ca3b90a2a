// Attention against the limits of the machine, which PeakRead and PeakMultiplyAdd
// (matmul_bench.cpp) measure in the same run: decode against the bandwidth of reading, prefill
// against the peak of multiply-adds.
//
//   octavo_kernels_bench --benchmark_filter='Peak|Decode|Prefill'
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "base/float_bits.h"
#include "kernels/cpu/append.h"
#include "kernels/cpu/attention.h"

namespace octavo {
namespace {

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
    return {.layout = layout_,
            .arena = arena_.data(),
            .claim_offset = layer * layout_.ClaimBytes(),
            .k_scale = scales_.data(),
            .v_scale = scales_.data()};
  }
  Tensor table() const {
    return Tensor(table_.data(), DType::kI32, {1, static_cast<int64_t>(table_.size())});
  }
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
    BatchView batch{.tokens = kPageSize,
                    .q_begin = q_begin,
                    .kv_len = kv_len,
                    .slots = Tensor(slots.data(), DType::kI64, {kPageSize}),
                    .block_table = {}};
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
void Run(benchmark::State& state, KvFormat format, int heads, int kv_heads, int head_dim,
         int tokens, int context, int layers, int threads) {
  const Cache cache(format, kv_heads, head_dim, context, layers);
  ThreadPool pool(threads);
  Buffer workspace;
  std::vector<uint16_t> q(int64_t{tokens} * heads * head_dim), out(q.size());  // bfloat16
  for (size_t i = 0; i < q.size(); ++i) q[i] = FloatToBF16(std::sin(static_cast<float>(i % 1000)));
  const int32_t q_begin[] = {0, tokens}, kv_len[] = {context};
  const BatchView batch{.tokens = tokens,
                        .q_begin = q_begin,
                        .kv_len = kv_len,
                        .slots = {},
                        .block_table = cache.table()};
  cpu::WorkPlan plan({.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim}, threads);
  plan.Make(batch);
  AttentionArgs args;
  args.q = Tensor(q.data(), DType::kBF16, {tokens, int64_t{heads} * head_dim});
  args.out = Tensor(out.data(), DType::kBF16, {tokens, int64_t{heads} * head_dim});
  args.batch = &batch;
  args.plan = &plan;
  args.scale = 1 / std::sqrt(static_cast<float>(head_dim));
  int layer = 0;
  for (auto _ : state) {
    args.cache = cache.Layer(layer);
    layer = (layer + 1) % layers;
    cpu::Attention(args, pool, workspace);
  }
  const double bytes = static_cast<double>(cache.layout().KBytes() + cache.layout().VBytes()) *
                       kv_heads * context / kPageSize;
  // Query i sees context - tokens + i + 1 tokens.
  const double pairs = tokens * (context - (tokens - 1) / 2.0);
  state.SetBytesProcessed(static_cast<int64_t>(static_cast<double>(state.iterations()) * bytes));
  state.counters["GFMA/s"] = benchmark::Counter(
      static_cast<double>(state.iterations()) * pairs * heads * head_dim * 2 * 1e-9,
      benchmark::Counter::kIsRate);
}

void Decode(benchmark::State& state, KvFormat format) {
  const int context = static_cast<int>(state.range(0));
  // 256 MB at 32k tokens; 1k of one head stays in L2, so that only arithmetic counts.
  const int layers = context <= 1024 ? 1 : ElementSize(format) == 1 ? 4 : 2;
  const int kv_heads = context <= 1024 ? 1 : 8;
  Run(state, format, static_cast<int>(kv_heads * state.range(1)), kv_heads, 128, 1, context, layers,
      static_cast<int>(state.range(2)));
}
#define OCTAVO_DECODE(format)                            \
  BENCHMARK_CAPTURE(Decode, format, KvFormat::k##format) \
      ->ArgNames({"context", "group", "threads"})        \
      ->ArgsProduct({{1024}, {1, 4, 8}, {1}})            \
      ->ArgsProduct({{32768}, {1, 4, 8}, {1, 2}})        \
      ->UseRealTime()                                    \
      ->Unit(benchmark::kMillisecond)
OCTAVO_DECODE(BF16);
OCTAVO_DECODE(Fp8E4M3);
OCTAVO_DECODE(Fp8E5M2);
OCTAVO_DECODE(Fp8PerTokenHead);
OCTAVO_DECODE(Int8PerTokenHead);

// The shipped model's shape, one layer, and a wider one.
void Prefill(benchmark::State& state, KvFormat format) {
  const int head_dim = static_cast<int>(state.range(1));
  Run(state, format, 4, 2, head_dim, 512, static_cast<int>(state.range(0)), 1,
      static_cast<int>(state.range(2)));
}
#define OCTAVO_PREFILL(format)                            \
  BENCHMARK_CAPTURE(Prefill, format, KvFormat::k##format) \
      ->ArgNames({"context", "head_dim", "threads"})      \
      ->ArgsProduct({{512, 8192}, {64, 128}, {1}})        \
      ->UseRealTime()                                     \
      ->Unit(benchmark::kMillisecond)
OCTAVO_PREFILL(BF16);
OCTAVO_PREFILL(Fp8E4M3);
OCTAVO_PREFILL(Int8PerTokenHead);

}  // namespace
}  // namespace octavo
