#include "models/config.h"

#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "io/testing.h"
#include "models/testing.h"

namespace octavo {
namespace {

std::string Message(const Json& config) {
  return ErrorMessage([&] { ParseConfig(config, "config.json"); });
}

// The numbers of a model, written out from what was published.
struct Expected {
  const char* folder;
  const char* family;
  int64_t vocab, hidden, positions;
  int layers, heads, kv_heads, head_dim;
  int64_t intermediate;
  int experts, top_k;
  int windows, window;  // how many layers have one; its size
  double eps;
  bool tied;
  double theta, window_theta;  // of the full and of the window layers; 0: no such layers
};

void ExpectSpec(const ModelSpec& spec, const Expected& e) {
  SCOPED_TRACE(e.folder);
  EXPECT_EQ(spec.family, e.family);
  EXPECT_EQ(spec.vocab, e.vocab);
  EXPECT_EQ(spec.hidden, e.hidden);
  EXPECT_EQ(spec.max_position_embeddings, e.positions);
  EXPECT_EQ(spec.norm_eps, static_cast<float>(e.eps));
  EXPECT_EQ(spec.tie_word_embeddings, e.tied);
  EXPECT_EQ(spec.dtype, DType::kBF16);
  ASSERT_EQ(spec.layers.size(), static_cast<size_t>(e.layers));
  int windows = 0;
  for (const LayerSpec& layer : spec.layers) {
    EXPECT_EQ(layer.heads, e.heads);
    EXPECT_EQ(layer.kv_heads, e.kv_heads);
    EXPECT_EQ(layer.head_dim, e.head_dim);
    EXPECT_EQ(layer.ffn.intermediate, e.intermediate);
    EXPECT_EQ(layer.ffn.experts, e.experts);
    EXPECT_EQ(layer.ffn.top_k, e.top_k);
    EXPECT_EQ(layer.window, layer.window ? e.window : 0);
    windows += layer.window > 0;
    // The second frequency tells theta; no scaling touches it in these models but the linear one.
    const double theta = layer.window ? e.window_theta : e.theta;
    const double expected = std::pow(theta, -2.0 / e.head_dim);
    const float found = spec.ropes.at(layer.rope).inv_freq.at(1);
    EXPECT_NEAR(found, expected, 1e-6 * expected) << "theta " << theta;
    EXPECT_EQ(spec.ropes.at(layer.rope).inv_freq.size(), static_cast<size_t>(e.head_dim / 2));
  }
  EXPECT_EQ(windows, e.windows);
}

TEST(Config, Goldens) {
  if (GoldenFolder("llama").empty())
    GTEST_SKIP() << "neither tests/golden nor shared/goldens is there";
  const Expected table[] = {
      {"llama", "llama", 256, 64, 4096, 4, 4, 2, 64, 128, 0, 0, 0, 0, 1e-5, false, 5e5, 0},
      {"llama_hd128_tied", "llama", 256, 64, 4096, 2, 4, 2, 128, 128, 0, 0, 0, 0, 1e-5, true, 1e4,
       0},
      {"qwen2", "qwen2", 256, 256, 4096, 4, 4, 2, 64, 128, 0, 0, 0, 0, 1e-5, false, 1e6, 0},
      {"qwen3", "qwen3", 256, 64, 4096, 4, 4, 2, 128, 128, 0, 0, 0, 0, 1e-6, false, 1e6, 0},
      {"qwen3_moe", "qwen3_moe", 256, 64, 4096, 4, 4, 2, 64, 48, 8, 2, 0, 0, 1e-5, false, 1e6, 0},
      {"mistral", "mistral", 256, 64, 4096, 4, 4, 2, 64, 128, 0, 0, 4, 32, 1e-5, false, 0, 1e4},
      {"mixtral", "mixtral", 256, 64, 4096, 4, 4, 2, 64, 128, 4, 2, 0, 0, 1e-5, false, 1e6, 0},
      {"gemma2", "gemma2", 256, 64, 4096, 4, 2, 1, 256, 128, 0, 0, 2, 32, 1e-5, true, 1e4, 1e4},
      {"gemma3_text", "gemma3_text", 256, 64, 4096, 6, 2, 1, 256, 128, 0, 0, 5, 32, 1e-6, true, 1e6,
       1e4},
  };
  for (const Expected& e : table) {
    const ModelSpec spec = ReadModelSpec(GoldenFolder(e.folder));
    ExpectSpec(spec, e);
    EXPECT_EQ(spec.bos_token_id, 1);
    EXPECT_EQ(spec.eos_token_ids, std::vector<int32_t>{2});
    EXPECT_EQ(spec.weight_quant, WeightQuant::kNone);
    EXPECT_EQ(spec.kv_cache_format, std::nullopt);
  }
}

TEST(Config, GoldenGptOss) {
  if (GoldenFolder("gpt_oss").empty()) {
    GTEST_SKIP() << "neither tests/golden nor shared/goldens is there";
  }
  const ModelSpec spec = ReadModelSpec(GoldenFolder("gpt_oss"));
  EXPECT_EQ(spec.max_position_embeddings, 4096);
  EXPECT_NEAR(spec.ropes.at(0).scaling, 1.3465736, 1e-6);
  ASSERT_EQ(spec.layers.size(), 4u);
  for (int i = 0; i < 4; ++i) {
    const LayerSpec& layer = spec.layers[i];
    EXPECT_EQ(layer.window, i % 2 == 0 ? 32 : 0);
    EXPECT_EQ(layer.heads, 4);
    EXPECT_EQ(layer.kv_heads, 2);
    EXPECT_EQ(layer.head_dim, 64);
    EXPECT_EQ(layer.ffn.intermediate, 128);
    EXPECT_EQ(layer.ffn.experts, 4);
    EXPECT_EQ(layer.ffn.top_k, 2);
    EXPECT_EQ(layer.ffn.limit, 7);
  }
}

TEST(Config, PublishedConfigs) {
  const auto configs = SharedFolder("configs");
  if (configs.empty()) GTEST_SKIP() << "shared/configs is not there (set OCTAVO_SHARED)";
  const Expected table[] = {
      {"Llama-3.2-1B", "llama", 128256, 2048, 131072, 16, 32, 8, 64, 8192, 0, 0, 0, 0, 1e-5, true,
       5e5, 0},
      {"Meta-Llama-3.1-8B-Instruct", "llama", 128256, 4096, 131072, 32, 32, 8, 128, 14336, 0, 0, 0,
       0, 1e-5, false, 5e5, 0},
      {"Llama-3.3-70B-Instruct", "llama", 128256, 8192, 131072, 80, 64, 8, 128, 28672, 0, 0, 0, 0,
       1e-5, false, 5e5, 0},
      {"Mistral-7B-Instruct-v0.3", "mistral", 32768, 4096, 32768, 32, 32, 8, 128, 14336, 0, 0, 0, 0,
       1e-5, false, 1e6, 0},
      {"Mixtral-8x7B-v0.1", "mixtral", 32000, 4096, 32768, 32, 32, 8, 128, 14336, 8, 2, 0, 0, 1e-5,
       false, 1e6, 0},
      {"Qwen2.5-3B", "qwen2", 151936, 2048, 32768, 36, 16, 2, 128, 11008, 0, 0, 0, 0, 1e-6, true,
       1e6, 0},
      {"Qwen3-0.6B", "qwen3", 151936, 1024, 40960, 28, 16, 8, 128, 3072, 0, 0, 0, 0, 1e-6, true,
       1e6, 0},
      {"Qwen3-8B", "qwen3", 151936, 4096, 40960, 36, 32, 8, 128, 12288, 0, 0, 0, 0, 1e-6, false,
       1e6, 0},
      {"Qwen3-30B-A3B", "qwen3_moe", 151936, 2048, 40960, 48, 32, 4, 128, 768, 128, 8, 0, 0, 1e-6,
       false, 1e6, 0},
      {"gemma-2-9b", "gemma2", 256000, 3584, 8192, 42, 16, 8, 256, 14336, 0, 0, 21, 4096, 1e-6,
       true, 1e4, 1e4},
      {"gemma-3-1b-it", "gemma3_text", 262144, 1152, 32768, 26, 4, 1, 256, 6912, 0, 0, 22, 512,
       1e-6, true, 1e6, 1e4},
  };
  for (const Expected& e : table) ExpectSpec(ReadModelSpec(configs / e.folder), e);
}

TEST(Config, PublishedGemma3OfFewKeys) {
  const auto configs = SharedFolder("configs");
  if (configs.empty()) GTEST_SKIP() << "shared/configs is not there (set OCTAVO_SHARED)";
  ModelSpec spec = ReadModelSpec(configs / "gemma-3-12b-it");
  // Linear scaling by 8 of the full layers only.
  const LayerSpec& full = spec.layers[5];
  EXPECT_EQ(full.window, 0);
  EXPECT_NEAR(spec.ropes[full.rope].inv_freq[0], 1 / 8.0, 1e-8);
  for (float& f : spec.ropes[full.rope].inv_freq) f *= 8;
  ExpectSpec(spec, {"gemma-3-12b-it", "gemma3_text", 262208, 3840, 131072, 48, 16, 8, 256, 15360, 0,
                    0, 40, 1024, 1e-6, true, 1e6, 1e4});
  EXPECT_EQ(spec.layers[0].attention_scale, 0.0625f);
  EXPECT_TRUE(spec.layers[0].qk_norm && spec.layers[0].post_norms);
  EXPECT_EQ(spec.layers[0].soft_cap, 0);
  EXPECT_EQ(spec.final_soft_cap, 0);
  EXPECT_EQ(spec.layers[0].ffn.activation, Activation::kGeluTanh);
  EXPECT_EQ(spec.embedding_scale, std::sqrt(3840.0f));
  EXPECT_EQ(spec.norm_offset, 1);
  EXPECT_EQ(spec.bos_token_id, 2);
  EXPECT_EQ(spec.eos_token_ids, (std::vector<int32_t>{1, 106}));
}

TEST(Config, PublishedGptOss) {
  const auto configs = SharedFolder("configs");
  if (configs.empty()) GTEST_SKIP() << "shared/configs is not there (set OCTAVO_SHARED)";
  for (const auto& [name, layers, experts] :
       {std::tuple("gpt-oss-20b", 24, 32), std::tuple("gpt-oss-120b", 36, 128)}) {
    const ModelSpec spec = ReadModelSpec(configs / name);
    ASSERT_EQ(spec.layers.size(), static_cast<size_t>(layers));
    EXPECT_EQ(spec.hidden, 2880);
    EXPECT_EQ(spec.vocab, 201088);
    EXPECT_EQ(spec.max_position_embeddings, 131072);
    EXPECT_EQ(spec.weight_quant, WeightQuant::kMxfp4);
    EXPECT_EQ(spec.eos_token_ids, std::vector<int32_t>{200002});
    ASSERT_EQ(spec.ropes.size(), 1u);
    EXPECT_NEAR(spec.ropes[0].scaling, 1.3465735902799727, 1e-6);
    for (int i = 0; i < layers; ++i) {
      LayerSpec expected;
      expected.heads = 64;
      expected.kv_heads = 8;
      expected.head_dim = 64;
      expected.window = i % 2 == 0 ? 128 : 0;
      expected.attention_scale = 0.125f;
      expected.qkv_bias = expected.out_bias = expected.sinks = true;
      expected.ffn = {.activation = Activation::kSwigluOai,
                      .intermediate = 2880,
                      .limit = 7,
                      .experts = experts,
                      .top_k = 4,
                      .softmax_first = false,
                      .normalize_topk = true,
                      .bias = true};
      EXPECT_EQ(spec.layers[i], expected) << i;
    }
  }
}

TEST(Config, PublishedButNotYet) {
  const auto configs = SharedFolder("configs");
  if (configs.empty()) GTEST_SKIP() << "shared/configs is not there (set OCTAVO_SHARED)";
  const std::string qwen = ErrorMessage([&] { ReadModelSpec(configs / "Qwen3.5-27B"); });
  EXPECT_NE(qwen.find("'qwen3_5' is not supported yet (linear attention"), qwen.npos) << qwen;
  const std::string gemma = ErrorMessage([&] { ReadModelSpec(configs / "gemma-4-E2B-it"); });
  EXPECT_NE(gemma.find("'gemma4' is not supported yet"), gemma.npos) << gemma;
}

TEST(Config, FamilyTraits) {
  const auto spec = [](const char* family) {
    return ParseConfig(SmallConfig(family), "config.json");
  };
  const ModelSpec llama = spec("llama"), qwen2 = spec("qwen2"), qwen3 = spec("qwen3"),
                  moe = spec("qwen3_moe"), mixtral = spec("mixtral"), gemma2 = spec("gemma2");
  EXPECT_FALSE(llama.layers[0].qkv_bias || llama.layers[0].out_bias || llama.layers[0].qk_norm);
  EXPECT_EQ(llama.layers[0].attention_scale, 0.25f);
  EXPECT_EQ(llama.layers[0].ffn.activation, Activation::kSilu);
  EXPECT_EQ(llama.embedding_scale, 1);
  EXPECT_TRUE(qwen2.layers[0].qkv_bias);
  EXPECT_FALSE(qwen2.layers[0].out_bias);
  EXPECT_TRUE(qwen3.layers[0].qk_norm);
  EXPECT_FALSE(qwen3.layers[0].qkv_bias);
  EXPECT_TRUE(moe.layers[0].ffn.softmax_first);
  EXPECT_FALSE(
      moe.layers[0].ffn.normalize_topk);  // norm_topk_prob is false unless the file says true
  EXPECT_EQ(moe.layers[0].ffn.intermediate, 32);
  EXPECT_TRUE(mixtral.layers[0].ffn.softmax_first && mixtral.layers[0].ffn.normalize_topk);
  EXPECT_EQ(gemma2.layers[0].soft_cap, 50);
  EXPECT_EQ(gemma2.final_soft_cap, 30);
  EXPECT_EQ(gemma2.layers[0].window, 8);
  EXPECT_EQ(gemma2.layers[1].window, 0);
  EXPECT_TRUE(gemma2.layers[0].post_norms);
}

TEST(Config, ClassDefaults) {
  const auto without = [](const char* family, std::initializer_list<const char*> keys) {
    Json config = SmallConfig(family);
    for (const char* key : keys) config.erase(key);
    return ParseConfig(config, "config.json");
  };
  EXPECT_EQ(without("llama", {"num_key_value_heads"}).layers[0].kv_heads, 4);
  EXPECT_EQ(without("llama", {"head_dim"}).layers[0].head_dim, 16);
  EXPECT_EQ(without("llama", {"rms_norm_eps"}).norm_eps, 1e-6f);
  EXPECT_EQ(without("llama", {"max_position_embeddings"}).max_position_embeddings, 2048);
  EXPECT_EQ(without("llama", {"bos_token_id", "eos_token_id"}).eos_token_ids,
            std::vector<int32_t>{2});
  EXPECT_FALSE(without("llama", {"tie_word_embeddings"}).tie_word_embeddings);
  EXPECT_EQ(without("llama", {"torch_dtype"}).dtype, DType::kBF16);
  EXPECT_EQ(without("mistral", {"sliding_window"}).layers[0].window, 4096);
  EXPECT_EQ(without("mixtral", {"rms_norm_eps"}).norm_eps, 1e-5f);
  EXPECT_NEAR(without("mixtral", {"rope_theta"}).ropes[0].inv_freq[4], 1e-3, 1e-9);  // 1e6^(-8/16)
  EXPECT_NEAR(without("llama", {"rope_theta"}).ropes[0].inv_freq[4], 1e-2, 1e-8);
  EXPECT_EQ(without("qwen3", {"head_dim"}).layers[0].head_dim, 128);
  EXPECT_EQ(without("qwen3", {"bos_token_id", "eos_token_id"}).eos_token_ids,
            std::vector<int32_t>{});
  EXPECT_EQ(without("gemma2", {"head_dim"}).layers[0].head_dim, 256);
  EXPECT_TRUE(without("gemma2", {"tie_word_embeddings"}).tie_word_embeddings);
  EXPECT_EQ(without("gemma2", {"vocab_size"}).vocab, 256000);
  EXPECT_EQ(without("gemma3_text", {"vocab_size", "num_attention_heads", "num_key_value_heads"})
                .layers[0]
                .kv_heads,
            4);
  EXPECT_EQ(without("gpt_oss", {"sliding_window"}).layers[0].window, 128);
  EXPECT_NEAR(without("gpt_oss", {}).ropes[0].scaling, 1.3465736, 1e-6);  // yarn, factor 32
  Json mistral = SmallConfig("mistral");
  mistral["sliding_window"] = nullptr;
  EXPECT_EQ(ParseConfig(mistral, "config.json").layers[0].window, 0);
}

TEST(Config, BothDialectsGiveOneSpec) {
  struct Case {
    const char *family, *hub, *v5;
  };
  // What differs; the rest is the small config without its rope_theta and torch_dtype.
  const Case cases[] = {
      {"llama", R"({"rope_theta": 500000, "torch_dtype": "float16"})",
       R"({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "dtype": "float16"})"},
      {"llama",
       R"({"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}})",
       R"({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}})"},
      {"llama", R"({"rope_scaling": null})",
       R"({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})"},
      {"qwen3",
       R"({"rope_theta": 1000000, "rope_scaling": {"type": "yarn", "factor": 4.0,
           "original_max_position_embeddings": 128}, "use_sliding_window": true, "sliding_window": 8,
           "max_window_layers": 1})",
       R"({"rope_parameters": {"rope_theta": 1000000, "rope_type": "yarn", "factor": 4.0,
           "original_max_position_embeddings": 128}, "use_sliding_window": true, "sliding_window": 8,
           "layer_types": ["full_attention", "sliding_attention"]})"},
      {"qwen3_moe", R"({"num_experts": 4})", R"({"num_local_experts": 4, "num_experts": 4})"},
      {"mistral", R"({"rope_theta": 1000000.0})",
       R"({"rope_parameters": {"sliding_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
           "full_attention": {"rope_theta": 10000.0, "rope_type": "default"}}})"},
      {"gemma2", R"({})", R"({"layer_types": ["sliding_attention", "full_attention"],
           "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})"},
      {"gemma3_text",
       R"({"rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window_pattern": 2,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}})",
       R"({"layer_types": ["sliding_attention", "full_attention"], "_sliding_window_pattern": 2,
           "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
           "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}})"},
      {"gpt_oss",
       R"({"rope_theta": 150000, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
           "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false}})",
       R"({"rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_theta": 150000,
           "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false}})"},
  };
  for (const Case& c : cases) {
    Json base = SmallConfig(c.family);
    base.erase("rope_theta");
    base.erase("torch_dtype");
    Json hub = base, v5 = base;
    hub.update(Json::parse(c.hub));
    v5.update(Json::parse(c.v5));
    EXPECT_EQ(ParseConfig(hub, "hub"), ParseConfig(v5, "v5")) << c.hub;
  }
}

