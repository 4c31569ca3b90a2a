#include "kv/scheme.h"

#include <cstdlib>
#include <filesystem>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace octavo {
namespace {

namespace fs = std::filesystem;

constexpr KvScheme kTensor = {KvFormat::kFp8E4M3, KvScaleStrategy::kTensor};
constexpr KvScheme kHead = {KvFormat::kFp8E4M3, KvScaleStrategy::kHead};

std::optional<KvScheme> Parse(const std::string& text) {
  return ParseKvCacheScheme(ParseJson(text, "test"), "config.json: quantization_config");
}

std::string ParseError(const std::string& text) {
  try {
    Parse(text);
  } catch (const Error& error) {
    return error.message();
  }
  return "accepted";
}

std::string Quark(const std::string& dtype, const std::string& group, const std::string& layer) {
  return R"({"quant_method": "quark", "export": {"kv_cache_group": [)" + group +
         R"(]}, "layer_quant_config": {")" + layer + R"(": {"output_tensors": {"dtype": ")" +
         dtype + R"(", "qscheme": "per_tensor", "is_dynamic": false}}}})";
}

TEST(KvScheme, Accepted) {
  EXPECT_EQ(Parse("{}"), std::nullopt);
  EXPECT_EQ(Parse(R"({"quant_method": "mxfp4"})"), std::nullopt);
  EXPECT_EQ(Parse(R"({"kv_cache_scheme": null})"), std::nullopt);
  EXPECT_EQ(Parse(R"({"kv_cache_scheme": null, "kv_cache_quant_algo": "FP8"})"), kTensor);
  EXPECT_EQ(Parse(R"({"kv_cache_scheme": "static"})"), kTensor);
  EXPECT_EQ(Parse(R"({"quantization": {"kv_cache_quant_algo": "FP8"}})"), kTensor);
  EXPECT_EQ(Parse(R"({"quantization": {"kv_cache_quant_algo": null}})"), std::nullopt);
  EXPECT_EQ(
      Parse(R"({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}})"),
      kHead);
  EXPECT_EQ(Parse(Quark("fp8_e4m3", R"("*k_proj")", "*k_proj")), kTensor);
  EXPECT_EQ(Parse(Quark("fp8_e4m3", R"("*k_proj")", "model.layers.0.self_attn.k_proj")), kTensor);
  EXPECT_EQ(Parse(Quark("fp8_e4m3", "", "*k_proj")), std::nullopt);
}

TEST(KvScheme, Refused) {
  struct Case {
    std::string config;
    const char* message;
  };
  const auto scheme = [](const std::string& fields) {
    return R"({"kv_cache_scheme": {)" + fields + "}}";
  };
  for (const Case& c : std::vector<Case>{
           {scheme(R"("num_bits": 4, "type": "float")"),
            "kv_cache_scheme.num_bits: the KV cache scheme is "
            "not supported: expected 8, found 4"},
           {scheme(R"("type": "float")"),
            "num_bits: the KV cache scheme is not supported: expected 8, found null"},
           {scheme(R"("num_bits": 8, "type": "int")"), "kv_cache_scheme.type"},
           {scheme(R"("num_bits": 8, "type": "float", "dynamic": true)"),
            "kv_cache_scheme.dynamic"},
           {scheme(R"("num_bits": 8, "type": "float", "symmetric": false)"),
            "kv_cache_scheme.symmetric"},
           {scheme(R"("num_bits": 8, "type": "float", "strategy": "token")"),
            "kv_cache_scheme.strategy"},
           {R"({"kv_cache_scheme": "dynamic"})", "found 'dynamic'"},
           {R"({"kv_cache_scheme": 8})", "expected an object, found 8"},
           {R"({"kv_cache_quant_algo": "NVFP4"})",
            "kv_cache_quant_algo: the KV cache scheme is not supported: "
            "expected \"FP8\", found 'NVFP4'"},
           {R"({"quantization": {"kv_cache_quant_algo": "INT8"}})",
            "quantization: kv_cache_quant_algo"},
           {Quark("int8", R"("*k_proj")", "*k_proj"),
            "dtype: the KV cache scheme is not supported"},
           {Quark("fp8_e4m3", R"("*v_proj")", "*k_proj"), "names '*v_proj', but"},
           {Quark("fp8_e4m3", "7", "*k_proj"), "kv_cache_group"},
           {"[]", "expected an object, found an array"},
       }) {
    EXPECT_THAT(ParseError(c.config), testing::HasSubstr(c.message)) << c.config;
    EXPECT_THAT(ParseError(c.config), testing::StartsWith("config.json: quantization_config"));
  }
}

// Every configuration under shared/kvscales, published or assembled from published parts.
TEST(KvScheme, PublishedConfigurations) {
  const char* shared = std::getenv("OCTAVO_SHARED");
  const fs::path root = fs::path(shared ? shared : OCTAVO_SOURCE_DIR "/../shared") / "kvscales";
  if (!fs::exists(root)) GTEST_SKIP() << root << " is not there: nothing published was read";
  const std::map<std::string, std::optional<KvScheme>> expected = {
      {"compressed-tensors/W4A16_fp8kv.quantization_config.json", kTensor},
      {"compressed-tensors/kv_scheme_attn_head.json", kHead},
      {"compressed-tensors/mixed_nvfp4_fp8_fp8kv.quantization_config.json", kTensor},
      {"compressed-tensors/w8a8_fp8kv_llmcompressor_recipe.json", kTensor},
      {"modelopt/config.json.quantization_config.fp8_kv8.json", kTensor},
      {"modelopt/config.json.quantization_config.nvfp4_kv8.json", kTensor},
      {"modelopt/hf_quant_config.fp8_kv8.json", kTensor},
      {"modelopt/hf_quant_config.mixed_precision_kv8.json", kTensor},
      {"modelopt/hf_quant_config.nvfp4_kv8.json", kTensor},
      {"modelopt/hf_quant_config.real_deepseek_nvfp4_kv_null.EXCERPT.json", std::nullopt},
  };
  for (const auto& [name, scheme] : expected) {
    Json config = ReadJsonFile(root / name);
    if (config.contains("quantization_config")) config = Json(config["quantization_config"]);
    EXPECT_EQ(ParseKvCacheScheme(config, name), scheme) << name;
  }
  // A list of what ModelOpt's converter returns; the last asks for int8.
  const Json list = ReadJsonFile(root / "modelopt/get_quant_config.expected.json");
  ASSERT_EQ(list.size(), 5u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(ParseKvCacheScheme(list[i], "list"), std::nullopt);
  EXPECT_EQ(ParseKvCacheScheme(list[3], "list"), kTensor);
  EXPECT_THAT(
      [&] { ParseKvCacheScheme(list[4], "list"); },
      testing::Throws<Error>(testing::Property(&Error::message, testing::HasSubstr("'INT8'"))));
}

}  // namespace
}  // namespace octavo
