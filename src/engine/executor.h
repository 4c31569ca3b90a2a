// The executor: a model, its cache memory and a backend; runs batches. Knows no requests.
//
// Not thread-safe: one thread calls it.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "engine/ranking.h"
#include "io/checkpoint.h"
#include "kv/arena.h"
#include "kv/block_pool.h"
#include "kv/policy.h"
#include "kv/scales.h"
#include "models/decoder.h"
#include "models/spec.h"
#include "models/weights.h"
#include "octavo/engine.h"

namespace octavo {

// What backends count for one layer's cache; K, then V. See KvLayer.
struct LayerHealth {
  uint64_t saturated[2] = {};
  float amax[2] = {};
};

// What executors of one model may share: its weights, where they compute.
struct LoadedModel {
  ModelSpec spec;
  Checkpoint checkpoint;
  Weights weights;
  std::string device;  // Backend::name()
};

// What is wrong with options as far as the model's config alone tells, before weights are read.
void CheckOptions(const EngineOptions& options, const ModelSpec& spec);

class Executor {
 public:
  // Loads the model, settles policy and scales, takes the cache memory. Errors are the user's to
  // mend.
  explicit Executor(const EngineOptions& options);
  // Instead of the folder's own; null: the backend that the options name.
  Executor(const EngineOptions& options, ModelSpec spec,
           std::unique_ptr<Backend> backend = nullptr);
  // With the weights of an executor of the same model and device.
  Executor(const EngineOptions& options, std::shared_ptr<const LoadedModel> model);

  std::shared_ptr<const LoadedModel> model() const { return model_; }
  const ModelSpec& spec() const { return model_->spec; }
  int64_t max_model_len() const { return max_model_len_; }
  int max_num_seqs() const { return max_num_seqs_; }
  int max_num_batched_tokens() const { return max_num_batched_tokens_; }
  bool bound_by_cache() const { return bound_by_cache_; }  // max_model_len, which nobody set
  BlockPool& pool() { return *pool_; }
  int groups() const { return static_cast<int>(geometry_.groups.size()); }

  Batch MakeBatch();
  // Runs the batch and hands out the logits of its samples' rows, in order and in pieces:
  // [rows, vocab] float32 in the backend's memory, valid during the call.
  using TakeLogits = std::function<void(size_t first_sample, const Tensor& logits)>;
  void Run(Batch& batch, const TakeLogits& take, const StepObserver& observer = {});
  // Runs the batch and samples a token for each of its samples. `rankings`, one each: of the token,
  // or the row's target, where the sample asks for it and the logits are finite; rank 0 elsewhere.
  std::vector<SampledToken> Execute(Batch& batch, std::vector<Ranking>* rankings = nullptr);
  Backend& backend() { return *backend_; }

  std::vector<std::string> StartupReport() const;
  // Formats and scale sources per layer; fixed, so any thread may ask. Counts are in health().
  std::vector<LayerCacheReport> CacheReport(std::span<const LayerHealth> health) const;
  std::vector<LayerHealth> ReadHealth();
  // A layer's claim of a page, and how it lies.
  const KvLayout& layout(int layer) const { return geometry_.layers[layer].layout; }
  int group(int layer) const { return geometry_.layers[layer].group; }
  std::vector<std::byte> ReadClaim(int layer, uint32_t page);
  double cache_bytes_per_token() const;
  int64_t cache_bytes() const;
  int64_t cache_tokens() const;      // that fit, in sequences of max_model_len
  int64_t cache_bytes_used() const;  // pages that sequences hold

 private:
  Executor(const EngineOptions& options, const ModelSpec& spec, std::unique_ptr<Backend> backend,
           const std::function<std::shared_ptr<const LoadedModel>(Backend&)>& load);
  std::vector<LayerCache> LayOutCache(const EngineOptions& options);
  int64_t CacheBytes(const EngineOptions& options, const std::vector<KvLayerFacts>& facts) const;
  BackendLimits Limits() const;
  int StepSequences() const;  // of a step, with those that pad it
  int StepTokens() const;
  // A decode step as recorded ops, with its logits where those are few.
  struct DecodeGraph {
    std::unique_ptr<Graph> ops;
    Tensor logits;
  };
  DecodeGraph* GraphFor(const Batch& batch, const StepInput& input);
  int64_t PagesPerSequence(const KvGroup& group) const;  // of max_model_len tokens, at most

  DType dtype_ = DType::kBF16;
  std::unique_ptr<Backend> backend_;
  std::shared_ptr<const LoadedModel> model_;
  KvPolicy policy_;
  KvScales scales_;
  int64_t max_model_len_ = 0;
  bool bound_by_cache_ = false;
  int max_num_seqs_ = 0, max_num_batched_tokens_ = 0;
  bool enforce_eager_ = false;
  GroupGeometry geometry_;
  Memory arena_memory_, scale_memory_, health_memory_;
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<Decoder> decoder_;
  // By the batch's memory, whose addresses they hold, and its padded size.
  std::map<std::pair<const void*, int>, DecodeGraph> graphs_;
};

}  // namespace octavo
