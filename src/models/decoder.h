// The one forward pass: reads a ModelSpec, calls a Backend. Knows no families and no scheduler.
#pragma once

#include <functional>
#include <memory>
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
  AttentionMath math = AttentionMath::k16Bit;
};

// Tensors are in the backend's memory, int32.
struct StepInput {
  Tensor ids, positions;          // [tokens]
  Tensor logit_rows;              // [most] rows whose logits may be asked for
  std::vector<BatchView> groups;  // the same tokens as each page group sees them
};

struct StepLimits {
  int tokens = 0, sequences = 0;
  int kv_tokens = 0;  // of one sequence
};

// Sees a step's tensors where they are computed, in the backend's memory; what it writes there, the
// rest of the step goes on with. Either may be empty.
struct StepObserver {
  using See = std::function<void(int layer, const Tensor& tensor)>;
  // Residual streams as they enter layer 0, 1, ..., and, as `layers`, the final norm's output of
  // the logit rows.
  See hidden = nullptr;
  // Attention's output before o, contiguous: [tokens, heads * head_dim] of the decoder's dtype.
  See attended = nullptr;

  explicit operator bool() const { return hidden || attended; }
};

class Decoder {
 public:
  // `spec`, `weights` and `backend` must outlive the decoder. `dtype`, float32 or bfloat16, is what
  // the two inputs of a block's matmuls are stored in: its normed input and the attention's output.
  // The residual stream, what is added to it, and queries, keys and values before the cache are
  // float32 in both (so they are rounded once, not twice), and so is what a router reads; what a
  // fused kernel would keep in registers, the FFN between its matmuls, is of the backend's
  // intermediate_dtype().
  Decoder(const ModelSpec& spec, const Weights& weights, Backend& backend, DType dtype,
          std::vector<LayerCache> caches, const StepLimits& limits);

  // Memory that a decoder takes from the backend, not counting its attention plans'.
  static int64_t ScratchBytes(const ModelSpec& spec, DType dtype, DType intermediate,
                              const StepLimits& limits);

  // Shares a step's attention out: on the host, before Forward.
  void Plan(const StepInput& input);

  // Appends the planned step's tokens to the cache and computes their hidden states.
  void Forward(const StepInput& input, const StepObserver& observer = {});

  // Logits of these rows of the last step ([rows] int32), before the model's final soft-cap:
  // [rows, vocab] float32. At most kLogitRows rows at a time; valid until the next call.
  Tensor Logits(const Tensor& rows, const StepObserver& observer = {});

  static constexpr int kLogitRows = 64;

 private:
  // Byte offsets of the scratch tensors, each grown to the widest layer.
  struct Layout {
    int64_t hidden, normed, rounded, block_out, qkv, query, attended, gate_up, router, route_ids,
        route_weights, rope, logit_rows, logit_normed, logits, total;
  };
  static Layout LayOut(const ModelSpec& spec, DType dtype, DType intermediate,
                       const StepLimits& limits);

  // One plan per shape, formats, math and group, each twice: for any step, and for steps of one
  // token per sequence, whose graphs need no prefill kernels.
  struct Plans {
    int group;
    std::unique_ptr<AttentionPlan> any, decode;
  };
  void MakePlans();
  void Attend(size_t l, const StepInput& input, const StepObserver& observer);
  void FeedForward(size_t l, int tokens);
  template <class Op>
  void AddToResidual(const LayerSpec& layer, const Tensor& post_norm, const Op& op);
  NormArgs NormOf(const Tensor& x, const Tensor& weight, const Tensor& out) const;
  Tensor Scratch(int64_t offset, DType dtype, int64_t rows, int64_t columns) const;

  const ModelSpec& spec_;
  const Weights& weights_;
  Backend& backend_;
  DType dtype_, intermediate_, query_dtype_;
  std::vector<LayerCache> caches_;
  StepLimits limits_;
  Layout at_;
  Memory scratch_;
  std::vector<Memory> inv_freqs_;  // of each rope
  std::vector<Plans> plans_;
  std::vector<size_t> layer_plans_;  // index into plans_
  bool decode_only_ = false;         // the planned step
  std::vector<Tensor> rope_tables_;
  Tensor residual_;
};

}  // namespace octavo