TEST(Config, TextConfigOfAMultimodalModel) {
  Json text = SmallConfig("gemma3_text");
  for (const char* key : {"torch_dtype", "tie_word_embeddings", "eos_token_id"}) text.erase(key);
  const Json config = {
      {"model_type", "gemma3"},   {"architectures", {"Gemma3ForConditionalGeneration"}},
      {"text_config", text},      {"vision_config", {{"hidden_size", 1152}}},
      {"torch_dtype", "float16"}, {"tie_word_embeddings", false},
      {"eos_token_id", {1, 7}}};
  const ModelSpec spec = ParseConfig(config, "config.json");
  EXPECT_EQ(spec.family, "gemma3_text");
  EXPECT_EQ(spec.dtype, DType::kF16);
  EXPECT_FALSE(spec.tie_word_embeddings);
  EXPECT_EQ(spec.eos_token_ids, (std::vector<int32_t>{1, 7}));
  EXPECT_EQ(spec.bos_token_id, 1);
  Json broken = config;
  broken["text_config"]["hidden_size"] = -1;
  EXPECT_NE(Message(broken).find("config.json: text_config.hidden_size: expected"),
            std::string::npos);
  broken["text_config"] = 3;
  EXPECT_NE(Message(broken).find("config.json: text_config: expected an object, found 3"),
            std::string::npos);
  broken["text_config"] = SmallConfig("llama");
  EXPECT_NE(Message(broken).find("text_config.model_type: expected 'gemma3_text', found 'llama'"),
            std::string::npos);
  broken = config;
  broken["text_config"]["tie_word_embeddings"] = true;
  EXPECT_NE(Message(broken).find("text_config.tie_word_embeddings: contradicts"),
            std::string::npos);
}

