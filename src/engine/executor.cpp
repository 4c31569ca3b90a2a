#include "engine/executor.h"

#include <algorithm>

#include <fmt/format.h>

#include "base/error.h"
#include "base/log.h"
#include "models/config.h"

namespace octavo {
namespace {

constexpr int64_t kMostCacheBytesUnasked = int64_t{4} << 30;

DType ArithmeticDType(const std::string& name) {
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float32") return DType::kF32;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--dtype: expected bfloat16 or float32, found '{}'", name));
}

std::optional<std::string> Given(const std::string& flag) {
  return flag.empty() ? std::nullopt : std::optional(flag);
}

void RequireWithin(int64_t least, int64_t most, const char* flag, int64_t found) {
  if (found < least || found > most) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected {} to {}, found {}", flag, least, most, found));
  }
}

// Everything that can be checked before the weights are read.
void CheckOptions(const EngineOptions& options, const ModelSpec& spec) {
  RequireWithin(1, 1 << 16, "--max-num-seqs", options.max_num_seqs);
  RequireWithin(1, 1 << 20, "--max-num-batched-tokens", options.max_num_batched_tokens);
  RequireWithin(0, 1024, "--threads", options.threads);
  RequireWithin(0, int64_t{1} << 46, "--kv-cache-memory-bytes", options.kv_cache_memory_bytes);
  if (options.max_model_len < 0 || options.max_model_len > spec.max_position_embeddings) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--max-model-len: expected 0 (the model's) or up to its "
                            "max_position_embeddings, {}, found {}",
                            spec.max_position_embeddings, options.max_model_len));
  }
}

std::string MiB(int64_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
}

}  // namespace

Executor::Executor(const EngineOptions& options)
    : Executor(options, ReadModelSpec(options.model)) {}

Executor::Executor(const EngineOptions& options, ModelSpec spec)
    : dtype_((CheckOptions(options, spec), ArithmeticDType(options.dtype))),
      spec_(std::move(spec)),
      checkpoint_(Checkpoint::Open(options.model)),
      weights_(LoadWeights(spec_, checkpoint_)),
      max_num_seqs_(options.max_num_seqs),
      max_num_batched_tokens_(options.max_num_batched_tokens) {
  max_model_len_ = options.max_model_len ? options.max_model_len : spec_.max_position_embeddings;

  backend_ = MakeCpuBackend(options.threads);
  std::vector<LayerCache> caches = LayOutCache(options);
  decoder_ = std::make_unique<Decoder>(spec_, weights_, *backend_, dtype_, std::move(caches),
                                       max_num_batched_tokens_);
}

std::vector<LayerCache> Executor::LayOutCache(const EngineOptions& options) {
  KvModelFacts facts{
      .layers = {}, .dtype = spec_.dtype, .checkpoint_format = spec_.kv_cache_format};
  for (const LayerSpec& layer : spec_.layers)
    facts.layers.push_back({layer.window, layer.kv_heads, layer.head_dim});
  policy_ = ResolveKvPolicy({.kv_cache_dtype = options.kv_cache_dtype,
                             .kv_cache_dtype_k = Given(options.kv_cache_dtype_k),
                             .kv_cache_dtype_v = Given(options.kv_cache_dtype_v),
                             .skip_layers = options.kv_cache_dtype_skip_layers},
                            facts);
  for (const std::string& warning : policy_.warnings) Log(LogLevel::kWarning, warning);
  scales_ = LoadKvScales(checkpoint_, Given(options.kv_cache_scales), facts.layers, policy_.layers);
  for (const std::string& warning : scales_.warnings) Log(LogLevel::kWarning, warning);

  int64_t bytes = options.kv_cache_memory_bytes;
  if (bytes == 0) {
    // The geometry depends on the memory only through the slab length: ask with what would be
    // plenty.
    const GroupGeometry plenty = MakeGroups(facts.layers, policy_.layers, kMostCacheBytesUnasked);
    double wanted = 0;
    for (const KvGroup& group : plenty.groups) {
      // A whole slab is lent at a time, so each group may hold one that is nearly empty.
      wanted += static_cast<double>(max_num_seqs_) * static_cast<double>(PagesPerSequence(group)) *
                    static_cast<double>(group.page_bytes) +
                static_cast<double>(plenty.slab_bytes);
    }
    bytes = static_cast<int64_t>(std::min(wanted, static_cast<double>(kMostCacheBytesUnasked)));
  }
  geometry_ = MakeGroups(facts.layers, policy_.layers, bytes);
  arena_memory_ = Buffer(bytes);
  arena_ = std::make_unique<Arena>(arena_memory_.data(), bytes, geometry_);
  pool_ = std::make_unique<BlockPool>(arena_.get(),
                                      PrefixSeed(options.model, policy_.layers, scales_.layers));

  const int64_t fit = TokensThatFit(geometry_, arena_->slabs(), 1, max_num_batched_tokens_);
  if (fit < max_model_len_) {
    if (options.max_model_len) {
      throw Error(ErrorCode::kResourceExhausted,
                  fmt::format("--max-model-len: one sequence of {} tokens does not fit in a cache "
                              "of {}, which holds {}; "
                              "raise --kv-cache-memory-bytes",
                              max_model_len_, MiB(bytes), fit));
    }
    max_model_len_ = fit;
  }

  health_.resize(spec_.layers.size());
  std::vector<LayerCache> caches;
  for (size_t l = 0; l < spec_.layers.size(); ++l) {
    const LayerPlace& place = geometry_.layers[l];
    caches.push_back({.kv = {.layout = place.layout,
                             .arena = arena_->base(),
                             .claim_offset = place.claim_offset,
                             .k_scale = scales_.layers[l].k.values.data(),
                             .v_scale = scales_.layers[l].v.values.data(),
                             .saturated = health_[l].saturated,
                             .amax = health_[l].amax},
                      .group = place.group});
  }
  return caches;
}

