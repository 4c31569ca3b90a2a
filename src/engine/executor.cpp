#include "engine/executor.h"

#include <algorithm>

#include <fmt/format.h>

#include "base/error.h"
#include "base/log.h"
#include "engine/device.h"
#include "models/config.h"
#include "models/upload.h"

namespace octavo {
namespace {

constexpr int64_t kMostCacheBytesUnasked = int64_t{4} << 30;
constexpr int64_t kPlanAndGraphBytes = int64_t{1} << 30;  // kept free beside the cache on a GPU

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

std::vector<KvLayerFacts> LayerFacts(const ModelSpec& spec) {
  std::vector<KvLayerFacts> facts;
  for (const LayerSpec& layer : spec.layers)
    facts.push_back({layer.window, layer.kv_heads, layer.head_dim});
  return facts;
}

KvPolicy Policy(const EngineOptions& options, const ModelSpec& spec) {
  return ResolveKvPolicy(
      {.kv_cache_dtype = options.kv_cache_dtype,
       .kv_cache_dtype_k = Given(options.kv_cache_dtype_k),
       .kv_cache_dtype_v = Given(options.kv_cache_dtype_v),
       .skip_layers = options.kv_cache_dtype_skip_layers},
      {.layers = LayerFacts(spec), .dtype = spec.dtype, .checkpoint_format = spec.kv_cache_format});
}

// Batch sizes that graphs are recorded for.
int GraphSize(int sequences) {
  for (int size : {1, 2, 4}) {
    if (sequences <= size) return size;
  }
  return (sequences + 7) / 8 * 8;
}

Tensor First(const Tensor& words, size_t begin, int64_t count) {
  return Tensor(words.Row<int32_t>(0) + begin, DType::kI32, {count});
}

AttentionMath LayerMath(const std::string& name, const LayerSpec& layer, const KvLayout& layout) {
  const bool can_fp8 = layout.k_format == KvFormat::kFp8E4M3 &&
                       layout.v_format == KvFormat::kFp8E4M3 && layer.soft_cap == 0;
  if (name == "16bit" || !can_fp8) return AttentionMath::k16Bit;
  return name == "fp8_tensor_core" ? AttentionMath::kFp8TensorCore : AttentionMath::kFp8;
}

// What is left to us goes where float32 is.
std::string DeviceOf(const EngineOptions& options) {
  return options.device == "auto" && options.dtype == "float32" ? "cpu" : options.device;
}

std::shared_ptr<const LoadedModel> Load(const EngineOptions& options, const ModelSpec& spec,
                                        Backend& backend) {
  if (options.dtype == "float32" && !backend.is_host()) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("--dtype float32: needs --device cpu, found {}, which computes in "
                            "bfloat16 (--dtype bfloat16)",
                            backend.name()));
  }
  if (options.load_format != "auto" && options.load_format != "safetensors" &&
      options.load_format != "dummy") {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--load-format: expected auto, safetensors (which is auto) or dummy, "
                            "found '{}'",
                            options.load_format));
  }
  const bool dummy = options.load_format == "dummy";
  Checkpoint checkpoint =
      dummy ? Checkpoint::Empty(options.model) : Checkpoint::Open(options.model);
  Weights weights = dummy ? MakeDummyWeights(spec) : LoadWeights(spec, checkpoint);
  if (!backend.is_host())
    weights = UploadWeights(spec, weights, backend, options.threads, options.load_progress);
  return std::make_shared<const LoadedModel>(
      LoadedModel{spec, std::move(checkpoint), std::move(weights), backend.name()});
}

std::string MiB(int64_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
}

}  // namespace

void CheckOptions(const EngineOptions& options, const ModelSpec& spec) {
  RequireWithin(1, 1 << 16, "--max-num-seqs", options.max_num_seqs.value_or(1));
  RequireWithin(1, 1 << 20, "--max-num-batched-tokens", options.max_num_batched_tokens.value_or(1));
  RequireWithin(0, 1024, "--threads", options.threads);
  RequireWithin(0, int64_t{1} << 46, "--kv-cache-memory-bytes", options.kv_cache_memory_bytes);
  if (!(options.gpu_memory_utilization > 0 && options.gpu_memory_utilization <= 1)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--gpu-memory-utilization: expected a share in (0, 1], found {}",
                            options.gpu_memory_utilization));
  }
  if (const std::string& math = options.attention_math;
      math != "auto" && math != "fp8" && math != "fp8_tensor_core" && math != "16bit") {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("--attention-math: expected auto, fp8, fp8_tensor_core or 16bit, found '{}'",
                    math));
  }
  if (options.max_model_len < 0 || options.max_model_len > spec.max_position_embeddings) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--max-model-len: expected 0 (the model's) or up to its "
                            "max_position_embeddings, {}, found {}",
                            spec.max_position_embeddings, options.max_model_len));
  }
  ArithmeticDType(options.dtype);
  Policy(options, spec);
}