TEST(Config, MixedDenseAndSparseLayers) {
  Json config = SmallConfig("qwen3_moe");
  config["num_hidden_layers"] = 4;
  config["decoder_sparse_step"] = 2;
  config["mlp_only_layers"] = {3};
  config["norm_topk_prob"] = true;
  const ModelSpec spec = ParseConfig(config, "config.json");
  EXPECT_EQ(spec.layers[0].ffn.experts, 0);
  EXPECT_EQ(spec.layers[0].ffn.intermediate, 96);
  EXPECT_EQ(spec.layers[1].ffn.experts, 4);
  EXPECT_EQ(spec.layers[1].ffn.intermediate, 32);
  EXPECT_TRUE(spec.layers[1].ffn.normalize_topk);
  EXPECT_EQ(spec.layers[3].ffn.experts, 0);
}

TEST(Config, LinksThatLeadNowhereAreNamed) {
  const TempFolder folder;
  folder.Write("config.json", SmallConfig("llama").dump());
  for (const char* name : {"generation_config.json", "hf_quant_config.json"}) {
    std::filesystem::create_symlink("purged", folder.path() / name);
    const std::string message = ErrorMessage([&] { ReadModelSpec(folder.path()); });
    EXPECT_NE(message.find(std::string(name) + ": cannot open"), message.npos) << message;
    std::filesystem::remove(folder.path() / name);
    std::filesystem::create_directory(folder.path() / name);
    EXPECT_NE(ErrorMessage([&] { ReadModelSpec(folder.path()); }).find("not a regular file"),
              message.npos);
    std::filesystem::remove(folder.path() / name);
  }
}

