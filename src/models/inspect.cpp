#include "models/inspect.h"

#include <algorithm>

#include <fmt/format.h>

#include "base/error.h"
#include "kernels/mxfp4.h"
#include "kv/policy.h"

namespace octavo {
namespace {

int64_t PageBytes(const LayerGroup& group, KvFormat format) {
  const KvLayout layout{.k_format = format,
                        .v_format = format,
                        .kv_heads = group.kv_heads,
                        .head_dim = group.head_dim};
  return group.layers * layout.ClaimBytes();
}

int64_t PagesFor(int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

// Consecutive tokens touch one page more than they fill, if they do not begin at its start.
int64_t WindowPages(int64_t window) { return (window + 2 * kPageSize - 2) / kPageSize; }

double Product(int64_t a, int64_t b) { return static_cast<double>(a) * static_cast<double>(b); }

CacheCost CostOf(const CacheReport& report, KvFormat format, KvFormat window_format) {
  CacheCost cost{.format = format, .window_format = window_format, .tokens = {}};
  int64_t full_page_bytes = 0, window_page_bytes = 0;
  for (const LayerGroup& group : report.groups) {
    if (group.window == 0) {
      full_page_bytes += PageBytes(group, format);
      continue;
    }
    const int64_t page_bytes = PageBytes(group, window_format);
    window_page_bytes += page_bytes;
    cost.window_bytes += Product(WindowPages(group.window), page_bytes);
    cost.sequence_bytes +=
        Product(std::min(WindowPages(group.window), PagesFor(report.length)), page_bytes);
  }
  cost.bytes_per_token = static_cast<double>(full_page_bytes) / kPageSize;
  cost.sequence_bytes += Product(PagesFor(report.length), full_page_bytes);
  const auto memory = static_cast<double>(report.memory_bytes);
  cost.sequences = static_cast<int64_t>(memory / cost.sequence_bytes);
  const double left = memory - cost.window_bytes;
  if (left < 0) {  // not even the windows fit: all layers grow alike
    cost.tokens = report.memory_bytes / (full_page_bytes + window_page_bytes) * kPageSize;
  } else if (full_page_bytes > 0) {
    cost.tokens = static_cast<int64_t>(left) / full_page_bytes * kPageSize;
  }
  return cost;
}

std::string Bytes(double bytes) {
  if (bytes < 1 << 20) return fmt::format("{:.1f} KiB", bytes / (1 << 10));
  return bytes < 1 << 30 ? fmt::format("{:.1f} MiB", bytes / (1 << 20))
                         : fmt::format("{:.1f} GiB", bytes / (1 << 30));
}

}  // namespace

WeightReport InspectWeights(const ModelSpec& spec) {
  const auto bf16 = [](int64_t outs, int64_t ins) { return 2 * outs * ins; };
  const auto expert_matrix = [&](int64_t outs, int64_t ins) {
    return spec.weight_quant == WeightQuant::kMxfp4 ? mxfp4::Bytes(outs, ins) : bf16(outs, ins);
  };
  const int64_t hidden = spec.hidden;
  WeightReport report;
  const auto add = [&](int64_t bytes) {
    report.bytes += static_cast<double>(bytes);
    report.bytes_per_token += static_cast<double>(bytes);
  };
  add(bf16(spec.vocab, hidden));  // lm_head; of the embedding, a token reads a row
  if (!spec.tie_word_embeddings) report.bytes += static_cast<double>(bf16(spec.vocab, hidden));
  for (const LayerSpec& layer : spec.layers) {
    const FfnSpec& ffn = layer.ffn;
    add(bf16(int64_t{layer.head_dim} * 2 * (layer.heads + layer.kv_heads), hidden));
    if (ffn.experts == 0) {
      add(3 * bf16(ffn.intermediate, hidden));
      continue;
    }
    add(bf16(ffn.experts, hidden));
    const int64_t expert =
        2 * expert_matrix(ffn.intermediate, hidden) + expert_matrix(hidden, ffn.intermediate);
    report.bytes += Product(ffn.experts, expert);
    report.bytes_per_token += Product(ffn.top_k, expert);
  }
  return report;
}

std::string ToText(const WeightReport& report) {
  return fmt::format("weights on a GPU: {}, of which a token reads {}\n", Bytes(report.bytes),
                     Bytes(report.bytes_per_token));
}

CacheReport InspectCache(const ModelSpec& spec, int64_t memory_bytes, int64_t length) {
  OCTAVO_CHECK(memory_bytes >= 0 && length > 0, memory_bytes, length);
  CacheReport report{.groups = {}, .memory_bytes = memory_bytes, .length = length, .costs = {}};
  for (const LayerSpec& layer : spec.layers) {
    const auto same = [&](const LayerGroup& group) {
      return group.window == layer.window && group.heads == layer.heads &&
             group.kv_heads == layer.kv_heads && group.head_dim == layer.head_dim;
    };
    auto group = std::find_if(report.groups.begin(), report.groups.end(), same);
    if (group == report.groups.end()) {
      group = report.groups.insert(group, {.window = layer.window,
                                           .heads = layer.heads,
                                           .kv_heads = layer.kv_heads,
                                           .head_dim = layer.head_dim});
    }
    ++group->layers;
  }
  const auto is_window = [](const LayerGroup& group) { return group.window > 0; };
  const bool both = std::any_of(report.groups.begin(), report.groups.end(), is_window) &&
                    !std::all_of(report.groups.begin(), report.groups.end(), is_window);
  for (const KvFormat format : kOfferedFormats) {
    report.costs.push_back(CostOf(report, format, format));
    if (both && ElementSize(format) == 1)
      report.costs.push_back(CostOf(report, format, SixteenBit(spec.dtype)));
  }
  return report;
}

std::string ToText(const CacheReport& report) {
  std::string text;
  for (const LayerGroup& group : report.groups) {
    text += fmt::format(
        "{} layers: {}, head_dim {}, {} heads, {} kv heads\n", group.layers,
        group.window ? fmt::format("sliding window {}", group.window) : "full attention",
        group.head_dim, group.heads, group.kv_heads);
  }
  text += fmt::format("\nKV cache in {}, sequences of {} tokens:\n",
                      Bytes(static_cast<double>(report.memory_bytes)), report.length);
  text += fmt::format("{:<36}{:>14}{:>14}{:>14}{:>12}{:>14}\n", "format", "per token", "windows",
                      "sequence", "sequences", "max tokens");
  for (const CacheCost& cost : report.costs) {
    std::string name = Name(cost.format);
    if (cost.window_format != cost.format)
      name += fmt::format(", windows {}", Name(cost.window_format));
    text += fmt::format("{:<36}{:>14}{:>14}{:>14}{:>12}{:>14}\n", name, Bytes(cost.bytes_per_token),
                        Bytes(cost.window_bytes), Bytes(cost.sequence_bytes), cost.sequences,
                        cost.tokens ? fmt::format("{}", *cost.tokens) : "no bound");
  }
  return text;
}

}  // namespace octavo