Executor::Executor(const EngineOptions& options)
    : Executor(options, ReadModelSpec(options.model, options.hf_overrides)) {}

Executor::Executor(const EngineOptions& options, ModelSpec spec, std::unique_ptr<Backend> backend)
    : Executor(options, spec, std::move(backend),
               [&](Backend& backend) { return Load(options, spec, backend); }) {}

Executor::Executor(const EngineOptions& options, std::shared_ptr<const LoadedModel> model)
    : Executor(options, model->spec, nullptr, [&](Backend& backend) {
        OCTAVO_CHECK(model->device == backend.name(), model->device, backend.name());
        return model;
      }) {}

Executor::Executor(const EngineOptions& options, const ModelSpec& spec,
                   std::unique_ptr<Backend> backend,
                   const std::function<std::shared_ptr<const LoadedModel>(Backend&)>& load)
    : dtype_((CheckOptions(options, spec), ArithmeticDType(options.dtype))),
      backend_(backend ? std::move(backend) : MakeBackend(DeviceOf(options), options.threads)),
      model_(load(*backend_)),
      max_num_seqs_(options.max_num_seqs.value_or(backend_->is_host() ? 16 : 256)),
      max_num_batched_tokens_(
          options.max_num_batched_tokens.value_or(backend_->is_host() ? 512 : 8192)),
      enforce_eager_(options.enforce_eager) {
  max_model_len_ = options.max_model_len ? options.max_model_len : spec.max_position_embeddings;
  backend_->Reserve(Limits());
  std::vector<LayerCache> caches = LayOutCache(options);
  decoder_ =
      std::make_unique<Decoder>(model_->spec, model_->weights, *backend_, dtype_, std::move(caches),
                                StepLimits{.tokens = StepTokens(),
                                           .sequences = StepSequences(),
                                           .kv_tokens = static_cast<int>(max_model_len_)});
}

int Executor::StepSequences() const {
  return backend_->is_host() ? max_num_seqs_ : GraphSize(max_num_seqs_);
}

int Executor::StepTokens() const { return std::max(max_num_batched_tokens_, StepSequences()); }

BackendLimits Executor::Limits() const {
  BackendLimits limits{.tokens = StepTokens(),
                       .sample_rows = Decoder::kLogitRows,
                       .vocab = spec().vocab,
                       .hidden = spec().hidden};
  for (const LayerSpec& layer : spec().layers) {
    if (layer.ffn.experts == 0) continue;
    limits.experts = std::max(limits.experts, layer.ffn.experts);
    limits.top_k = std::max(limits.top_k, layer.ffn.top_k);
    limits.expert_intermediate = std::max(limits.expert_intermediate, layer.ffn.intermediate);
  }
  return limits;
}

// What the user gave; or on a GPU what --gpu-memory-utilization leaves; or on the host what
// max_num_seqs * max_model_len tokens need, within reason.
int64_t Executor::CacheBytes(const EngineOptions& options,
                             const std::vector<KvLayerFacts>& facts) const {
  if (options.kv_cache_memory_bytes > 0) return options.kv_cache_memory_bytes;
  if (!backend_->is_host()) {
    const auto [free, total] = backend_->memory_info();
    const StepLimits limits{.tokens = StepTokens(), .sequences = StepSequences()};
    const int64_t taken =
        static_cast<int64_t>(total - free) + kPlanAndGraphBytes +
        Decoder::ScratchBytes(spec(), dtype_, backend_->intermediate_dtype(), limits);
    const int64_t bytes =
        static_cast<int64_t>(options.gpu_memory_utilization * static_cast<double>(total)) - taken;
    if (bytes <= 0) {
      throw Error(ErrorCode::kResourceExhausted,
                  fmt::format("--gpu-memory-utilization {}: {} of {} are taken by weights, "
                              "activations and other programs, none is left for the KV cache",
                              options.gpu_memory_utilization, MiB(taken),
                              MiB(static_cast<int64_t>(total))));
    }
    return bytes / kPageUnit * kPageUnit;
  }
  // The geometry depends on the memory only through the slab length: ask with what would be
  // plenty.
  const GroupGeometry plenty = MakeGroups(facts, policy_.layers, kMostCacheBytesUnasked);
  double wanted = 0;
  for (const KvGroup& group : plenty.groups) {
    // A whole slab is lent at a time, so each group may hold one that is nearly empty.
    wanted += static_cast<double>(max_num_seqs_) * static_cast<double>(PagesPerSequence(group)) *
                  static_cast<double>(group.page_bytes) +
              static_cast<double>(plenty.slab_bytes);
  }
  const auto half = static_cast<int64_t>(backend_->memory_info().total / 2);
  return static_cast<int64_t>(
      std::min(wanted, static_cast<double>(std::min(kMostCacheBytesUnasked, half))));
}