TEST(Config, FieldsAreOverridden) {
  const TempFolder folder;
  Json config = SmallConfig("gemma3_text");
  folder.Write("config.json", config.dump());
  const ModelSpec own = ReadModelSpec(folder.path());
  EXPECT_EQ(
      ReadModelSpec(folder.path(), R"({"max_position_embeddings": 77})").max_position_embeddings,
      77);
  // Of a config within it only what is named; of any other object all.
  config["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}};
  folder.Write("config.json", config.dump());
  EXPECT_THROW(ReadModelSpec(folder.path()), Error);
  const ModelSpec spec =
      ReadModelSpec(folder.path(), R"({"quantization_config": {"weight_block_size": null}})");
  EXPECT_EQ(spec.max_position_embeddings, own.max_position_embeddings);
  EXPECT_NE(spec.weight_quant, own.weight_quant);
  const auto refused = [&](const std::string& overrides, const std::string& words) {
    const std::string message = ErrorMessage([&] { ReadModelSpec(folder.path(), overrides); });
    EXPECT_NE(message.find(words), message.npos) << message;
  };
  refused("{", "--hf-overrides: ");
  refused("[]", "--hf-overrides: expected a JSON object, found an array");
  refused(R"({"hidden_size": -1})", "config.json: hidden_size: ");
}

TEST(Config, EosIdsOfBothFiles) {
  const TempFolder folder;
  folder.Write("config.json", SmallConfig("llama").dump());
  folder.Write("generation_config.json", R"({"eos_token_id": [5, 2], "temperature": 0.6})");
  EXPECT_EQ(ReadModelSpec(folder.path()).eos_token_ids, (std::vector<int32_t>{2, 5}));
  folder.Write("generation_config.json", R"({"eos_token_id": [32]})");
  const std::string message = ErrorMessage([&] { ReadModelSpec(folder.path()); });
  EXPECT_NE(
      message.find(
          "generation_config.json: eos_token_id: expected token ids below vocab_size 32, found 32"),
      message.npos)
      << message;
}

}  // namespace
}  // namespace octavo
