// Configs that must be refused, with the file and the field in the message.
#include <string>

#include <gtest/gtest.h>

#include "io/testing.h"
#include "models/config.h"
#include "models/testing.h"

namespace octavo {
namespace {

std::string Message(const Json& config) {
  return ErrorMessage([&] { ParseConfig(config, "config.json"); });
}

// One field of a small config changed (or, without a value, removed): the message names the field.
struct Mutation {
  const char *family, *field, *value, *message;
};

class BadConfig : public testing::TestWithParam<Mutation> {};

TEST_P(BadConfig, IsRefused) {
  const Mutation& m = GetParam();
  Json config = SmallConfig(m.family);
  if (m.value) {
    config[m.field] = Json::parse(m.value);
  } else {
    config.erase(m.field);
  }
  const std::string message = Message(config);
  EXPECT_TRUE(message.starts_with("config.json: ")) << message;
  EXPECT_NE(message.find(m.message), message.npos)
      << m.field << " = " << (m.value ? m.value : "nothing") << " -> " << message;
  EXPECT_EQ(message.find('\n'), message.npos) << message;
}

const Mutation kSizes[] = {
    {"llama", "hidden_size", nullptr,
     "hidden_size: expected an integer from 1 to 1048576, found nothing"},
    {"llama", "hidden_size", "null",
     "hidden_size: expected an integer from 1 to 1048576, found null"},
    {"llama", "hidden_size", "-64",
     "hidden_size: expected an integer from 1 to 1048576, found -64"},
    {"llama", "hidden_size", "0", "hidden_size: expected"},
    {"llama", "hidden_size", "64.0", "hidden_size: expected"},
    {"llama", "hidden_size", "\"64\"",
     "hidden_size: expected an integer from 1 to 1048576, found '64'"},
    {"llama", "hidden_size", "18446744073709551615", "hidden_size: expected"},
    {"llama", "hidden_size", "1e300", "hidden_size: expected"},
    {"llama", "hidden_size", "[64]", "hidden_size: expected"},
    {"llama", "hidden_size", "true", "hidden_size: expected"},
    {"llama", "vocab_size", nullptr, "vocab_size: expected"},
    {"llama", "vocab_size", "4294967296", "vocab_size: expected"},
    {"llama", "num_hidden_layers", nullptr, "num_hidden_layers: expected"},
    {"llama", "num_hidden_layers", "1000000000", "num_hidden_layers: expected"},
    {"llama", "intermediate_size", "-1", "intermediate_size: expected"},
    {"llama", "num_attention_heads", nullptr, "num_attention_heads: expected"},
    {"llama", "num_attention_heads", "0", "num_attention_heads: expected"},
    {"llama", "num_key_value_heads", "3",
     "num_key_value_heads: 3 does not divide num_attention_heads 4"},
    {"llama", "num_key_value_heads", "8", "num_key_value_heads: 8 does not divide"},
    {"llama", "head_dim", "15", "head_dim: 15 is odd"},
    {"llama", "head_dim", "100000", "head_dim: expected"},
    {"llama", "max_position_embeddings", "-1", "max_position_embeddings: expected"},
    {"llama", "rms_norm_eps", "0", "rms_norm_eps: expected a number"},
    {"llama", "rms_norm_eps", "-1e-6", "rms_norm_eps: expected a number"},
    {"llama", "rms_norm_eps", "\"1e-5\"", "rms_norm_eps: expected a number"},
    {"llama", "rms_norm_eps", "null", "rms_norm_eps: expected a number"},
    {"llama", "bos_token_id", "-1", "bos_token_id: expected"},
    {"llama", "eos_token_id", "32",
     "eos_token_id: expected token ids below vocab_size 32, found 32"},
    {"llama", "eos_token_id", "[2, -1]",
     "eos_token_id: expected token ids below vocab_size 32, found -1"},
    {"llama", "eos_token_id", "\"</s>\"", "eos_token_id: expected"},
    {"llama", "tie_word_embeddings", "1", "tie_word_embeddings: expected true or false, found 1"},
    {"llama", "attention_bias", "\"no\"", "attention_bias: expected true or false"},
    {"llama", "torch_dtype", "\"float64\"", "torch_dtype: 'float64' is not supported"},
    {"llama", "dtype", "16", "dtype: expected a string, found 16"},
    {"llama", "hidden_act", "\"relu\"", "hidden_act: 'relu' is not supported"},
    {"llama", "text_config", "[]", "text_config: expected an object"},
};
INSTANTIATE_TEST_SUITE_P(Sizes, BadConfig, testing::ValuesIn(kSizes));

const Mutation kModels[] = {
    {"llama", "model_type", nullptr, "model_type: expected a string, found nothing"},
    {"llama", "model_type", "3", "model_type: expected a string, found 3"},
    {"llama", "model_type", "\"phi3\"", "model_type: 'phi3' is not supported (llama, qwen2,"},
    {"llama", "model_type", "\"a\\nb\"", "model_type: 'a\\x0ab' is not supported"},
    {"llama", "model_type", "\"deepseek_v3\"",
     "'deepseek_v3' is not supported yet (multi-head latent attention)"},
    {"llama", "architectures", R"(["LlamaForSequenceClassification"])",
     "architectures: 'LlamaForSequenceClassification' is not supported for model_type 'llama'"},
    {"llama", "architectures", R"(["Qwen2ForCausalLM"])",
     "architectures: 'Qwen2ForCausalLM' is not supported"},
    {"llama", "architectures", "[1]", "architectures: 1 is not supported"},
    {"llama", "architectures", "\"LlamaForCausalLM\"", "architectures: expected an array"},
    {"qwen3", "layer_types", R"(["full_attention"])",
     "layer_types: expected num_hidden_layers 2 entries, found 1"},
    {"qwen3", "layer_types", R"(["full_attention", "linear_attention"])",
     "'linear_attention' is not supported"},
    {"qwen3", "layer_types", R"(["full_attention", 1])", "layer_types: 1 is not supported"},
    {"qwen3", "layer_types", R"(["full_attention", "sliding_attention"])",
     "sliding_window: layer 1 has a window, and none is given"},
    {"mistral", "sliding_window", "0", "sliding_window: expected"},
    {"mistral", "sliding_window", "-4", "sliding_window: expected"},
    {"mistral", "sliding_window", "\"4\"", "sliding_window: expected"},
    {"gemma2", "sliding_window", "null", "sliding_window: layer 0 has a window, and none is given"},
    {"gemma2", "query_pre_attn_scalar", "0", "query_pre_attn_scalar: expected a number"},
    {"gemma2", "attn_logit_softcapping", "-50", "attn_logit_softcapping: expected a number"},
    {"gemma2", "use_bidirectional_attention", "true",
     "use_bidirectional_attention: true is not supported"},
    {"gemma2", "hidden_activation", "\"gelu\"", "hidden_activation: 'gelu' is not supported"},
    {"gemma3_text", "sliding_window_pattern", "0", "sliding_window_pattern: expected"},
    {"gemma3_text", "rope_local_base_freq", "-1", "rope_local_base_freq: expected"},
    {"qwen3_moe", "num_experts_per_tok", "5",
     "num_experts_per_tok: expected an integer from 1 to 4, found 5"},
    {"qwen3_moe", "num_experts_per_tok", nullptr, "num_experts_per_tok: 8 of 4 experts"},
    {"qwen3_moe", "num_experts", "-1", "num_experts: expected"},
    {"qwen3_moe", "num_experts", "1000000", "num_experts: expected"},
    {"qwen3_moe", "num_local_experts", "8", "num_local_experts: contradicts num_experts 4"},
    {"qwen3_moe", "moe_intermediate_size", "0", "moe_intermediate_size: expected"},
    {"qwen3_moe", "decoder_sparse_step", "0", "decoder_sparse_step: expected"},
    {"qwen3_moe", "mlp_only_layers", "[2]", "mlp_only_layers: expected layers below 2, found 2"},
    {"qwen3_moe", "mlp_only_layers", "{}", "mlp_only_layers: expected an array"},
    {"mixtral", "num_local_experts", "0", "num_local_experts: expected"},
    {"gpt_oss", "experts_per_token", "3", "experts_per_token: 3 contradicts num_experts_per_tok 2"},
    {"gpt_oss", "swiglu_limit", "0", "swiglu_limit: expected"},
    {"gpt_oss", "swiglu_alpha", "1", "swiglu_alpha: only 1.702 is supported"},
};
INSTANTIATE_TEST_SUITE_P(Models, BadConfig, testing::ValuesIn(kModels));

// Fields of other families: transformers ignores them, so their values must change nothing.
const Mutation kTraits[] = {
    {"llama", "layer_types", R"(["full_attention", "sliding_attention"])",
     "layer_types: an array of 2 is not supported for llama (full_attention alone is)"},
    {"llama", "layer_types", R"(["full_attention"])",
     "layer_types: expected num_hidden_layers 2 entries, found 1"},
    {"llama", "layer_types", "3", "layer_types: 3 is not supported for llama"},
    {"llama", "sliding_window", "4096",
     "sliding_window: 4096 is not supported for llama (null is)"},
    {"llama", "attn_logit_softcapping", "50.0", "attn_logit_softcapping: 50.0 is not supported"},
    {"qwen3", "final_logit_softcapping", "30.0", "final_logit_softcapping: 30.0 is not supported"},
    {"gpt_oss", "query_pre_attn_scalar", "256", "query_pre_attn_scalar: 256 is not supported"},
    {"mistral", "attention_bias", "true", "attention_bias: true is not supported for mistral"},
    {"mixtral", "attention_bias", "true", "attention_bias: true is not supported for mixtral"},
    {"qwen2", "mlp_bias", "true", "mlp_bias: true is not supported for qwen2 (false is)"},
    {"gemma2", "mlp_bias", "true", "mlp_bias: true is not supported for gemma2"},
    {"qwen2", "is_causal", "false", "is_causal: false is not supported for qwen2 (true is)"},
    {"llama", "use_bidirectional_attention", "true",
     "use_bidirectional_attention: true is not supported for llama"},
    {"llama", "swiglu_limit", "7.0", "swiglu_limit: 7.0 is not supported for llama"},
    {"mixtral", "layer_types", R"(["full_attention", "sliding_attention"])",
     "sliding_window: layer 1 has a window, and none is given"},
    {"qwen3_moe", "layer_types", R"(["full_attention", "sliding_attention"])",
     "sliding_window: layer 1 has a window, and none is given"},
    {"llama", "quantization", R"({"group_size": 64, "bits": 4})",
     "quantization: weights in MLX's formats are not supported"},
    {"llama", "compression_config", R"({"quant_method": "awq", "bits": 4})",
     "compression_config.quant_method: 'awq' is not supported"},
    {"llama", "compression_config", R"({"quant_method": "mxfp4"})",
     "compression_config.quant_method: 'mxfp4' is supported for gpt_oss only"},
};
INSTANTIATE_TEST_SUITE_P(Traits, BadConfig, testing::ValuesIn(kTraits));

TEST(Config, TraitsThatChangeNothing) {
  const Mutation cases[] = {
      {"llama", "layer_types", R"(["full_attention", "full_attention"])", ""},
      {"llama", "layer_types", "null", ""},
      {"llama", "sliding_window", "null", ""},
      {"llama", "is_causal", "true", ""},
      {"mistral", "attention_bias", "false", ""},
      {"mistral", "final_logit_softcapping", "null", ""},
      {"qwen2", "attention_bias", "true", ""},
      {"qwen2", "sliding_window", "8", ""},  // without use_sliding_window
      {"mixtral", "layer_types", R"(["full_attention", "full_attention"])", ""},
  };
  for (const Mutation& m : cases) {
    Json config = SmallConfig(m.family);
    const ModelSpec spec = ParseConfig(config, "config.json");
    config[m.field] = Json::parse(m.value);
    EXPECT_EQ(ParseConfig(config, "config.json"), spec) << m.family << ' ' << m.field;
  }
  Json qwen_as_llama = SmallConfig("llama");  // as converters leave it
  qwen_as_llama.update({{"use_sliding_window", false}, {"sliding_window", 32768}});
  EXPECT_EQ(ParseConfig(qwen_as_llama, "").layers[0].window, 0);
}

// transformers gives all layers of these families one window, whatever layer_types says.
TEST(Config, OneWindowForAllLayers) {
  for (const char* family : {"mixtral", "qwen3_moe"}) {
    Json config = SmallConfig(family);
    config.update({{"sliding_window", 8}, {"use_sliding_window", true}});
    for (const LayerSpec& layer : ParseConfig(config, "").layers) EXPECT_EQ(layer.window, 8);
    config["layer_types"] = {"sliding_attention", "full_attention"};
    EXPECT_NE(Message(config).find("layer_types: layer 1 has none of the window 8"),
              std::string::npos)
        << Message(config);
    config["layer_types"] = {"sliding_attention", "sliding_attention"};
    EXPECT_EQ(Message(config), "");
  }
  Json config = SmallConfig("qwen3_moe");
  config["use_sliding_window"] = true;
  EXPECT_EQ(ParseConfig(config, "").layers[1].window, 4096);  // the class default
  config["max_window_layers"] = 1;
  EXPECT_NE(Message(config).find("use_sliding_window: true with max_window_layers"),
            std::string::npos);
}

const Mutation kRopes[] = {
    {"llama", "rope_theta", "0", "rope_theta: expected a number"},
    {"llama", "rope_theta", "-10000", "rope_theta: expected a number"},
    {"llama", "rope_theta", "1e300", "rope_theta: expected a number"},
    {"llama", "rope_theta", "null", "rope_theta: expected a number"},
    {"llama", "partial_rotary_factor", "0.5", "partial_rotary_factor: only 1 is supported"},
    {"llama", "rope_scaling", "8", "rope_scaling: expected an object, found 8"},
    {"llama", "rope_scaling", R"({"factor": 2})",
     "rope_scaling.rope_type: expected a rope type, found nothing"},
    {"llama", "rope_scaling", R"({"type": "linear"})", "rope_scaling.factor: expected a number"},
    {"llama", "rope_scaling", R"({"type": "linear", "factor": 0.5})",
     "rope_scaling.factor: expected a number"},
    {"llama", "rope_scaling", R"({"type": "linear", "factor": 1e30})",
     "rope_scaling.factor: expected a number"},
    {"llama", "rope_scaling", R"({"type": "linear", "rope_type": "yarn", "factor": 2})",
     "'linear' contradicts"},
    {"llama", "rope_scaling", R"({"type": "dynamic", "factor": 2})",
     "rope_scaling.type: 'dynamic' is not supported"},
    {"llama", "rope_scaling", R"({"rope_type": "longrope", "factor": 2})",
     "rope_scaling.rope_type: 'longrope' is not"},
    {"llama", "rope_parameters", R"({"rope_type": "proportional"})",
     "rope_parameters.rope_type: 'proportional' is not"},
    {"llama", "rope_scaling", R"({"rope_type": "llama3", "factor": 8})",
     "rope_scaling.original_max_position_embeddings: expected"},
    {"llama", "rope_scaling",
     R"({"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64, "low_freq_factor": 4,
         "high_freq_factor": 4})",
     "rope_scaling.high_freq_factor: expected more than low_freq_factor 4, found 4"},
    {"llama", "rope_scaling",
     R"({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32})",
     "rope_scaling.beta_fast: expected at least beta_slow 32, found 1"},
    {"llama", "rope_scaling", R"({"rope_type": "yarn", "factor": 4, "attention_factor": -1})",
     "rope_scaling.attention_factor: expected"},
    {"llama", "rope_scaling", R"({"rope_type": "default", "partial_rotary_factor": 0.25})",
     "rope_scaling.partial_rotary_factor: only 1"},
    {"llama", "rope_parameters", R"({"rope_type": "default", "rope_theta": 500000})",
     "rope_theta: 10000 contradicts the 500000 of its dictionary"},
    {"llama", "rope_parameters", R"({"sliding_attention": {"rope_type": "default"}})",
     "rope_parameters.full_attention: expected an object, found nothing"},
    {"llama", "rope_parameters", R"({"full_attention": {"rope_type": "linear"}})",
     "rope_parameters.full_attention.factor: expected"},
};
INSTANTIATE_TEST_SUITE_P(Ropes, BadConfig, testing::ValuesIn(kRopes));

TEST(Config, WholeFilesThatAreNone) {
  EXPECT_NE(Message(Json::array()).find("config.json: expected an object, found an array"),
            std::string::npos);
  EXPECT_NE(Message(nullptr).find("expected an object, found null"), std::string::npos);
  EXPECT_NE(Message(Json::object()).find("model_type: expected a string, found nothing"),
            std::string::npos);
  const TempFolder folder;
  EXPECT_NE(ErrorMessage([&] { ReadModelSpec(folder.path()); }).find("config.json: cannot open"),
            std::string::npos);
  folder.Write("config.json", std::string(200000, '['));
  EXPECT_NE(
      ErrorMessage([&] { ReadModelSpec(folder.path()); }).find("config.json: JSON nested deeper"),
      std::string::npos);
}

TEST(Config, RopeParametersAndRopeScalingMustAgree) {
  Json config = SmallConfig("llama");
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 2.0}};
  config["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 4.0}};
  EXPECT_NE(Message(config).find("rope_parameters: contradicts rope_scaling"), std::string::npos);
  config["rope_parameters"]["factor"] = 2.0;
  EXPECT_EQ(Message(config), "");
}

}  // namespace
}  // namespace octavo