std::vector<LayerCache> Executor::LayOutCache(const EngineOptions& options) {
  const std::vector<KvLayerFacts> facts = LayerFacts(spec());
  policy_ = Policy(options, spec());
  for (const std::string& warning : policy_.warnings) Log(LogLevel::kWarning, warning);
  scales_ = LoadKvScales(model_->checkpoint, Given(options.kv_cache_scales), facts, policy_.layers);
  for (const std::string& warning : scales_.warnings) Log(LogLevel::kWarning, warning);

  const int64_t bytes = CacheBytes(options, facts);
  geometry_ = MakeGroups(facts, policy_.layers, bytes);
  arena_memory_ = backend_->Allocate(bytes);
  if (!arena_memory_.data()) {
    throw Error(ErrorCode::kResourceExhausted,
                fmt::format("out of memory for a KV cache of {}; lower --kv-cache-memory-bytes",
                            MiB(bytes)));
  }
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
    bound_by_cache_ = true;
  }

  std::vector<float> scales;
  for (const LayerScales& layer : scales_.layers) {
    for (const KvScale* operand : {&layer.k, &layer.v})
      scales.insert(scales.end(), operand->values.begin(), operand->values.end());
  }
  const size_t layers = spec().layers.size();
  scale_memory_ = backend_->Allocate(scales.size() * sizeof(float));
  backend_->Upload(scale_memory_.data(), scales.data(), scales.size() * sizeof(float));
  health_memory_ = backend_->Allocate(layers * sizeof(LayerHealth));
  const auto* scale = reinterpret_cast<const float*>(scale_memory_.data());
  auto* health = reinterpret_cast<LayerHealth*>(health_memory_.data());
  std::vector<LayerCache> caches;
  for (size_t l = 0; l < layers; ++l) {
    const LayerPlace& place = geometry_.layers[l];
    const float* k_scale = scale;
    const float* v_scale = k_scale + scales_.layers[l].k.values.size();
    scale = v_scale + scales_.layers[l].v.values.size();
    caches.push_back({.kv = {.layout = place.layout,
                             .arena = arena_->base(),
                             .claim_offset = place.claim_offset,
                             .k_scale = k_scale,
                             .v_scale = v_scale,
                             .saturated = health[l].saturated,
                             .amax = health[l].amax},
                      .group = place.group,
                      .math = LayerMath(options.attention_math, spec().layers[l], place.layout)});
  }
  return caches;
}

int64_t Executor::PagesPerSequence(const KvGroup& group) const {
  const int64_t all = (max_model_len_ + kPageSize - 1) / kPageSize;
  return group.window ? std::min(all, WindowPages(group.window, max_num_batched_tokens_)) : all;
}

Batch Executor::MakeBatch() {
  return Batch(*backend_, groups(),
               {.tokens = StepTokens(),
                .sequences = StepSequences(),
                .pages = (max_model_len_ + kPageSize - 1) / kPageSize});
}

Executor::DecodeGraph* Executor::GraphFor(const Batch& batch, const StepInput& input) {
  const auto [found, first] = graphs_.try_emplace({input.ids.data, batch.tokens()});
  DecodeGraph& graph = found->second;
  if (first) return nullptr;  // kernels are loaded by a run that is not recorded
  if (!graph.ops) {
    graph.ops = backend_->Record([&] {
      decoder_->Forward(input);
      if (batch.tokens() <= Decoder::kLogitRows)
        graph.logits = decoder_->Logits(First(input.logit_rows, 0, batch.tokens()));
    });
  }
  return graph.ops ? &graph : nullptr;
}