int64_t Executor::PagesPerSequence(const KvGroup& group) const {
  const int64_t all = (max_model_len_ + kPageSize - 1) / kPageSize;
  return group.window ? std::min(all, WindowPages(group.window, max_num_batched_tokens_)) : all;
}

void Executor::Forward(Batch& batch, const Decoder::Observer& observer) {
  const std::vector<BatchView> views = batch.Views();
  decoder_->Forward({.ids = batch.ids(), .positions = batch.positions(), .groups = views},
                    observer);
}

std::vector<SampledToken> Executor::Execute(Batch& batch) {
  Forward(batch);
  std::vector<SampledToken> sampled(batch.samples().size());
  for (size_t i = 0; i < sampled.size(); i += Decoder::kLogitRows) {
    const size_t n = std::min<size_t>(Decoder::kLogitRows, sampled.size() - i);
    backend_->Sample({.logits = Logits(batch.logit_rows().subspan(i, n)),
                      .soft_cap = spec_.final_soft_cap,
                      .rows = batch.samples().subspan(i, n),
                      .out = std::span(sampled).subspan(i, n)});
  }
  return sampled;
}

double Executor::cache_bytes_per_token() const {
  double bytes = 0;
  for (const LayerPlace& place : geometry_.layers)
    bytes += static_cast<double>(place.layout.UsedBytes()) / kPageSize;
  return bytes;
}

int64_t Executor::cache_bytes() const { return arena_->slabs() * geometry_.slab_bytes; }

int64_t Executor::cache_bytes_used() const {
  int64_t bytes = 0;
  for (int g = 0; g < groups(); ++g) bytes += pool_->held(g) * geometry_.groups[g].page_bytes;
  return bytes;
}

std::vector<std::string> Executor::StartupReport() const {
  std::vector<std::string> lines = policy_.lines;
  const std::vector<std::string> memory = Describe(geometry_, cache_bytes());
  lines.insert(lines.end(), memory.begin(), memory.end());
  lines.insert(lines.end(), scales_.lines.begin(), scales_.lines.end());
  double slabs_per_sequence = 0;  // of max_model_len tokens
  for (int g = 0; g < groups(); ++g) {
    slabs_per_sequence += static_cast<double>(PagesPerSequence(geometry_.groups[g])) /
                          static_cast<double>(geometry_.PagesPerSlab(g));
  }
  const double sequences = static_cast<double>(arena_->slabs()) / slabs_per_sequence;
  lines.push_back(
      fmt::format("KV cache: {:.0f} tokens in {}, {:.2f} sequences of {} tokens at a time",
                  sequences * static_cast<double>(max_model_len_), MiB(cache_bytes()), sequences,
                  max_model_len_));
  return lines;
}

std::vector<LayerCacheReport> Executor::CacheReport(std::span<const LayerHealth> health) const {
  std::vector<LayerCacheReport> report;
  for (size_t l = 0; l < health.size(); ++l) {
    const LayerHealth& h = health[l];
    report.push_back({.k_format = Name(policy_.layers[l].k),
                      .v_format = Name(policy_.layers[l].v),
                      .k_scale_source = scales_.layers[l].k.source,
                      .v_scale_source = scales_.layers[l].v.source,
                      .k_saturated = h.saturated[0],
                      .v_saturated = h.saturated[1],
                      .k_amax = h.amax[0],
                      .v_amax = h.amax[1]});
  }
  return report;
}

}  // namespace octavo
