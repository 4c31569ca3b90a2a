// The append rows of attention_bench.
#include <algorithm>
#include <memory>
#include <string>

#include "octavo/attention.h"
#include "rows.h"

namespace octavo::bench {
namespace {

struct AppendSet {
  DeviceMemory q, k, v, q_out, q_fp8, q_scale, arena, slots;
};

struct AppendWork {
  int tokens, head_dim;
  KvFormat format;
  bool fp8_queries;
  DeviceMemory cos_sin, norm, scale, flags, saturated, amax;
  std::vector<AppendSet> sets;

  AppendWork(int tokens_, int head_dim_, KvFormat format_, bool fp8_queries_)
      : tokens(tokens_), head_dim(head_dim_), format(format_), fp8_queries(fp8_queries_) {
    cos_sin = DeviceMemory(int64_t{tokens} * head_dim * 4);
    FillNormal(cos_sin.as(), Element::kF32, int64_t{tokens} * head_dim, 1.5f, 1);
    norm = DeviceMemory(head_dim * 2);
    FillNormal(norm.as(), Element::kBF16, head_dim, 1, 2);
    scale = DeviceMemory(std::vector<float>(kKvHeads, 0.02f));
    flags = DeviceMemory(std::vector<uint8_t>(tokens, 1));
    saturated = DeviceMemory(std::vector<uint64_t>(2));
    amax = DeviceMemory(std::vector<float>(2));
    const KvLayout layout = Layout();
    const bool prompt = tokens >= 4 * kPageSize;
    const int pages = prompt ? (tokens + kPageSize - 1) / kPageSize : tokens;
    const int64_t page_units = layout.ClaimBytes() / kPageUnit;
    const int64_t row = int64_t{tokens} * head_dim;
    const int count = static_cast<int>(int64_t{240 << 20} / Bytes()) + 2;
    for (int i = 0; i < std::min(count, 64); ++i) {
      AppendSet set{
          .q = DeviceMemory(row * kHeads * 2),
          .k = DeviceMemory(row * kKvHeads * 2),
          .v = DeviceMemory(row * kKvHeads * 2),
          .q_out = DeviceMemory(row * kHeads * 2),
          .q_fp8 = DeviceMemory(row * kHeads),
          .q_scale = DeviceMemory(int64_t{tokens} * kHeads * 4),
          .arena = DeviceMemory(pages * layout.ClaimBytes()),
      };
      FillNormal(set.q.as(), Element::kBF16, row * kHeads, 1, 10 + i);
      FillNormal(set.k.as(), Element::kBF16, row * kKvHeads, 1, 20 + i);
      FillNormal(set.v.as(), Element::kBF16, row * kKvHeads, 1, 30 + i);
      std::vector<int64_t> slots(tokens);
      for (int t = 0; t < tokens; ++t) {
        // A prompt takes whole pages, out of order; decodes stand somewhere in a page each.
        const int64_t page = prompt ? int64_t{t / kPageSize} * 37 % pages : t;
        const int place = prompt ? t % kPageSize : (t * 29 + 5) % kPageSize;
        slots[t] = page * page_units * kPageSize + place;
      }
      set.slots = DeviceMemory(slots);
      sets.push_back(std::move(set));
    }
    BENCH_CUDA(cudaDeviceSynchronize());
  }
  KvLayout Layout() const {
    return {.k_format = format, .v_format = format, .kv_heads = kKvHeads, .head_dim = head_dim};
  }
  int64_t Bytes() const {
    const int64_t heads = int64_t{tokens} * head_dim;
    const int64_t scales = HasTokenScales(format) ? int64_t{tokens} * kKvHeads * 8 : 0;
    return heads * 2 * (kHeads + 2 * kKvHeads) + heads * 4 /* angles */ +
           heads * kHeads * (fp8_queries ? 1 : 2) + (fp8_queries ? tokens * kHeads * 4 : 0) +
           heads * 2 * kKvHeads * ElementSize(format) + scales;
  }
  void Run(int i, void* stream) const {
    const AppendSet& set = sets[i];
    cuda::AppendCall call{
        .tokens = tokens,
        .heads = kHeads,
        .q = set.q.as(),
        .k = set.k.as(),
        .v = set.v.as(),
        .q_stride = int64_t{kHeads} * head_dim,
        .k_stride = int64_t{kKvHeads} * head_dim,
        .v_stride = int64_t{kKvHeads} * head_dim,
        .q_norm = norm.as(),
        .k_norm = norm.as(),
        .norm_eps = 1e-6f,
        .cos_sin = cos_sin.as<float>(),
        .rotary_dim = head_dim,
        .slots = set.slots.as<int64_t>(),
        .cache = {.layout = Layout(),
                  .arena = set.arena.as<std::byte>(),
                  .k_scale = scale.as<float>(),
                  .v_scale = scale.as<float>(),
                  .saturated = saturated.as<uint64_t>(),
                  .amax = amax.as<float>()},
        .q_out = set.q_out.as(),
    };
    if (fp8_queries) {
      call.fp8_queries = flags.as<uint8_t>();
      call.q_fp8 = set.q_fp8.as();
      call.q_scale = set.q_scale.as<float>();
    }
    cuda::Append(call, stream);
  }
};

}  // namespace

std::string AppendName(int tokens, int head_dim) {
  return std::to_string(tokens) + " tokens, head_dim " + std::to_string(head_dim);
}

std::vector<Row> AppendRows(int tokens, int head_dim) {
  std::vector<Row> rows;
  for (KvFormat format : {KvFormat::kFp8E4M3, KvFormat::kBF16, KvFormat::kFp8PerTokenHead,
                          KvFormat::kInt8PerTokenHead}) {
    for (bool fp8_queries : {false, true}) {
      if (fp8_queries && (format != KvFormat::kFp8E4M3 || tokens < 1024)) continue;
      auto work = std::make_shared<AppendWork>(tokens, head_dim, format, fp8_queries);
      rows.push_back({.group = "append",
                      .name = AppendName(tokens, head_dim),
                      .format = std::string(Name(format)) + (fp8_queries ? ", fp8 queries" : ""),
                      .bytes = static_cast<double>(work->Bytes()),
                      .sets = static_cast<int>(work->sets.size()),
                      .call = [work](int set, void* stream) { work->Run(set, stream); }});
    }
  }
  return rows;
}

}  // namespace octavo::bench