void Executor::Run(Batch& batch, const TakeLogits& take, const StepObserver& observer) {
  const size_t samples = batch.samples().size();
  const bool decode = !enforce_eager_ && !backend_->is_host() && !observer &&
                      batch.tokens() == batch.sequences() &&
                      batch.tokens() == static_cast<int>(samples) &&
                      GraphSize(batch.tokens()) <= batch.limits().sequences;
  if (decode) batch.PadTo(GraphSize(batch.tokens()));
  const StepInput input = batch.Upload();
  decoder_->Plan(input);
  DecodeGraph* graph = decode ? GraphFor(batch, input) : nullptr;
  if (graph)
    graph->ops->Run();
  else
    decoder_->Forward(input, observer);
  if (graph && graph->logits) {
    take(0, graph->logits.Rows(0, static_cast<int64_t>(samples)));
    return;
  }
  if (samples == 0) backend_->Wait();  // the batch's host memory is about to be used again
  for (size_t i = 0; i < samples; i += Decoder::kLogitRows) {
    const size_t n = std::min<size_t>(Decoder::kLogitRows, samples - i);
    take(i, decoder_->Logits(First(input.logit_rows, i, n), observer));
  }
}

std::vector<SampledToken> Executor::Execute(Batch& batch, std::vector<Ranking>* rankings) {
  std::vector<SampledToken> sampled(batch.samples().size());
  if (rankings) rankings->assign(sampled.size(), {});
  std::map<size_t, std::vector<float>> kept;  // logits, which sampling may overwrite
  Run(batch, [&](size_t first, const Tensor& logits) {
    for (int64_t row = 0; rankings && row < logits.rows(); ++row) {
      if (!batch.top(first + row)) continue;
      std::vector<float>& copy = kept[first + row];
      copy.resize(logits.columns());
      backend_->Download(copy.data(), logits.Row<float>(row), copy.size() * sizeof(float));
    }
    backend_->Sample({.logits = logits,
                      .soft_cap = spec().final_soft_cap,
                      .rows = batch.samples().subspan(first, logits.rows()),
                      .out = std::span(sampled).subspan(first, logits.rows())});
    for (const auto& [i, copy] : kept) {
      const int32_t target = batch.samples()[i].target;
      if (!sampled[i].finite) continue;
      (*rankings)[i] = RankToken(copy, spec().final_soft_cap, target >= 0 ? target : sampled[i].id,
                                 *batch.top(i));
    }
    kept.clear();
  });
  return sampled;
}

std::vector<LayerHealth> Executor::ReadHealth() {
  std::vector<LayerHealth> health(spec().layers.size());
  backend_->Download(health.data(), health_memory_.data(), health.size() * sizeof(LayerHealth));
  return health;
}

std::vector<std::byte> Executor::ReadClaim(int layer, uint32_t page) {
  const LayerPlace& place = geometry_.layers[layer];
  std::vector<std::byte> bytes(place.layout.ClaimBytes());
  backend_->Download(bytes.data(), arena_->base() + int64_t{page} * kPageUnit + place.claim_offset,
                     bytes.size());
  return bytes;
}

double Executor::cache_bytes_per_token() const {
  double bytes = 0;
  for (const LayerPlace& place : geometry_.layers)
    bytes += static_cast<double>(place.layout.UsedBytes()) / kPageSize;
  return bytes;
}

int64_t Executor::cache_bytes() const { return arena_->slabs() * geometry_.slab_bytes; }

int64_t Executor::cache_tokens() const {
  double slabs = 0;  // of a sequence
  for (int g = 0; g < groups(); ++g) {
    slabs += static_cast<double>(PagesPerSequence(geometry_.groups[g])) /
             static_cast<double>(geometry_.PagesPerSlab(g));
  }
  return static_cast<int64_t>(static_cast<double>(arena_->slabs()) / slabs *
                              static_cast<double>(max_model_len_));
}

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
  lines.push_back(fmt::format(
      "KV cache: {} tokens in {}, {:.2f} sequences of {} tokens at a time", cache_tokens(),
      MiB(cache_bytes()), static_cast<double>(cache_tokens()) / static_cast<double>(max_model_len_),
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
