// The one forward pass: reads a ModelSpec, calls a Backend. Knows no families and no scheduler.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "base/tensor.h"
#include "kernels/backend.h"
#include "models/spec.h"
#include "models/weights.h"

namespace octavo {

// Where a layer's keys and values are: its cache, and the index of its page group in
// StepInput::groups.
struct LayerCache {
  KvLayer kv;
  int group = 0;
};

struct StepInput {
  std::span<const int32_t> ids;        // [tokens]
  std::span<const int32_t> positions;  // [tokens]
  std::span<const BatchView> groups;   // the same tokens as each page group sees them
};

class Decoder {
 public:
  // Sees residual streams as they enter layer 0, 1, ..., and, as `layers`, the final norm's output
  // of the logit rows.
  using Observer = std::function<void(int layer, const Tensor& hidden)>;

  // `spec`, `weights` and `backend` must outlive the decoder. `dtype`, float32 or bfloat16, is what
  // the two inputs of a block's matmuls are stored in: its normed input and the attention's output.
  // The residual stream, what is added to it, and what a fused GPU kernel would keep in registers
  // are float32 in both: queries, keys and values before the cache (so they are rounded once, not
  // twice), the FFN between its matmuls, and what a router and its experts read.
  Decoder(const ModelSpec& spec, const Weights& weights, Backend& backend, DType dtype,
          std::vector<LayerCache> caches, int max_tokens);

  // Appends the step's tokens to the cache and computes their hidden states. At most max_tokens
  // tokens.
  void Forward(const StepInput& input, const Observer& observer = nullptr);

  // Logits of these rows of the last step, before the model's final soft-cap: [rows, vocab]
  // float32. At most kLogitRows rows at a time; valid until the next call.
  Tensor Logits(std::span<const int32_t> rows, const Observer& observer = nullptr);

  static constexpr int kLogitRows = 64;

 private:
  void Attend(const LayerSpec& layer, const LayerWeights& w, const LayerCache& cache,
              const StepInput& input);
  void FeedForward(const LayerSpec& layer, const LayerWeights& w, int tokens);
  const AttentionPlan& PlanFor(const LayerSpec& layer, int group, const StepInput& input);
  // A [rows, columns] view of a scratch buffer, grown at construction only.
  Tensor Scratch(const Buffer& buffer, DType dtype, int64_t rows, int64_t columns) const;

  const ModelSpec& spec_;
  const Weights& weights_;
  Backend& backend_;
  DType dtype_;
  std::vector<LayerCache> caches_;
  int max_tokens_;

  struct Plan {
    int group;
    AttentionPlan plan;
  };
  std::vector<Plan> plans_;  // of the current step
  std::vector<Tensor> rope_tables_;

  // `hidden_` is the residual stream, `normed_` what a block reads, `delta_` what it adds.
  Buffer hidden_, normed_, delta_, query_, key_, value_, attended_, gate_, up_, router_, route_ids_,
      route_weights_, rope_, logit_rows_, logits_;
  Tensor residual_, block_in_, block_out_;
};

}  // namespace octavo
