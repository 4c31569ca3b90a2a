// Gemma 2 (soft caps, every other layer with a window) and Gemma 3's text model (norms of q and k,
// two rope tables).
#include "models/families/family.h"

#include <cmath>

namespace octavo {
namespace {

// Both: norms with weight + 1 around attention and FFN, scaled embeddings, an attention scale of
// its own.
void SetCommon(const ConfigReader& config, std::optional<double> attention_cap,
               std::optional<double> final_cap, ModelSpec& spec) {
  if (config.Has("use_bidirectional_attention") &&
      config.Bool("use_bidirectional_attention", false)) {
    config.Fail("use_bidirectional_attention", "true is not supported", ErrorCode::kUnsupported);
  }
  constexpr double kMostCap = 1e6;
  const double cap =
      config.NullableNumber("attn_logit_softcapping", 1e-3, kMostCap, attention_cap).value_or(0);
  const double query_scalar = config.Number("query_pre_attn_scalar", 1e-3, 1e9, 256);
  const bool attention_bias = config.Bool("attention_bias", false);
  for (LayerSpec& layer : spec.layers) {
    layer.attention_scale = static_cast<float>(std::pow(query_scalar, -0.5));
    layer.soft_cap = static_cast<float>(cap);
    layer.qkv_bias = layer.out_bias = attention_bias;
    layer.post_norms = true;
  }
  spec.final_soft_cap = static_cast<float>(
      config.NullableNumber("final_logit_softcapping", 1e-3, kMostCap, final_cap).value_or(0));
  spec.norm_offset = 1;
  spec.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(spec.hidden)));
}

void ParseGemma2(const ConfigReader& config, ModelSpec& spec) {
  SetCommon(config, 50.0, 30.0, spec);
  const auto window = config.NullableInt("sliding_window", 1, kMostWindow, 4096);
  SetWindows(
      config, window, [](int layer) { return layer % 2 == 0; }, spec);
  SetRopes(config, {.theta = 10000}, spec);
}

// The layers between full ones: 6 means five with a window, then a full one.
int64_t WindowPattern(const ConfigReader& config) {
  const int64_t hidden_field =
      config.Int("_sliding_window_pattern", 1, kMostWindow, 6);  // written by transformers v5
  return config.Int("sliding_window_pattern", 1, kMostWindow, hidden_field);
}

void ParseGemma3(const ConfigReader& config, ModelSpec& spec) {
  SetCommon(config, std::nullopt, std::nullopt, spec);
  for (LayerSpec& layer : spec.layers) layer.qk_norm = true;
  const int64_t pattern = WindowPattern(config);
  const auto window = config.NullableInt("sliding_window", 1, kMostWindow, 4096);
  SetWindows(
      config, window, [&](int layer) { return (layer + 1) % pattern != 0; }, spec);

  // Window layers rotate with a table of their own: rope_parameters.sliding_attention, or in the
  // hub's dialect rope_local_base_freq, which rope_scaling does not touch.
  const RopeParameters full =
      ReadRope(config, "full_attention", {.theta = 1000000}, spec.max_position_embeddings);
  RopeParameters local = {.theta = config.Number("rope_local_base_freq", 1 + 1e-6, 1e15, 10000)};
  const auto by_type = config.Object("rope_parameters");
  if (by_type && (by_type->Has("full_attention") || by_type->Has("sliding_attention"))) {
    local = ReadRope(config, "sliding_attention", {.theta = 10000}, spec.max_position_embeddings);
  }
  for (LayerSpec& layer : spec.layers) {
    layer.rope = AddRope(spec, MakeRope(layer.window ? local : full, layer.head_dim));
  }
}

constexpr std::string_view kGemma2Architectures[] = {"Gemma2ForCausalLM"};
constexpr std::string_view kGemma3Architectures[] = {"Gemma3ForCausalLM",
                                                     "Gemma3ForConditionalGeneration"};

}  // namespace

constinit const Family kGemma2 = {
    .model_type = "gemma2",
    .architectures = kGemma2Architectures,
    .defaults = {.vocab = 256000,
                 .heads = 8,
                 .kv_heads = 4,
                 .head_dim = 256,
                 .max_position_embeddings = 8192,
                 .tie_word_embeddings = true,
                 .activation_key = "hidden_activation",
                 .activation = "gelu_pytorch_tanh",
                 .bos = 2,
                 .eos = 1},
    .parse = ParseGemma2,
};

constinit const Family kGemma3Text = {
    .model_type = "gemma3_text",
    .architectures = kGemma3Architectures,
    .defaults = {.vocab = 262208,
                 .heads = 8,
                 .kv_heads = 4,
                 .head_dim = 256,
                 .max_position_embeddings = 131072,
                 .tie_word_embeddings = true,
                 .activation_key = "hidden_activation",
                 .activation = "gelu_pytorch_tanh",
                 .bos = 2,
                 .eos = 1},
    .parse = ParseGemma3,
};

}  // namespace octavo
