// The executor: a model, its cache memory and a backend; runs batches. Knows no requests.
//
// Not thread-safe: one thread calls it.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "io/checkpoint.h"
#include "kv/arena.h"
#include "kv/policy.h"
#include "kv/scales.h"
#include "models/config.h"
#include "models/decoder.h"
#include "octavo/engine.h"

namespace octavo {

class Executor {
 public:
  // Loads the model, settles policy and scales, takes the cache memory. Errors are the user's to mend.
  explicit Executor(const EngineOptions& options);

  const ModelSpec& spec() const { return spec_; }
  int64_t max_model_len() const { return max_model_len_; }
  BlockPool& pool() { return *pool_; }
  int groups() const { return static_cast<int>(geometry_.size()); }

  void Forward(Batch& batch, const Decoder::Observer& observer = nullptr);
  // Logits of rows of the last Forward before the soft-cap: see Decoder::Logits.
  Tensor Logits(std::span<const int32_t> rows, const Decoder::Observer& observer = nullptr) {
    return decoder_->Logits(rows, observer);
  }
  // Forward, then a token for each of the batch's samples.
  std::vector<SampledToken> Execute(Batch& batch);

  std::vector<std::string> StartupReport() const;
  std::vector<LayerCacheReport> CacheReport() const;
  double cache_bytes_per_token() const;

 private:
  void LayOutCache(const EngineOptions& options);

  ModelSpec spec_;
  Checkpoint checkpoint_;
  Weights weights_;
  KvPolicy policy_;
  KvScales scales_;
  int64_t max_model_len_ = 0;
  std::vector<GroupGeometry> geometry_;
  Buffer arena_memory_;
  std::unique_ptr<BlockPool> pool_;
  struct Health {  // of one layer; backends add to it
    uint64_t saturated[2] = {};
    float amax[2] = {};
  };
  std::vector<Health> health_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Decoder> decoder_;
};

}  // namespace octavo
