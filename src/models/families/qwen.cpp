// Qwen2 and 2.5 (biases on q, k and v), Qwen3 (norms of q and k instead), Qwen3-MoE.
#include "models/families/family.h"

#include <algorithm>

#include <fmt/format.h>

namespace octavo {
namespace {

// Layers from max_window_layers on slide, if use_sliding_window says so; sliding_window alone means
// nothing.
void SetQwenWindows(const ConfigReader& config, ModelSpec& spec) {
  const auto window = config.NullableInt("sliding_window", 1, kMostWindow, 4096);
  const bool use = config.Bool("use_sliding_window", false) && window;
  const int64_t first = config.NullableInt("max_window_layers", 0, kMostWindow, 28).value_or(28);
  SetWindows(
      config, use ? window : std::nullopt, [&](int layer) { return use && layer >= first; }, spec);
}

void ParseQwen2(const ConfigReader& config, ModelSpec& spec) {
  config.Bool("attention_bias", true);  // means nothing: q, k and v have biases, o has none
  for (LayerSpec& layer : spec.layers) layer.qkv_bias = true;
  SetQwenWindows(config, spec);
  SetRopes(config, {.theta = 10000}, spec);
}

void SetQwen3Attention(const ConfigReader& config, ModelSpec& spec) {
  const bool attention_bias = config.Bool("attention_bias", false);
  for (LayerSpec& layer : spec.layers) {
    layer.qk_norm = true;
    layer.qkv_bias = layer.out_bias = attention_bias;
  }
}

void ParseQwen3(const ConfigReader& config, ModelSpec& spec) {
  SetQwen3Attention(config, spec);
  SetQwenWindows(config, spec);
  SetRopes(config, {.theta = 10000}, spec);
}

// num_experts in the hub's files, num_local_experts in transformers v5's.
int64_t ReadExperts(const ConfigReader& config) {
  const int64_t experts = config.Int("num_experts", 0, kMostExperts,
                                     config.Int("num_local_experts", 0, kMostExperts, 128));
  if (config.Int("num_local_experts", 0, kMostExperts, experts) != experts) {
    config.Fail("num_local_experts", fmt::format("contradicts num_experts {}", experts));
  }
  return experts;
}

void ParseQwen3Moe(const ConfigReader& config, ModelSpec& spec) {
  // transformers ignores max_window_layers here, Qwen's own code does not: only files where it
  // cannot matter are read.
  auto window = config.NullableInt("sliding_window", 1, kMostWindow, 4096);
  if (!config.Bool("use_sliding_window", false)) window.reset();
  if (window && !config.Has("layer_types") &&
      config.Int("max_window_layers", 0, kMostWindow, int64_t{0}) != 0) {
    config.Fail("use_sliding_window", "true with max_window_layers is not supported",
                ErrorCode::kUnsupported);
  }
  SetQwen3Attention(config, spec);
  SetOneWindow(config, window, spec);
  SetRopes(config, {.theta = 10000}, spec);

  const int64_t experts = ReadExperts(config);
  const int64_t intermediate = config.Int("moe_intermediate_size", 1, kMostIntermediate, 768);
  const int64_t step = config.Int("decoder_sparse_step", 1, kMostWindow, 1);
  const bool normalize = config.Bool("norm_topk_prob", false);
  const Json* dense_layers = config.Array("mlp_only_layers");
  if (dense_layers) {
    for (const Json& layer : *dense_layers) {
      if (!AsInt(layer, 0, static_cast<int64_t>(spec.layers.size()) - 1)) {
        config.FailExpected("mlp_only_layers", fmt::format("layers below {}", spec.layers.size()),
                            &layer);
      }
    }
  }
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const bool dense = dense_layers && std::find(dense_layers->begin(), dense_layers->end(), i) !=
                                           dense_layers->end();
    if (dense || experts == 0 || (static_cast<int64_t>(i) + 1) % step != 0) continue;
    LayerSpec& layer = spec.layers[i];
    SetExperts(config, experts, 8, layer);
    layer.ffn.intermediate = intermediate;
    layer.ffn.normalize_topk = normalize;
  }
}

constexpr std::string_view kQwen2Architectures[] = {"Qwen2ForCausalLM"};
constexpr std::string_view kQwen3Architectures[] = {"Qwen3ForCausalLM"};
constexpr std::string_view kQwen3MoeArchitectures[] = {"Qwen3MoeForCausalLM"};

}  // namespace

constinit const Family kQwen2 = {
    .model_type = "qwen2",
    .architectures = kQwen2Architectures,
    .defaults = {.kv_heads = 32, .max_position_embeddings = 32768},
    .parse = ParseQwen2,
};

constinit const Family kQwen3 = {
    .model_type = "qwen3",
    .architectures = kQwen3Architectures,
    .defaults = {.kv_heads = 32, .head_dim = 128, .max_position_embeddings = 32768},
    .parse = ParseQwen3,
};

constinit const Family kQwen3Moe = {
    .model_type = "qwen3_moe",
    .architectures = kQwen3MoeArchitectures,
    .defaults = {.kv_heads = 4, .max_position_embeddings = 32768},
    .experts = {.router = "mlp.gate",
                .experts = "mlp.experts",
                .gate = "gate_proj",
                .up = "up_proj",
                .down = "down_proj"},
    .parse = ParseQwen3Moe,
};

}  // namespace octavo
