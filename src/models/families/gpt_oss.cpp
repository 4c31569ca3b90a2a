// gpt-oss: attention sinks, windows on every other layer, yarn, and experts with biases and a
// clamped SwiGLU.
#include "models/families/family.h"

#include <cmath>

#include <fmt/format.h>

namespace octavo {
namespace {

void ParseGptOss(const ConfigReader& config, ModelSpec& spec) {
  const auto window = config.NullableInt("sliding_window", 1, kMostWindow, 128);
  SetWindows(
      config, window, [](int layer) { return layer % 2 == 0; }, spec);
  SetRopes(config,
           {.type = RopeType::kYarn,
            .theta = 150000,
            .factor = 32,
            .original_max_position_embeddings = 4096,
            .beta_fast = 32,
            .beta_slow = 1,
            .attention_factor = 0.1 * std::log(32.0) + 1,
            .truncate = false},
           spec);

  constexpr double kAlpha = 1.702;  // fixed in Activation::kSwigluOai
  if (config.Number("swiglu_alpha", 0, 1e6, kAlpha) != kAlpha) {
    config.Fail("swiglu_alpha", fmt::format("only {} is supported", kAlpha),
                ErrorCode::kUnsupported);
  }
  const double limit = config.Number("swiglu_limit", 1e-3, 1e6, 7);
  const bool attention_bias = config.Bool("attention_bias", true);
  const int64_t experts = config.Int("num_local_experts", 1, kMostExperts, 128);
  // openai's name for num_experts_per_tok; published files have both.
  const int64_t top_k = config.Int("experts_per_token", 1, kMostExperts, 4);
  for (LayerSpec& layer : spec.layers) {
    layer.sinks = true;
    layer.qkv_bias = layer.out_bias = attention_bias;
    SetExperts(config, experts, top_k, layer);
    if (config.Find("experts_per_token") && layer.ffn.top_k != top_k) {
      config.Fail("experts_per_token",
                  fmt::format("{} contradicts num_experts_per_tok {}", top_k, layer.ffn.top_k));
    }
    layer.ffn.activation = Activation::kSwigluOai;
    layer.ffn.limit = static_cast<float>(limit);
    layer.ffn.softmax_first = false;
    layer.ffn.bias = true;
  }
}

constexpr std::string_view kArchitectures[] = {"GptOssForCausalLM"};

}  // namespace

constinit const Family kGptOss = {
    .model_type = "gpt_oss",
    .architectures = kArchitectures,
    .defaults = {.kv_heads = 8,
                 .head_dim = 64,
                 .max_position_embeddings = 131072,
                 .norm_eps = 1e-5},
    .experts = {.router = "mlp.router", .experts = "mlp.experts"},
    .parse = ParseGptOss,
};

}  // namespace octavo
