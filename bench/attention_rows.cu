// The attention rows of attention_bench.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#include "rows.h"

namespace octavo::bench {
namespace {

constexpr float kScale = 0.02f;  // of every cached element, whatever the format

struct AttentionWork {
  AttentionSpec spec;
  Numbers numbers;
  KvLayout layout;
  int rows = 0, sets = 1;
  int64_t pages = 0, stride = 0;  // of a set
  double bytes = 0, flops = 0;
  std::vector<int32_t> q_begin{0};
  std::unique_ptr<cuda::AttentionPlan> plan;
  DeviceMemory arena, q, q_fp8, q_scale, out, scale;
  std::vector<DeviceMemory> tables;

  AttentionWork(const AttentionSpec& spec_, const Numbers& numbers_)
      : spec(spec_),
        numbers(numbers_),
        layout{numbers.format, numbers.format, spec.kv_heads, spec.head_dim} {
    const int count = static_cast<int>(spec.lengths.size());
    for (int tokens : spec.tokens) q_begin.push_back(q_begin.back() + tokens);
    rows = q_begin.back();
    CountWork();
    plan = std::make_unique<cuda::AttentionPlan>(
        cuda::AttentionShape{spec.heads, spec.kv_heads, spec.head_dim, spec.window},
        layout.k_format, layout.v_format,
        cuda::AttentionLimits{
            .tokens = rows,
            .sequences = count,
            .sequence_tokens = *std::max_element(spec.tokens.begin(), spec.tokens.end()),
            .kv_tokens = *std::max_element(spec.lengths.begin(), spec.lengths.end())},
        cuda::AttentionPlan::Options{.math = numbers.math, .deterministic = spec.deterministic});
    sets = std::clamp(static_cast<int>(kColdBytes / bytes) + 1, 1, 16);
    FillCache();

    const int64_t elements = int64_t{rows} * spec.heads * spec.head_dim;
    q = DeviceMemory(sets * elements * 2);
    q_fp8 = DeviceMemory(sets * elements);
    q_scale = DeviceMemory(int64_t{sets} * rows * spec.heads * 4);
    out = DeviceMemory(sets * elements * 2);
    FillNormal(q.as(), Element::kBF16, sets * elements, 1, 3);
    // As Append scales: magnitudes of codes add up to 128; those of a normal variable are 0.8.
    const float scale_of_q = 0.8f * spec.head_dim / 128;
    FillNormal(q_fp8.as(), Element::kE4M3, sets * elements, scale_of_q, 4);
    FillFloats(q_scale.as<float>(), scale_of_q, int64_t{sets} * rows * spec.heads);
    plan->Make(q_begin, spec.lengths, nullptr);
    BENCH_CUDA(cudaDeviceSynchronize());
  }

  // Pages of each sequence that its queries see.
  int64_t FirstPage(int s) const {
    const int first = spec.lengths[s] - spec.tokens[s];
    return spec.window > 0 ? std::max(0, first - spec.window + 1) / kPageSize : 0;
  }
  void CountWork() {
    double keys = 0, scores = 0;
    for (size_t s = 0; s < spec.lengths.size(); ++s) {
      const int length = spec.lengths[s], tokens = spec.tokens[s];
      const int first = length - tokens, window = spec.window > 0 ? spec.window : length;
      keys += std::min(length, tokens + window - 1);
      for (int t = first; t < length; ++t) scores += std::min(t + 1, window);
      const int64_t all = (length + kPageSize - 1) / kPageSize;
      pages += all - FirstPage(static_cast<int>(s));
      stride = std::max(stride, all);
    }
    const double scales = HasTokenScales(layout.k_format) ? 8 : 0;
    bytes = keys * spec.kv_heads * (2.0 * spec.head_dim * ElementSize(layout.k_format) + scales) +
            2.0 * 2 * rows * spec.heads * spec.head_dim;
    flops = 4 * scores * spec.heads * spec.head_dim;
  }
  void FillCache() {
    const int64_t claim = layout.ClaimBytes();
    arena = DeviceMemory(sets * pages * claim);
    const int size = ElementSize(layout.k_format);
    FillNormal(arena.as(), ElementOf(layout.k_format), sets * pages * claim / size,
               size == 1 ? kScale : 1, 5);
    if (HasTokenScales(layout.k_format)) {
      for (int head = 0; head < layout.kv_heads; ++head) {
        for (const int64_t offset : {layout.KScaleOffset(head), layout.VScaleOffset(head)})
          FillScales(arena.as<std::byte>(), sets * pages, claim, offset, kPageSize, kScale);
      }
    }
    scale = DeviceMemory(std::vector<float>(layout.kv_heads, kScale));
    std::vector<uint32_t> order(sets * pages);
    std::iota(order.begin(), order.end(), 0u);
    std::mt19937 random(6);
    std::shuffle(order.begin(), order.end(), random);
    size_t next = 0;
    for (int set = 0; set < sets; ++set) {
      std::vector<uint32_t> table(stride * spec.lengths.size(), kNoPage);
      for (size_t s = 0; s < spec.lengths.size(); ++s) {
        for (int64_t p = FirstPage(static_cast<int>(s)); p * kPageSize < spec.lengths[s]; ++p)
          table[s * stride + p] = order[next++] * static_cast<uint32_t>(claim / kPageUnit);
      }
      tables.push_back(DeviceMemory(table));
    }
  }
  void Run(int set, void* stream) const {
    const int64_t elements = int64_t{rows} * spec.heads * spec.head_dim;
    cuda::Attention({.plan = plan.get(),
                     .cache = {.layout = layout,
                               .arena = arena.as<std::byte>(),
                               .k_scale = scale.as<float>(),
                               .v_scale = scale.as<float>()},
                     .block_table = {tables[set].as<uint32_t>(), stride},
                     .q = q.as<uint16_t>() + set * elements,
                     .q_fp8 = q_fp8.as<uint8_t>() + set * elements,
                     .q_scale = q_scale.as<float>() + int64_t{set} * rows * spec.heads,
                     .scale = 1 / std::sqrt(static_cast<float>(spec.head_dim)),
                     .out = out.as<uint16_t>() + set * elements},
                    stream);
  }
};

std::string NameOf(const Numbers& numbers) {
  const char* const maths[] = {"16bit", "fp8", "fp8 tensor-core"};
  return std::string(Name(numbers.format)) + ", " + maths[static_cast<int>(numbers.math)];
}

}  // namespace

std::vector<Row> AttentionRows(const AttentionSpec& spec, const std::vector<Numbers>& list) {
  std::vector<Row> rows;
  for (const Numbers& numbers : list) {
    std::shared_ptr<AttentionWork> work;
    try {
      work = std::make_shared<AttentionWork>(spec, numbers);
    } catch (const std::invalid_argument& refused) {
      std::printf("%s %s: %s\n", spec.group.c_str(), spec.name.c_str(), refused.what());
      continue;
    }
    const bool prefill = spec.group == "prefill";
    rows.push_back({.group = spec.group,
                    .name = spec.name,
                    .format = NameOf(numbers),
                    .bytes = work->bytes,
                    .flops = prefill ? work->flops : 0,
                    .sets = work->sets,
                    .call = [work](int set, void* stream) { work->Run(set, stream); }});
  }
  return rows;
}

}  // namespace octavo::bench
