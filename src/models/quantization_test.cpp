#include "models/quantization.h"

#include <string>

#include <gtest/gtest.h>

#include "io/testing.h"
#include "models/config.h"
#include "models/testing.h"

namespace octavo {
namespace {

Quantization Read(const Json& config) {
  return ReadQuantizationConfig(ConfigReader(config, "config.json", "quantization_config."));
}

std::string Message(const Json& config) {
  return ErrorMessage([&] { Read(config); });
}

const Quantization kFp8Weights{.weights = WeightQuant::kFp8, .kv_cache_format = {}};

// {"quant_method": "compressed-tensors", ...} with one group of weights like this.
Json CompressedTensors(const char* weights) {
  return {{"quant_method", "compressed-tensors"},
          {"format", "float-quantized"},
          {"config_groups",
           {{"group_0", {{"targets", {"Linear"}}, {"weights", Json::parse(weights)}}}}},
          {"ignore", {"lm_head"}}};
}

TEST(Quantization, CompressedTensorsFloat8) {
  EXPECT_EQ(Read(CompressedTensors(
                R"({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false})")),
            kFp8Weights);
  EXPECT_EQ(
      Read(CompressedTensors(
          R"({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true, "group_size": null})")),
      kFp8Weights);
}

TEST(Quantization, CompressedTensorsCacheOnly) {
  Json config = CompressedTensors("null");
  config["kv_cache_scheme"] = {
      {"num_bits", 8}, {"type", "float"}, {"strategy", "attn_head"}, {"dynamic", false}};
  EXPECT_EQ(Read(config),
            (Quantization{.weights = WeightQuant::kNone, .kv_cache_format = "fp8_e4m3"}));
  config["config_groups"] = Json::object();
  EXPECT_EQ(Read(config).kv_cache_format, "fp8_e4m3");
  config["kv_cache_scheme"]["dynamic"] = true;
  EXPECT_EQ(Read(config).kv_cache_format, "float8_attn_head_dynamic");
  config["kv_cache_scheme"] = nullptr;
  EXPECT_EQ(Read(config), Quantization());
}

TEST(Quantization, EverythingElseIsRefusedByName) {
  struct Case {
    Json config;
    const char* message;
  };
  const Case cases[] = {
      {CompressedTensors(
           R"({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128})"),
       "config_groups.group_0.weights: compressed-tensors int4_group 'float-quantized' is not "
       "supported"},
      {CompressedTensors(R"({"num_bits": 8, "type": "int", "strategy": "channel"})"),
       "compressed-tensors int8_channel"},
      {CompressedTensors(R"({"num_bits": 8, "type": "float", "strategy": "block"})"),
       "compressed-tensors float8_block"},
      {CompressedTensors(R"({"num_bits": 4, "type": "float", "strategy": "tensor_group"})"),
       "float4_tensor_group"},
      {CompressedTensors(R"({"num_bits": 8, "type": "float", "symmetric": false})"),
       "float8_asymmetric"},
      {CompressedTensors(R"({"num_bits": "8"})"),
       "config_groups.group_0.weights.num_bits: expected an integer"},
      {CompressedTensors("[]"), "config_groups.group_0.weights: expected an object"},
      {{{"quant_method", "gptq"}, {"bits", 4}}, "quant_method: 'gptq' is not supported"},
      {{{"quant_method", "awq"}}, "quant_method: 'awq' is not supported"},
      {{{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}},
       "quant_method: 'bitsandbytes' is not supported"},
      {{{"quant_method", "quark"}}, "quant_method: 'quark' is not supported"},
      {{{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}},
       "weight_block_size: float8 weights with block scales"},
      {{{"quant_method", "modelopt"}, {"quant_algo", "NVFP4"}},
       "quant_algo: ModelOpt 'NVFP4' is not supported"},
      {{{"quant_algo", "MIXED_PRECISION"}},
       "quant_algo: ModelOpt 'MIXED_PRECISION' is not supported"},
      {{{"quant_method", 4}}, "quant_method: expected a string, found 4"},
      {{{"bits", 4}}, "quant_method: expected a string, found nothing"},
      {Json::object(), "quant_method: expected a string, found nothing"},
      {{{"quant_method", "modelopt"}}, "quant_algo: expected a string, found nothing"},
      {{{"quant_method", "modelopt"}, {"kv_cache_scheme", nullptr}},
       "quant_algo: expected a string, found nothing"},
      {{{"quant_method", "compressed-tensors"}, {"format", "float-quantized"}},
       "config_groups: expected an object, found nothing"},
      {{{"quant_method", "compressed-tensors"},
        {"sparsity_config", {{"format", "sparse-24-bitmask"}}}},
       "sparsity_config.format: 'sparse-24-bitmask' is not supported"},
      {{{"quant_method", "compressed-tensors"},
        {"transform_config", {{"config_groups", {{"u", 1}}}}}},
       "transform_config: rotated weights are not supported"},
  };
  for (const Case& c : cases) {
    const std::string message = Message(c.config);
    EXPECT_TRUE(message.starts_with("config.json: quantization_config.")) << message;
    EXPECT_NE(message.find(c.message), message.npos) << message;
  }
}

TEST(Quantization, PublishedFiles) {
  const auto folder = SharedFolder("kvscales");
  if (folder.empty()) GTEST_SKIP() << "shared/kvscales is not there (set OCTAVO_SHARED)";
  const auto read = [&](const char* name) { return ReadJsonFile(folder / name); };
  const Quantization fp8 = {.weights = WeightQuant::kFp8, .kv_cache_format = "fp8_e4m3"};
  EXPECT_EQ(Read(read("modelopt/config.json.quantization_config.fp8_kv8.json")), fp8);
  EXPECT_EQ(
      Read(read("compressed-tensors/w8a8_fp8kv_llmcompressor_recipe.json")["quantization_config"]),
      fp8);
  EXPECT_NE(Message(read("compressed-tensors/W4A16_fp8kv.quantization_config.json"))
                .find("compressed-tensors int4_group 'pack-quantized'"),
            std::string::npos);
  EXPECT_NE(
      Message(read("compressed-tensors/mixed_nvfp4_fp8_fp8kv.quantization_config.json"))
          .find("group_1.weights: compressed-tensors float4_tensor_group 'nvfp4-pack-quantized'"),
      std::string::npos);
  EXPECT_NE(Message(read("modelopt/config.json.quantization_config.nvfp4_kv8.json"))
                .find("ModelOpt 'NVFP4'"),
            std::string::npos);

  const auto modelopt = [&](const char* name) {
    const Json json = read(name);
    return ReadModelOptFile(ConfigReader(json, "hf_quant_config.json"));
  };
  EXPECT_EQ(modelopt("modelopt/hf_quant_config.fp8_kv8.json"), fp8);
  for (const char* name : {"modelopt/hf_quant_config.nvfp4_kv8.json",
                           "modelopt/hf_quant_config.mixed_precision_kv8.json"}) {
    const std::string message = ErrorMessage([&] { modelopt(name); });
    EXPECT_NE(message.find("hf_quant_config.json: quantization.quant_algo: ModelOpt"), message.npos)
        << message;
  }
}

TEST(Quantization, OfAWholeFolder) {
  const TempFolder folder;
  Json config = SmallConfig("llama");
  folder.Write("config.json", config.dump());
  folder.Write("hf_quant_config.json",
               R"({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}})");
  ModelSpec spec = ReadModelSpec(folder.path());
  EXPECT_EQ(spec.weight_quant, WeightQuant::kFp8);
  EXPECT_EQ(spec.kv_cache_format, "fp8_e4m3");
  folder.Write("hf_quant_config.json",
               R"({"quantization": {"quant_algo": null, "kv_cache_quant_algo": "NVFP4"}})");
  spec = ReadModelSpec(folder.path());
  EXPECT_EQ(spec.weight_quant, WeightQuant::kNone);
  EXPECT_EQ(spec.kv_cache_format, "nvfp4");

  folder.Write("hf_quant_config.json", R"({"quantization": {"exclude_modules": ["lm_head"]}})");
  EXPECT_NE(ErrorMessage([&] {
              ReadModelSpec(folder.path());
            }).find("quantization.quant_algo: expected a string, found nothing"),
            std::string::npos);
  folder.Write("hf_quant_config.json", R"({"quantization": {"quant_algo": null}})");
  EXPECT_EQ(ReadModelSpec(folder.path()).weight_quant, WeightQuant::kNone);

  config["quantization_config"] = {{"quant_method", "modelopt"}, {"quant_algo", "FP8"}};
  folder.Write("config.json", config.dump());
  std::string message = ErrorMessage([&] { ReadModelSpec(folder.path()); });
  EXPECT_NE(message.find("hf_quant_config.json: quantization: contradicts"), message.npos)
      << message;
  std::filesystem::remove(folder.path() / "hf_quant_config.json");
  config["quantization_config"] = {{"quant_method", "mxfp4"}};
  folder.Write("config.json", config.dump());
  message = ErrorMessage([&] { ReadModelSpec(folder.path()); });
  EXPECT_NE(message.find("'mxfp4' is supported for gpt_oss only"), message.npos) << message;
}

TEST(Quantization, UnderItsFirstName) {
  Json config = SmallConfig("llama");
  config["compression_config"] =
      CompressedTensors(R"({"num_bits": 8, "type": "float", "strategy": "tensor"})");
  EXPECT_EQ(ParseConfig(config, "").weight_quant, WeightQuant::kFp8);
  config["quantization_config"] = config["compression_config"];
  EXPECT_EQ(ParseConfig(config, "").weight_quant, WeightQuant::kFp8);
  config["quantization_config"]["kv_cache_scheme"] = "static";
  EXPECT_NE(ErrorMessage([&] {
              ParseConfig(config, "");
            }).find("compression_config: contradicts quantization_config"),
            std::string::npos);
}

}  // namespace
}  // namespace octavo
