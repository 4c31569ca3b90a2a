#include "models/decoder.h"

#include <algorithm>

#include "base/error.h"
#include "base/float_bits.h"

namespace octavo {

Decoder::Decoder(const ModelSpec& spec, const Weights& weights, Backend& backend, DType dtype,
                 std::vector<LayerCache> caches, int max_tokens)
    : spec_(spec),
      weights_(weights),
      backend_(backend),
      dtype_(dtype),
      caches_(std::move(caches)),
      max_tokens_(max_tokens) {
  OCTAVO_CHECK(caches_.size() == spec.layers.size(), caches_.size(), spec.layers.size());
  int64_t q = 0, kv = 0, intermediate = 0, experts = 0, top_k = 0, rope = 0;
  for (const LayerSpec& layer : spec.layers) {
    q = std::max<int64_t>(q, layer.heads * layer.head_dim);
    kv = std::max<int64_t>(kv, layer.kv_heads * layer.head_dim);
    if (layer.ffn.experts == 0) intermediate = std::max(intermediate, layer.ffn.intermediate);
    experts = std::max<int64_t>(experts, layer.ffn.experts);
    top_k = std::max<int64_t>(top_k, layer.ffn.top_k);
  }
  for (const RopeSpec& table : spec.ropes) rope += 2 * static_cast<int64_t>(table.inv_freq.size());
  const auto activations = [&](int64_t rows, int64_t columns) {
    return Buffer(rows * columns * SizeOf(dtype_));
  };
  hidden_ = Buffer(max_tokens * spec.hidden * sizeof(float));
  normed_ = Buffer(max_tokens * spec.hidden * sizeof(float));
  delta_ = Buffer(max_tokens * spec.hidden * sizeof(float));
  query_ = Buffer(max_tokens * q * sizeof(float));
  key_ = Buffer(max_tokens * kv * sizeof(float));
  value_ = Buffer(max_tokens * kv * sizeof(float));
  attended_ = activations(max_tokens, q);
  gate_ = Buffer(max_tokens * intermediate * sizeof(float));
  up_ = Buffer(max_tokens * intermediate * sizeof(float));
  router_ = Buffer(max_tokens * experts * sizeof(float));
  route_ids_ = Buffer(max_tokens * top_k * sizeof(int32_t));
  route_weights_ = Buffer(max_tokens * top_k * sizeof(float));
  rope_ = Buffer(max_tokens * rope * sizeof(float));
  logit_rows_ = Buffer(kLogitRows * spec.hidden * sizeof(float));
  logits_ = Buffer(kLogitRows * spec.vocab * sizeof(float));
}

Tensor Decoder::Scratch(const Buffer& buffer, DType dtype, int64_t rows, int64_t columns) const {
  OCTAVO_CHECK(rows * columns * SizeOf(dtype) <= buffer.size(), rows, columns, buffer.size());
  return Tensor(buffer.data(), dtype, {rows, columns});
}

void Decoder::Forward(const StepInput& input, const Observer& observer) {
  const int tokens = static_cast<int>(input.ids.size());
  OCTAVO_CHECK(tokens > 0 && tokens <= max_tokens_, tokens, max_tokens_);
  residual_ = Scratch(hidden_, DType::kF32, tokens, spec_.hidden);
  block_out_ = Scratch(delta_, DType::kF32, tokens, spec_.hidden);
  plans_.clear();

  float* rope = reinterpret_cast<float*>(rope_.data());
  rope_tables_.clear();
  for (const RopeSpec& spec : spec_.ropes) {
    const Tensor table(rope, DType::kF32, {tokens, 2 * static_cast<int64_t>(spec.inv_freq.size())});
    backend_.RopeTable({.positions = input.positions,
                        .inv_freq = spec.inv_freq,
                        .scaling = spec.scaling,
                        .cos_sin = table});
    rope_tables_.push_back(table);
    rope += table.size();
  }

  // Gemma's embedding scale is a buffer in the model's own type, so it is rounded before it
  // multiplies.
  const float scale = dtype_ == DType::kBF16 ? BF16ToFloat(FloatToBF16(spec_.embedding_scale))
                                             : spec_.embedding_scale;
  backend_.Gather(
      {.table = weights_.embedding, .ids = input.ids, .scale = scale, .out = residual_});

  Tensor pending;  // what the last block adds to the residual stream; the next norm does it
  for (size_t l = 0; l < spec_.layers.size(); ++l) {
    const LayerSpec& layer = spec_.layers[l];
    const LayerWeights& w = weights_.layers[l];
    const auto norm = [&](const Tensor& x, const Tensor& delta, const Tensor& weight,
                          const Tensor& out) {
      backend_.Norm({.x = x,
                     .delta = delta,
                     .weight = weight,
                     .eps = spec_.norm_eps,
                     .offset = spec_.norm_offset,
                     .out = out});
    };
    block_in_ = Scratch(normed_, dtype_, tokens, spec_.hidden);
    norm(residual_, pending, w.input_norm, block_in_);
    if (observer) observer(static_cast<int>(l), residual_);
    Attend(layer, w, caches_[l], input);
    if (layer.post_norms) norm(block_out_, {}, w.post_attention_norm, block_out_);
    // A routing decision should not hang on a rounding.
    if (layer.ffn.experts > 0) block_in_ = Scratch(normed_, DType::kF32, tokens, spec_.hidden);
    norm(residual_, block_out_, layer.post_norms ? w.pre_ffn_norm : w.post_attention_norm,
         block_in_);
    FeedForward(layer, w, tokens);
    if (layer.post_norms) norm(block_out_, {}, w.post_ffn_norm, block_out_);
    pending = block_out_;
  }
  backend_.Norm({.x = residual_, .delta = pending, .weight = {}, .out = {}});
}

void Decoder::Attend(const LayerSpec& layer, const LayerWeights& w, const LayerCache& cache,
                     const StepInput& input) {
  const int64_t tokens = residual_.rows();
  const Tensor q = Scratch(query_, DType::kF32, tokens, int64_t{layer.heads} * layer.head_dim);
  const Tensor k = Scratch(key_, DType::kF32, tokens, int64_t{layer.kv_heads} * layer.head_dim);
  const Tensor v = Scratch(value_, DType::kF32, tokens, int64_t{layer.kv_heads} * layer.head_dim);
  const Tensor attended = Scratch(attended_, dtype_, tokens, int64_t{layer.heads} * layer.head_dim);
  const BatchView& batch = input.groups[cache.group];

  backend_.MatMul({.x = block_in_, .weight = w.q, .bias = w.q_bias, .out = q});
  backend_.MatMul({.x = block_in_, .weight = w.k, .bias = w.k_bias, .out = k});
  backend_.MatMul({.x = block_in_, .weight = w.v, .bias = w.v_bias, .out = v});
  backend_.Append({.q = q,
                   .k = k,
                   .v = v,
                   .heads = layer.heads,
                   .q_norm = w.q_norm,
                   .k_norm = w.k_norm,
                   .norm_eps = spec_.norm_eps,
                   .norm_offset = spec_.norm_offset,
                   .cos_sin = rope_tables_[layer.rope],
                   .batch = &batch,
                   .cache = cache.kv});
  backend_.Attention({.q = q,
                      .out = attended,
                      .batch = &batch,
                      .plan = &PlanFor(layer, cache.group, input),
                      .cache = cache.kv,
                      .scale = layer.attention_scale,
                      .soft_cap = layer.soft_cap,
                      .sinks = w.sinks});
  backend_.MatMul({.x = attended, .weight = w.o, .bias = w.o_bias, .out = block_out_});
}

void Decoder::FeedForward(const LayerSpec& layer, const LayerWeights& w, int tokens) {
  const FfnSpec& ffn = layer.ffn;
  if (ffn.experts == 0) {
    const Tensor gate = Scratch(gate_, DType::kF32, tokens, ffn.intermediate);
    const Tensor up = Scratch(up_, DType::kF32, tokens, ffn.intermediate);
    backend_.MatMul(
        {.x = block_in_, .weight = w.dense.gate, .bias = w.dense.gate_bias, .out = gate});
    backend_.MatMul({.x = block_in_, .weight = w.dense.up, .bias = w.dense.up_bias, .out = up});
    backend_.GatedActivation(
        {.activation = ffn.activation, .limit = ffn.limit, .gate = gate, .up = up, .out = gate});
    backend_.MatMul(
        {.x = gate, .weight = w.dense.down, .bias = w.dense.down_bias, .out = block_out_});
    return;
  }
  const Tensor logits = Scratch(router_, DType::kF32, tokens, ffn.experts);
  const Tensor ids = Scratch(route_ids_, DType::kI32, tokens, ffn.top_k);
  const Tensor weights = Scratch(route_weights_, DType::kF32, tokens, ffn.top_k);
  backend_.MatMul({.x = block_in_, .weight = w.router, .bias = w.router_bias, .out = logits});
  backend_.Route({.logits = logits,
                  .top_k = ffn.top_k,
                  .softmax_first = ffn.softmax_first,
                  .normalize = ffn.normalize_topk,
                  .ids = ids,
                  .weights = weights});
  backend_.Experts({.x = block_in_,
                    .ids = ids,
                    .weights = weights,
                    .experts = w.experts,
                    .activation = ffn.activation,
                    .limit = ffn.limit,
                    .out = block_out_});
}

const AttentionPlan& Decoder::PlanFor(const LayerSpec& layer, int group, const StepInput& input) {
  const AttentionShape shape{.heads = layer.heads,
                             .kv_heads = layer.kv_heads,
                             .head_dim = layer.head_dim,
                             .window = layer.window};
  for (const Plan& plan : plans_) {
    if (plan.group == group && plan.plan.shape == shape) return plan.plan;
  }
  plans_.push_back({group, backend_.PlanAttention(shape, input.groups[group])});
  return plans_.back().plan;
}

Tensor Decoder::Logits(std::span<const int32_t> rows, const Observer& observer) {
  OCTAVO_CHECK(rows.size() <= kLogitRows, rows.size());
  const int64_t count = static_cast<int64_t>(rows.size());
  const Tensor x = Scratch(logit_rows_, DType::kF32, count, spec_.hidden);
  const Tensor logits = Scratch(logits_, DType::kF32, count, spec_.vocab);
  backend_.Gather({.table = residual_, .ids = rows, .out = x});
  backend_.Norm({.x = x,
                 .delta = {},
                 .weight = weights_.final_norm,
                 .eps = spec_.norm_eps,
                 .offset = spec_.norm_offset,
                 .out = x});
  if (observer) observer(static_cast<int>(spec_.layers.size()), x);
  backend_.MatMul({.x = x, .weight = weights_.lm_head, .bias = {}, .out = logits});
  return logits;
}

}  // namespace octavo
