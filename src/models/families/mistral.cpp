// Mistral and Mixtral: Llama without biases, perhaps with one window for all layers; Mixtral with
// experts.
#include "models/families/family.h"

namespace octavo {
namespace {

// With layer_types, transformers takes the file for a Ministral: windows by layer.
void ParseMistral(const ConfigReader& config, ModelSpec& spec) {
  const auto window = config.NullableInt("sliding_window", 1, kMostWindow, 4096);
  SetWindows(
      config, window, [&](int) { return window.has_value(); }, spec);
  SetRopes(config, {.theta = 10000}, spec);
}

void ParseMixtral(const ConfigReader& config, ModelSpec& spec) {
  SetOneWindow(config, config.NullableInt("sliding_window", 1, kMostWindow), spec);
  SetRopes(config, {.theta = 1000000}, spec);
  const int64_t experts = config.Int("num_local_experts", 1, kMostExperts, 8);
  for (LayerSpec& layer : spec.layers) SetExperts(config, experts, 2, layer);
}

constexpr std::string_view kMistralArchitectures[] = {"MistralForCausalLM"};
constexpr std::string_view kMixtralArchitectures[] = {"MixtralForCausalLM"};

}  // namespace

constinit const Family kMistral = {
    .model_type = "mistral",
    .architectures = kMistralArchitectures,
    .defaults =
        {.kv_heads = 8, .max_position_embeddings = 131072, .norm_eps = 1e-6, .bos = 1, .eos = 2},
    .parse = ParseMistral,
};

constinit const Family kMixtral = {
    .model_type = "mixtral",
    .architectures = kMixtralArchitectures,
    .defaults =
        {.kv_heads = 8, .max_position_embeddings = 131072, .norm_eps = 1e-5, .bos = 1, .eos = 2},
    .experts = {.router = "block_sparse_moe.gate",
                .experts = "block_sparse_moe.experts",
                .gate = "w1",
                .up = "w3",
                .down = "w2"},
    .parse = ParseMixtral,
};

}  // namespace octavo
