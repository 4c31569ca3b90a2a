// Llama 2 and 3, and the many models that publish themselves as Llama.
#include "models/families/family.h"

namespace octavo {
namespace {

void ParseLlama(const ConfigReader& config, ModelSpec& spec) {
  const bool attention_bias = config.Bool("attention_bias", false);
  for (LayerSpec& layer : spec.layers) {
    layer.qkv_bias = layer.out_bias = attention_bias;
    layer.ffn.bias = config.Bool("mlp_bias", false);
  }
  SetRopes(config, {.theta = 10000}, spec);
}

constexpr std::string_view kArchitectures[] = {"LlamaForCausalLM", "LLaMAForCausalLM"};

}  // namespace

constinit const Family kLlama = {
    .model_type = "llama",
    .architectures = kArchitectures,
    .defaults = {.max_position_embeddings = 2048, .norm_eps = 1e-6, .bos = 1, .eos = 2},
    .parse = ParseLlama,
};

}  // namespace octavo
