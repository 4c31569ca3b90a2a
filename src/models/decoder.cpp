#include "models/decoder.h"

#include <algorithm>

#include "base/error.h"
#include "base/float_bits.h"

namespace octavo {

namespace {

// Of what attention is asked with. In a dense model of bfloat16 that is enough; where routers read
// on, a rounding may change who answers.
DType QueryDType(const ModelSpec& spec, DType dtype, DType intermediate) {
  const bool routes = std::any_of(spec.layers.begin(), spec.layers.end(),
                                  [](const LayerSpec& layer) { return layer.ffn.experts > 0; });
  return !routes && dtype == DType::kBF16 ? dtype : intermediate;
}

// Rows of logits begin at multiples of 32 bytes, as cuBLASLt wants them.
int64_t LogitStride(const ModelSpec& spec) { return (spec.vocab + 7) / 8 * 8; }

}  // namespace

Decoder::Layout Decoder::LayOut(const ModelSpec& spec, DType dtype, DType intermediate,
                                const StepLimits& limits) {
  int64_t q = 0, kv = 0, inner = 0, experts = 0, top_k = 0, rope = 0;
  bool post_norms = false;
  for (const LayerSpec& layer : spec.layers) {
    q = std::max<int64_t>(q, layer.heads * layer.head_dim);
    kv = std::max<int64_t>(kv, layer.kv_heads * layer.head_dim);
    if (layer.ffn.experts == 0) inner = std::max(inner, layer.ffn.intermediate);
    experts = std::max<int64_t>(experts, layer.ffn.experts);
    top_k = std::max<int64_t>(top_k, layer.ffn.top_k);
    post_norms |= layer.post_norms;
  }
  for (const RopeSpec& table : spec.ropes) rope += 2 * std::ssize(table.inv_freq);
  int64_t total = 0;
  const auto take = [&](DType type, int64_t rows, int64_t columns) {
    constexpr int64_t kAlign = 256;
    const int64_t offset = total;
    const int64_t bytes = rows * columns * static_cast<int64_t>(SizeOf(type));
    total += (bytes + kAlign - 1) / kAlign * kAlign;
    return offset;
  };
  const DType f32 = DType::kF32;
  const int64_t rows = limits.tokens;
  Layout at{};
  at.hidden = take(f32, rows, spec.hidden);
  at.normed = take(f32, rows, spec.hidden);
  at.rounded = take(intermediate, rows, experts == 0 || intermediate == f32 ? 0 : spec.hidden);
  at.block_out = take(f32, rows, post_norms ? spec.hidden : 0);
  at.qkv = take(f32, rows, q + 2 * kv);
  const DType query = QueryDType(spec, dtype, intermediate);
  at.query = take(query, rows, query == f32 ? 0 : q);
  at.attended = take(dtype, rows, q);
  at.gate_up = take(intermediate, rows, 2 * inner);
  at.router = take(f32, rows, experts);
  at.route_ids = take(DType::kI32, rows, top_k);
  at.route_weights = take(f32, rows, top_k);
  at.rope = take(f32, rows, rope);
  at.logit_rows = take(f32, kLogitRows, spec.hidden);
  at.logit_normed = take(f32, kLogitRows, spec.hidden);
  at.logits = take(f32, kLogitRows, LogitStride(spec));
  at.total = total;
  return at;
}

int64_t Decoder::ScratchBytes(const ModelSpec& spec, DType dtype, DType intermediate,
                              const StepLimits& limits) {
  return LayOut(spec, dtype, intermediate, limits).total;
}

Decoder::Decoder(const ModelSpec& spec, const Weights& weights, Backend& backend, DType dtype,
                 std::vector<LayerCache> caches, const StepLimits& limits)
    : spec_(spec),
      weights_(weights),
      backend_(backend),
      dtype_(dtype),
      intermediate_(backend.intermediate_dtype()),
      query_dtype_(QueryDType(spec, dtype, intermediate_)),
      caches_(std::move(caches)),
      limits_(limits),
      at_(LayOut(spec, dtype, intermediate_, limits)),
      scratch_(backend.Allocate(at_.total)) {
  OCTAVO_CHECK(caches_.size() == spec.layers.size(), caches_.size(), spec.layers.size());
  if (!scratch_.data()) {
    throw Error(ErrorCode::kResourceExhausted,
                "out of memory for activations; lower --max-num-batched-tokens");
  }
  for (const RopeSpec& rope : spec.ropes) {
    const size_t bytes = rope.inv_freq.size() * sizeof(float);
    inv_freqs_.push_back(backend.Allocate(bytes));
    backend.Upload(inv_freqs_.back().data(), rope.inv_freq.data(), bytes);
  }
  MakePlans();
}

void Decoder::MakePlans() {
  std::vector<AttentionPlanSpec> specs;
  for (size_t l = 0; l < spec_.layers.size(); ++l) {
    const LayerSpec& layer = spec_.layers[l];
    const LayerCache& cache = caches_[l];
    const AttentionPlanSpec plan{.shape = {.heads = layer.heads,
                                           .kv_heads = layer.kv_heads,
                                           .head_dim = layer.head_dim,
                                           .window = layer.window},
                                 .k_format = cache.kv.layout.k_format,
                                 .v_format = cache.kv.layout.v_format,
                                 .math = cache.math,
                                 .soft_cap = layer.soft_cap > 0,
                                 .max_tokens = limits_.tokens,
                                 .max_sequences = limits_.sequences,
                                 .max_sequence_tokens = limits_.tokens,
                                 .max_kv_tokens = limits_.kv_tokens};
    size_t i = 0;
    while (i < plans_.size() && !(specs[i] == plan && plans_[i].group == cache.group)) ++i;
    layer_plans_.push_back(i);
    if (i < plans_.size()) continue;
    specs.push_back(plan);
    AttentionPlanSpec decode = plan;
    decode.max_tokens = std::min(limits_.tokens, limits_.sequences);
    decode.max_sequence_tokens = 1;
    plans_.push_back({cache.group, backend_.PlanAttention(plan), backend_.PlanAttention(decode)});
  }
}

Tensor Decoder::Scratch(int64_t offset, DType dtype, int64_t rows, int64_t columns) const {
  return Tensor(scratch_.data() + offset, dtype, {rows, columns});
}

void Decoder::Plan(const StepInput& input) {
  const BatchView& any = input.groups[0];
  decode_only_ = any.tokens == any.sequences();
  for (Plans& plans : plans_)
    (decode_only_ ? plans.decode : plans.any)->Make(input.groups[plans.group]);
}

void Decoder::Forward(const StepInput& input, const StepObserver& observer) {
  const int tokens = static_cast<int>(input.ids.size());
  OCTAVO_CHECK(tokens > 0 && tokens <= limits_.tokens, tokens, limits_.tokens);
  residual_ = Scratch(at_.hidden, DType::kF32, tokens, spec_.hidden);

  int64_t rope = at_.rope;
  rope_tables_.clear();
  for (size_t i = 0; i < spec_.ropes.size(); ++i) {
    const int64_t pairs = std::ssize(spec_.ropes[i].inv_freq);
    const Tensor table = Scratch(rope, DType::kF32, tokens, 2 * pairs);
    backend_.RopeTable({.positions = input.positions,
                        .inv_freq = Tensor(inv_freqs_[i].data(), DType::kF32, {pairs}),
                        .scaling = spec_.ropes[i].scaling,
                        .cos_sin = table});
    rope_tables_.push_back(table);
    rope += table.size() * static_cast<int64_t>(sizeof(float));
  }

  // Gemma's embedding scale is a buffer in the model's own type, so it is rounded before it
  // multiplies.
  const float scale = dtype_ == DType::kBF16 ? BF16ToFloat(FloatToBF16(spec_.embedding_scale))
                                             : spec_.embedding_scale;
  backend_.Gather(
      {.table = weights_.embedding, .ids = input.ids, .scale = scale, .out = residual_});

  for (size_t l = 0; l < spec_.layers.size(); ++l) {
    if (observer.hidden) observer.hidden(static_cast<int>(l), residual_);
    Attend(l, input, observer);
    FeedForward(l, tokens);
  }
}

NormArgs Decoder::NormOf(const Tensor& x, const Tensor& weight, const Tensor& out) const {
  return {.x = x, .weight = weight, .eps = spec_.norm_eps, .offset = spec_.norm_offset, .out = out};
}

void Decoder::Attend(size_t l, const StepInput& input, const StepObserver& observer) {
  const LayerSpec& layer = spec_.layers[l];
  const LayerWeights& w = weights_.layers[l];
  const LayerCache& cache = caches_[l];
  const int64_t tokens = residual_.rows(), q_size = int64_t{layer.heads} * layer.head_dim,
                kv_size = int64_t{layer.kv_heads} * layer.head_dim;
  const Tensor qkv = Scratch(at_.qkv, DType::kF32, tokens, q_size + 2 * kv_size);
  const Tensor q = qkv.Columns(0, q_size), k = qkv.Columns(q_size, q_size + kv_size),
               v = qkv.Columns(q_size + kv_size, q_size + 2 * kv_size);
  const Tensor query =
      query_dtype_ == DType::kF32 ? q : Scratch(at_.query, query_dtype_, tokens, q_size);
  const Tensor attended = Scratch(at_.attended, dtype_, tokens, q_size);
  const BatchView& batch = input.groups[cache.group];
  const Plans& plans = plans_[layer_plans_[l]];
  AttentionPlan* plan = (decode_only_ ? plans.decode : plans.any).get();

  const Projection projections[] = {{w.q, w.q_bias, q}, {w.k, w.k_bias, k}, {w.v, w.v_bias, v}};
  const Tensor normed = Scratch(at_.normed, dtype_, tokens, spec_.hidden);
  backend_.Norm(NormOf(residual_, w.input_norm, normed));
  backend_.Project(normed, projections);
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
                   .plan = plan,
                   .cache = cache.kv,
                   .q_out = query});
  backend_.Attention({.q = query,
                      .out = attended,
                      .batch = &batch,
                      .plan = plan,
                      .cache = cache.kv,
                      .scale = layer.attention_scale,
                      .soft_cap = layer.soft_cap,
                      .sinks = w.sinks});
  if (observer.attended) observer.attended(static_cast<int>(l), attended);
  AddToResidual(layer, w.post_attention_norm, [&](const Tensor& out, bool accumulate) {
    backend_.MatMul(
        {.x = attended, .weight = w.o, .bias = w.o_bias, .out = out, .accumulate = accumulate});
  });
}

