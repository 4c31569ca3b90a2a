#include "models/weights.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <random>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "base/thread_pool.h"
#include "io/json.h"
#include "kernels/mxfp4.h"
#include "kv/scale_names.h"
#include "models/families/family.h"
#include "models/widen.h"

namespace octavo {
namespace {

using Shape = std::initializer_list<int64_t>;

bool HasShape(const Tensor& tensor, Shape shape) {
  return tensor.rank == static_cast<int>(shape.size()) &&
         std::equal(shape.begin(), shape.end(), tensor.shape.begin());
}

std::string ShapeText(Shape shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

bool IsPlain(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF32;
}

// The index-th matrix (or vector) of a stack.
Tensor Slice(const Tensor& stack, int64_t index) {
  Tensor out = stack;
  out.rank = stack.rank - 1;
  int64_t size = 1;
  for (int i = 0; i < out.rank; ++i) size *= out.shape[i] = stack.shape[i + 1];
  out.shape[out.rank] = 0;
  out.row_stride = out.columns();
  out.data = static_cast<std::byte*>(stack.data) +
             index * size * static_cast<int64_t>(SizeOf(stack.dtype));
  return out;
}

class Loader {
 public:
  Loader(const ModelSpec& spec, const Checkpoint& checkpoint, bool dummy = false)
      : spec_(spec),
        checkpoint_(checkpoint),
        dummy_(dummy),
        names_(FindFamily(spec.family).experts),
        threads_(0) {}

  Weights Load() {
    if (dummy_)
      MakeNoise();
    else
      FindPrefix();
    weights_.embedding = Plain(prefix_ + "embed_tokens.weight", {spec_.vocab, spec_.hidden});
    weights_.final_norm = Plain(prefix_ + "norm.weight", {spec_.hidden});
    if (spec_.tie_word_embeddings) {
      weights_.lm_head = weights_.embedding;
      used_.insert(head_ + ".weight");  // some files hold a copy
    } else {
      weights_.lm_head = Linear(head_, spec_.vocab, spec_.hidden);
    }
    for (size_t i = 0; i < spec_.layers.size(); ++i) {
      weights_.layers.push_back(
          LoadLayer(spec_.layers[i], fmt::format("{}layers.{}.", prefix_, i)));
    }
    RefuseUnused();
    return std::move(weights_);
  }

 private:
  void MakeNoise() {
    if (spec_.weight_quant == WeightQuant::kMxfp4) MakeMxfp4Noise();
    int64_t largest = spec_.vocab * spec_.hidden;
    for (const LayerSpec& layer : spec_.layers) {
      const int64_t widest =
          std::max<int64_t>(layer.heads * layer.head_dim, layer.ffn.intermediate);
      largest = std::max({largest, widest * spec_.hidden, layer.ffn.experts * spec_.hidden});
    }
    noise_ = Allocate(DType::kBF16, {largest}).data;
    std::vector<uint16_t> some(1 << 16);
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, 0.02f);
    for (uint16_t& value : some) value = FloatToBF16(normal(random));
    // Turned a little each time, or rows of a power of two would all be the same.
    for (int64_t begin = 0; begin < largest; begin += std::ssize(some)) {
      std::rotate(some.begin(), some.begin() + 4099, some.end());
      std::copy_n(some.begin(), std::min<int64_t>(std::ssize(some), largest - begin),
                  static_cast<uint16_t*>(noise_) + begin);
    }
  }

  void MakeMxfp4Noise() {
    int64_t largest = 0;
    for (const LayerSpec& layer : spec_.layers) {
      const int64_t inner = layer.ffn.intermediate;
      largest =
          std::max({largest, mxfp4::Bytes(inner, spec_.hidden), mxfp4::Bytes(spec_.hidden, inner)});
    }
    mxfp4_noise_ = Allocate(DType::kU8, {largest}).data;
    auto* tile = static_cast<uint8_t*>(mxfp4_noise_);
    std::mt19937 random(1);
    constexpr uint8_t kScale = 120;  // all codes are alike: a deviation of 2.9 * 2^-7
    for (uint8_t* end = tile + largest; tile < end; tile += mxfp4::kTileBytes) {
      for (int i = 0; i < mxfp4::kCodeBytes; ++i) tile[i] = static_cast<uint8_t>(random());
      std::fill(tile + mxfp4::kCodeBytes, tile + mxfp4::kTileBytes, kScale);
    }
  }

  [[noreturn]] void Fail(const std::string& tensor, const std::string& what,
                         ErrorCode code = ErrorCode::kInvalidArgument) const {
    throw Error(code, fmt::format("{}: tensor {}: {}", checkpoint_.FileOf(tensor).string(),
                                  Quote(tensor), what));
  }

  // Text models stand alone, or inside a multimodal model under either of two names.
  void FindPrefix() {
    struct Place {
      const char *prefix, *head;
    };
    constexpr Place kPlaces[] = {{"model.", "lm_head"},
                                 {"language_model.model.", "language_model.lm_head"},
                                 {"model.language_model.", "lm_head"}};
    for (const Place& place : kPlaces) {
      if (!checkpoint_.Find(std::string(place.prefix) + "embed_tokens.weight")) continue;
      prefix_ = place.prefix;
      head_ = place.head;
      return;
    }
    Fail("model.embed_tokens.weight",
         "missing (nor is it under language_model.model. or model.language_model.)");
  }

  Tensor Require(const std::string& name, Shape shape) {
    if (dummy_) return Tensor(noise_, DType::kBF16, shape);
    const Tensor* tensor = checkpoint_.Find(name);
    if (!tensor)
      Fail(name, fmt::format("missing, expected {}", ShapeText(shape)), ErrorCode::kNotFound);
    if (!HasShape(*tensor, shape)) {
      Fail(name, fmt::format("expected {}, found {}", ShapeText(shape), ShapeString(*tensor)));
    }
    used_.insert(name);
    return *tensor;
  }

  Tensor Plain(const std::string& name, Shape shape) {
    const Tensor tensor = Require(name, shape);
    if (!IsPlain(tensor.dtype)) {
      Fail(name,
           fmt::format("expected bfloat16, float16 or float32, found {}", ShapeString(tensor)));
    }
    return tensor;
  }

  Tensor PlainIf(bool wanted, const std::string& name, Shape shape) {
    return wanted ? Plain(name, shape) : Tensor();
  }

  // A matrix of a linear layer: as it is, or float-8 with scales, widened.
  Tensor Linear(const std::string& module, int64_t out, int64_t in) {
    const std::string name = module + ".weight";
    const Tensor tensor = Require(name, {out, in});
    if (tensor.dtype != DType::kF8E4M3) return Plain(name, {out, in});
    if (spec_.weight_quant != WeightQuant::kFp8) {
      Fail(name,
           fmt::format("{}, but the config names no float8 quantisation", ShapeString(tensor)));
    }
    const Tensor scales = Scales(module + ".weight_scale", out);
    used_.insert(module + ".input_scale");  // of activations, which are not quantised here
    const Tensor widened = Allocate(DType::kBF16, {out, in});
    WidenFp8(tensor, scales, widened, threads_);
    return widened;
  }

  // One scale, or one per row ([out] or [out, 1]): finite and positive.
  Tensor Scales(const std::string& name, int64_t out) {
    const Tensor* found = checkpoint_.Find(name);
    if (!found)
      Fail(name, fmt::format("missing, expected [1] or [{}, 1]", out), ErrorCode::kNotFound);
    const Tensor& scales = *found;
    const bool fits = HasShape(scales, {1}) || HasShape(scales, {1, 1}) ||
                      HasShape(scales, {out}) || HasShape(scales, {out, 1});
    if (!fits || !IsPlain(scales.dtype)) {
      Fail(name, fmt::format("expected [1] or [{}, 1] of float32, bfloat16 or float16, found {}",
                             out, ShapeString(scales)));
    }
    for (int64_t i = 0; i < scales.size(); ++i) {
      const float scale = ScaleAt(scales, i);
      if (!(scale > 0 && std::isfinite(scale))) {
        Fail(name, fmt::format("expected finite positive scales, found {} at {}", scale, i));
      }
    }
    used_.insert(name);
    return scales;
  }

  Tensor Allocate(DType dtype, std::initializer_list<int64_t> shape) {
    Tensor tensor(nullptr, dtype, shape);
    const int64_t bytes = WeightBytes(dtype, tensor);
    try {
      tensor.data = weights_.owned.emplace_back(static_cast<size_t>(bytes)).data();
    } catch (const std::bad_alloc&) {
      throw Error(ErrorCode::kResourceExhausted,
                  fmt::format("out of memory for {} MiB of weights", bytes >> 20));
    }
    return tensor;
  }

  LayerWeights LoadLayer(const LayerSpec& layer, const std::string& prefix) {
    const int64_t hidden = spec_.hidden;
    const int64_t q_size = int64_t{layer.heads} * layer.head_dim,
                  kv_size = int64_t{layer.kv_heads} * layer.head_dim;
    const std::string attention = prefix + "self_attn.";
    LayerWeights w;
    w.input_norm = Plain(prefix + "input_layernorm.weight", {hidden});
    w.post_attention_norm = Plain(prefix + "post_attention_layernorm.weight", {hidden});
    w.pre_ffn_norm =
        PlainIf(layer.post_norms, prefix + "pre_feedforward_layernorm.weight", {hidden});
    w.post_ffn_norm =
        PlainIf(layer.post_norms, prefix + "post_feedforward_layernorm.weight", {hidden});
    w.q = Linear(attention + "q_proj", q_size, hidden);
    w.k = Linear(attention + "k_proj", kv_size, hidden);
    w.v = Linear(attention + "v_proj", kv_size, hidden);
    w.o = Linear(attention + "o_proj", hidden, q_size);
    w.q_bias = PlainIf(layer.qkv_bias, attention + "q_proj.bias", {q_size});
    w.k_bias = PlainIf(layer.qkv_bias, attention + "k_proj.bias", {kv_size});
    w.v_bias = PlainIf(layer.qkv_bias, attention + "v_proj.bias", {kv_size});
    w.o_bias = PlainIf(layer.out_bias, attention + "o_proj.bias", {hidden});
    w.q_norm = PlainIf(layer.qk_norm, attention + "q_norm.weight", {layer.head_dim});
    w.k_norm = PlainIf(layer.qk_norm, attention + "k_norm.weight", {layer.head_dim});
    w.sinks = PlainIf(layer.sinks, attention + "sinks", {layer.heads});
    if (layer.ffn.experts == 0) {
      w.dense = LoadExpert(layer.ffn, prefix + "mlp.", "gate_proj", "up_proj", "down_proj");
    } else {
      LoadExperts(layer.ffn, prefix, w);
    }
    return w;
  }

  Expert LoadExpert(const FfnSpec& ffn, const std::string& prefix, std::string_view gate,
                    std::string_view up, std::string_view down) {
    const int64_t hidden = spec_.hidden, inner = ffn.intermediate;
    Expert e;
    e.gate = Linear(fmt::format("{}{}", prefix, gate), inner, hidden);
    e.up = Linear(fmt::format("{}{}", prefix, up), inner, hidden);
    e.down = Linear(fmt::format("{}{}", prefix, down), hidden, inner);
    e.gate_bias = PlainIf(ffn.bias, fmt::format("{}{}.bias", prefix, gate), {inner});
    e.up_bias = PlainIf(ffn.bias, fmt::format("{}{}.bias", prefix, up), {inner});
    e.down_bias = PlainIf(ffn.bias, fmt::format("{}{}.bias", prefix, down), {hidden});
    return e;
  }

  void LoadExperts(const FfnSpec& ffn, const std::string& prefix, LayerWeights& w) {
    const std::string router = prefix + std::string(names_.router);
    const std::string experts = prefix + std::string(names_.experts) + ".";
    w.router = Linear(router, ffn.experts, spec_.hidden);
    w.router_bias = PlainIf(ffn.bias, router + ".bias", {ffn.experts});
    const bool packed = spec_.weight_quant == WeightQuant::kMxfp4;
    if (packed && (spec_.hidden % mxfp4::kBlock != 0 || ffn.intermediate % mxfp4::kBlock != 0)) {
      Fail(experts + "gate_up_proj_blocks",
           fmt::format("MXFP4 needs hidden_size {} and intermediate_size {} in whole blocks of {}",
                       spec_.hidden, ffn.intermediate, mxfp4::kBlock));
    }
    if (names_.gate.empty() && !dummy_) {
      LoadStacks(ffn, experts, w);
      return;
    }
    for (int e = 0; e < ffn.experts; ++e) {
      w.experts.push_back(
          LoadExpert(ffn, fmt::format("{}{}.", experts, e), names_.gate, names_.up, names_.down));
      if (!packed) continue;
      Expert& expert = w.experts.back();
      for (Tensor* matrix : {&expert.gate, &expert.up, &expert.down})
        *matrix = Tensor(mxfp4_noise_, DType::kMxfp4, {matrix->rows(), matrix->columns()});
    }
  }

  // gpt_oss: all experts of a layer in one tensor, gate and up interleaved.
  void LoadStacks(const FfnSpec& ffn, const std::string& prefix, LayerWeights& w) {
    const int64_t experts = ffn.experts, hidden = spec_.hidden, inner = ffn.intermediate;
    const Tensor gate_up_bias = Plain(prefix + "gate_up_proj_bias", {experts, 2 * inner});
    const Tensor down_bias = Plain(prefix + "down_proj_bias", {experts, hidden});
    const Tensor gate_bias = Allocate(gate_up_bias.dtype, {experts, inner, 1});
    const Tensor up_bias = Allocate(gate_up_bias.dtype, {experts, inner, 1});
    w.experts.resize(experts);
    for (int64_t e = 0; e < experts; ++e) {
      const Tensor from = gate_up_bias.Rows(e, e + 1);
      TransposeColumns(from, 0, 2, Slice(gate_bias, e));
      TransposeColumns(from, 1, 2, Slice(up_bias, e));
      w.experts[e].gate_bias = AsVector(Slice(gate_bias, e));
      w.experts[e].up_bias = AsVector(Slice(up_bias, e));
      w.experts[e].down_bias = Slice(down_bias, e);
    }
    if (spec_.weight_quant == WeightQuant::kMxfp4) {
      LoadMxfp4Stacks(prefix, hidden, inner, w.experts);
    } else {
      LoadPlainStacks(prefix, hidden, inner, w.experts);
    }
  }

  // [experts, in, 2 * out] and [experts, out, in]: transposed.
  void LoadPlainStacks(const std::string& prefix, int64_t hidden, int64_t inner,
                       std::vector<Expert>& experts) {
    const int64_t count = static_cast<int64_t>(experts.size());
    const Tensor gate_up = Plain(prefix + "gate_up_proj", {count, hidden, 2 * inner});
    const Tensor down = Plain(prefix + "down_proj", {count, inner, hidden});
    AllocateExperts(gate_up.dtype, down.dtype, hidden, inner, experts);
    threads_.ForEach(count, [&](int64_t e, int) {
      TransposeColumns(Slice(gate_up, e), 0, 2, experts[e].gate);
      TransposeColumns(Slice(gate_up, e), 1, 2, experts[e].up);
      TransposeColumns(Slice(down, e), 0, 1, experts[e].down);
    });
  }

  // [experts, 2 * out, in / 32, 16] blocks and their scales: [out, in] already. Every other row is
  // gate's.
  void LoadMxfp4Stacks(const std::string& prefix, int64_t hidden, int64_t inner,
                       std::vector<Expert>& experts) {
    const int64_t count = static_cast<int64_t>(experts.size());
    const Tensor gate_up =
        Bytes(prefix + "gate_up_proj_blocks", {count, 2 * inner, hidden / 32, 16});
    const Tensor gate_up_scales =
        Mxfp4Scales(prefix + "gate_up_proj_scales", {count, 2 * inner, hidden / 32});
    const Tensor down = Bytes(prefix + "down_proj_blocks", {count, hidden, inner / 32, 16});
    const Tensor down_scales =
        Mxfp4Scales(prefix + "down_proj_scales", {count, hidden, inner / 32});
    // Tiles hold scales up to 2, and published models' are far below. A layer with a larger one
    // takes four times the memory, and is right.
    const bool fits =
        std::max(MostScale(gate_up_scales), MostScale(down_scales)) <= mxfp4::kMostScale;
    const DType dtype = fits ? DType::kMxfp4 : DType::kBF16;
    const auto put = fits ? PackMxfp4 : WidenMxfp4;
    AllocateExperts(dtype, dtype, hidden, inner, experts);
    threads_.ForEach(count, [&](int64_t e, int) {
      const Tensor blocks = Slice(gate_up, e), scales = Slice(gate_up_scales, e);
      put(blocks, scales, 0, 2, experts[e].gate);
      put(blocks, scales, 1, 2, experts[e].up);
      put(Slice(down, e), Slice(down_scales, e), 0, 1, experts[e].down);
    });
  }

  static int MostScale(const Tensor& scales) {
    const auto* codes = static_cast<const uint8_t*>(scales.data);
    return *std::max_element(codes, codes + scales.size());
  }

  Tensor Mxfp4Scales(const std::string& name, Shape shape) {
    const Tensor scales = Bytes(name, shape);
    if (const int most = MostScale(scales); most > kMostMxfp4Scale) {
      Fail(name, fmt::format("expected scales up to 2^125 (code {}), found code {}",
                             kMostMxfp4Scale, most));
    }
    return scales;
  }

  Tensor Bytes(const std::string& name, Shape shape) {
    const Tensor tensor = Require(name, shape);
    if (tensor.dtype != DType::kU8)
      Fail(name, fmt::format("expected uint8, found {}", ShapeString(tensor)));
    return tensor;
  }

  void AllocateExperts(DType gate_up, DType down, int64_t hidden, int64_t inner,
                       std::vector<Expert>& experts) {
    for (Expert& expert : experts) {
      expert.gate = Allocate(gate_up, {inner, hidden});
      expert.up = Allocate(gate_up, {inner, hidden});
      expert.down = Allocate(down, {hidden, inner});
    }
  }

  static Tensor AsVector(const Tensor& column) {
    return Tensor(column.data, column.dtype, {column.rows()});
  }

  // Tensors that change nothing here: rotary tables, which are computed; scales of the KV cache,
  // which kv/scales reads; and what surrounds the text model of a multimodal file.
  bool IsHarmless(std::string_view name) const {
    constexpr std::string_view kRotary[] = {".rotary_emb.inv_freq", ".rotary_emb.cos_cached",
                                            ".rotary_emb.sin_cached"};
    for (const std::string_view suffix : kRotary) {
      if (name.ends_with(suffix)) return true;
    }
    constexpr std::string_view kVision[] = {"vision_tower.", "multi_modal_projector.",
                                            "model.vision_tower.", "model.multi_modal_projector."};
    if (prefix_ != "model.") {
      for (const std::string_view start : kVision) {
        if (name.starts_with(start)) return true;
      }
    }
    return IsKvScale(name);
  }

  bool IsKvScale(std::string_view name) const {
    const ScaleName scale = ParseScaleName(name);
    const bool known = scale.role != ScaleRole::kNone && scale.role != ScaleRole::kUnknown;
    return known && !scale.other_part && scale.layer < static_cast<int>(spec_.layers.size());
  }

  void RefuseUnused() const {
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      if (used_.contains(name) || IsHarmless(name)) continue;
      Fail(name, fmt::format("{} is not a tensor of this {} model of {} layers",
                             ShapeString(tensor), spec_.family, spec_.layers.size()));
    }
  }

  const ModelSpec& spec_;
  const Checkpoint& checkpoint_;
  const bool dummy_;
  void *noise_ = nullptr, *mxfp4_noise_ = nullptr;
  const ExpertNames& names_;
  ThreadPool threads_;
  std::string prefix_, head_;
  std::set<std::string, std::less<>> used_;
  Weights weights_;
};

}  // namespace

int64_t WeightBytes(DType dtype, const Tensor& tensor) {
  if (dtype == DType::kMxfp4) return mxfp4::Bytes(tensor.rows(), tensor.columns());
  return tensor.size() * static_cast<int64_t>(SizeOf(dtype));
}

Weights LoadWeights(const ModelSpec& spec, const Checkpoint& checkpoint) {
  return Loader(spec, checkpoint).Load();
}

Weights MakeDummyWeights(const ModelSpec& spec) {
  return Loader(spec, Checkpoint::Empty({}), /*dummy=*/true).Load();
}

}  // namespace octavo
