// The executor: a model, its cache memory and a backend; runs batches. Knows no requests.
//
// Not thread-safe: one thread calls it.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/batch.h"
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

class Executor {
 public:
  // Loads the model, settles policy and scales, takes the cache memory. Errors are the user's to
  // mend.
  explicit Executor(const EngineOptions& options);
  Executor(const EngineOptions& options, ModelSpec spec);  // instead of the folder's own

  const ModelSpec& spec() const { return spec_; }
  int64_t max_model_len() const { return max_model_len_; }
  BlockPool& pool() { return *pool_; }
  int groups() const { return static_cast<int>(geometry_.groups.size()); }

  void Forward(Batch& batch, const Decoder::Observer& observer = nullptr);
  // Logits of rows of the last Forward: see Decoder::Logits.
  Tensor Logits(std::span<const int32_t> rows, const Decoder::Observer& observer = nullptr) {
    return decoder_->Logits(rows, observer);
  }
  // Forward, then a token for each of the batch's samples.
  std::vector<SampledToken> Execute(Batch& batch);

  std::vector<std::string> StartupReport() const;
  // Formats and scale sources per layer; fixed, so any thread may ask. Counts are in health().
  std::vector<LayerCacheReport> CacheReport(std::span<const LayerHealth> health) const;
  std::span<const LayerHealth> health() const { return health_; }
  double cache_bytes_per_token() const;
  int64_t cache_bytes() const;
  int64_t cache_bytes_used() const;  // pages that sequences hold

 private:
  std::vector<LayerCache> LayOutCache(const EngineOptions& options);
  int64_t PagesPerSequence(const KvGroup& group) const;  // of max_model_len tokens, at most

  DType dtype_ = DType::kBF16;
  ModelSpec spec_;
  Checkpoint checkpoint_;
  Weights weights_;
  KvPolicy policy_;
  KvScales scales_;
  int64_t max_model_len_ = 0;
  int max_num_seqs_ = 0, max_num_batched_tokens_ = 0;
  GroupGeometry geometry_;
  Buffer arena_memory_;
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<BlockPool> pool_;
  std::vector<LayerHealth> health_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Decoder> decoder_;
};

}  // namespace octavo