// A block's last op: adds to the residual stream itself, unless a norm is between.
template <class Op>
void Decoder::AddToResidual(const LayerSpec& layer, const Tensor& post_norm, const Op& op) {
  if (!layer.post_norms) return op(residual_, true);
  const Tensor out = Scratch(at_.block_out, DType::kF32, residual_.rows(), spec_.hidden);
  op(out, false);
  NormArgs norm = NormOf(out, post_norm, residual_);
  norm.accumulate = true;
  backend_.Norm(norm);
}

void Decoder::FeedForward(size_t l, int tokens) {
  const LayerSpec& layer = spec_.layers[l];
  const LayerWeights& w = weights_.layers[l];
  const FfnSpec& ffn = layer.ffn;
  // A routing decision should not hang on a rounding.
  const DType normed_dtype = ffn.experts > 0 ? DType::kF32 : dtype_;
  NormArgs norm = NormOf(residual_, layer.post_norms ? w.pre_ffn_norm : w.post_attention_norm,
                         Scratch(at_.normed, normed_dtype, tokens, spec_.hidden));
  if (ffn.experts == 0) {
    const Tensor both = Scratch(at_.gate_up, intermediate_, tokens, 2 * ffn.intermediate);
    const Tensor gate = both.Columns(0, ffn.intermediate),
                 up = both.Columns(ffn.intermediate, 2 * ffn.intermediate);
    backend_.Norm(norm);
    backend_.GatedProject(
        norm.out, {w.dense.gate, w.dense.gate_bias, gate}, {w.dense.up, w.dense.up_bias, up},
        {.activation = ffn.activation, .limit = ffn.limit, .gate = gate, .up = up, .out = gate});
    AddToResidual(layer, w.post_ffn_norm, [&](const Tensor& out, bool accumulate) {
      backend_.MatMul({.x = gate,
                       .weight = w.dense.down,
                       .bias = w.dense.down_bias,
                       .out = out,
                       .accumulate = accumulate});
    });
    return;
  }
  if (intermediate_ != DType::kF32)
    norm.rounded = Scratch(at_.rounded, intermediate_, tokens, spec_.hidden);
  const Tensor logits = Scratch(at_.router, DType::kF32, tokens, ffn.experts);
  const Tensor ids = Scratch(at_.route_ids, DType::kI32, tokens, ffn.top_k);
  const Tensor weights = Scratch(at_.route_weights, DType::kF32, tokens, ffn.top_k);
  backend_.Norm(norm);
  backend_.MatMul({.x = norm.out, .weight = w.router, .bias = w.router_bias, .out = logits});
  backend_.Route({.logits = logits,
                  .top_k = ffn.top_k,
                  .softmax_first = ffn.softmax_first,
                  .normalize = ffn.normalize_topk,
                  .ids = ids,
                  .weights = weights});
  AddToResidual(layer, w.post_ffn_norm, [&](const Tensor& out, bool accumulate) {
    backend_.Experts({.x = norm.rounded ? norm.rounded : norm.out,
                      .ids = ids,
                      .weights = weights,
                      .experts = w.experts,
                      .activation = ffn.activation,
                      .limit = ffn.limit,
                      .out = out,
                      .accumulate = accumulate});
  });
}

Tensor Decoder::Logits(const Tensor& rows, const StepObserver& observer) {
  const int64_t count = rows.size();
  OCTAVO_CHECK(count <= kLogitRows, count);
  const Tensor x = Scratch(at_.logit_rows, DType::kF32, count, spec_.hidden);
  const Tensor normed = Scratch(at_.logit_normed, intermediate_, count, spec_.hidden);
  const Tensor logits =
      Scratch(at_.logits, DType::kF32, count, LogitStride(spec_)).Columns(0, spec_.vocab);
  backend_.Gather({.table = residual_, .ids = rows, .out = x});
  backend_.Norm(NormOf(x, weights_.final_norm, normed));
  if (observer.hidden) observer.hidden(static_cast<int>(spec_.layers.size()), normed);
  backend_.MatMul({.x = normed, .weight = weights_.lm_head, .bias = {}, .out = logits});
  return logits;
}

}  // namespace octavo
