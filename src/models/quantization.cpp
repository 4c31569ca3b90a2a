#include "models/quantization.h"

#include <algorithm>
#include <cctype>

#include <fmt/format.h>

namespace octavo {
namespace {

std::string Lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return text;
}

// compressed-tensors' description of a quantisation: {num_bits, type, strategy, symmetric, dynamic,
// ...}.
struct Scheme {
  std::string type;
  int64_t bits = 0;
  std::string strategy;
  bool symmetric = true, dynamic = false;

  bool IsStaticFp8() const { return type == "float" && bits == 8 && symmetric && !dynamic; }
  std::string Name() const {
    return fmt::format("{}{}{}{}{}", type, bits, strategy.empty() ? "" : "_" + strategy,
                       symmetric ? "" : "_asymmetric", dynamic ? "_dynamic" : "");
  }
};

Scheme ReadScheme(const ConfigReader& config) {
  Scheme scheme;
  scheme.type = config.String("type", "int");
  scheme.bits = config.Int("num_bits", 1, 64, 8);
  if (config.Has("strategy")) scheme.strategy = config.String("strategy");
  scheme.symmetric = config.Bool("symmetric", true);
  // Also "local", for nvfp4 activations.
  const Json* dynamic = config.Find("dynamic");
  scheme.dynamic = dynamic && !dynamic->is_null() && *dynamic != Json(false);
  return scheme;
}

// "kv_cache_scheme": null, an object (compressed-tensors, ModelOpt), or AutoFP8's "static".
std::optional<std::string> ReadKvScheme(const ConfigReader& config) {
  if (!config.Has("kv_cache_scheme")) return std::nullopt;
  if (config.Find("kv_cache_scheme")->is_string()) {
    const std::string name = config.String("kv_cache_scheme");
    return name == "static" ? "fp8_e4m3" : name;
  }
  const Scheme scheme = ReadScheme(*config.Object("kv_cache_scheme"));
  const bool known_strategy =
      scheme.strategy.empty() || scheme.strategy == "tensor" || scheme.strategy == "attn_head";
  return scheme.IsStaticFp8() && known_strategy ? "fp8_e4m3" : scheme.Name();
}

WeightQuant ReadCompressedTensors(const ConfigReader& config) {
  if (const auto sparsity = config.Object("sparsity_config");
      sparsity && !sparsity->json().empty()) {
    if (const std::string format = sparsity->String("format", "dense"); format != "dense") {
      sparsity->Fail("format", fmt::format("{} is not supported", Quote(format)),
                     ErrorCode::kUnsupported);
    }
  }
  if (const auto transform = config.Object("transform_config");
      transform && !transform->json().empty()) {
    config.Fail("transform_config", "rotated weights are not supported", ErrorCode::kUnsupported);
  }
  WeightQuant result = WeightQuant::kNone;
  const auto groups = config.Object("config_groups");
  if (!config.Find("config_groups") && !config.Find("kv_cache_scheme") &&
      !config.Has("sparsity_config")) {
    config.FailExpected("config_groups", "an object", nullptr);
  }
  if (!groups) return result;
  for (const auto& [name, value] : groups->json().items()) {
    const auto group = groups->Object(name);
    if (!group) continue;
    const auto weights = group->Object("weights");
    if (!weights) continue;  // only activations or a KV cache
    const Scheme scheme = ReadScheme(*weights);
    const bool supported_strategy =
        scheme.strategy.empty() || scheme.strategy == "tensor" || scheme.strategy == "channel";
    if (!scheme.IsStaticFp8() || !supported_strategy) {
      const std::string format =
          group->Has("format") ? group->String("format") : config.String("format", "");
      group->Fail(
          "weights",
          fmt::format(
              "compressed-tensors {} {} is not supported (float8 with tensor or channel scales is)",
              scheme.Name(), Quote(format)),
          ErrorCode::kUnsupported);
    }
    result = WeightQuant::kFp8;
  }
  return result;
}

// ModelOpt's quant_algo; null, or missing beside a cache's: only the cache is quantised.
WeightQuant ReadModelOptAlgorithm(const ConfigReader& config, bool cache_is_quantised) {
  if (!config.Find("quant_algo") && !cache_is_quantised) {
    config.FailExpected("quant_algo", "a string", nullptr);
  }
  if (!config.Has("quant_algo")) return WeightQuant::kNone;
  const std::string algorithm = config.String("quant_algo");
  if (algorithm != "FP8" && algorithm != "FP8_PER_CHANNEL_PER_TOKEN") {
    config.Fail("quant_algo",
                fmt::format("ModelOpt {} is not supported (FP8, FP8_PER_CHANNEL_PER_TOKEN are)",
                            Quote(algorithm)),
                ErrorCode::kUnsupported);
  }
  return WeightQuant::kFp8;
}

std::optional<std::string> ReadKvAlgorithm(const ConfigReader& config) {
  if (!config.Has("kv_cache_quant_algo")) return std::nullopt;
  const std::string algorithm = config.String("kv_cache_quant_algo");
  return algorithm == "FP8" ? "fp8_e4m3" : Lower(algorithm);
}

}  // namespace

Quantization ReadQuantizationConfig(const ConfigReader& config) {
  // Early ModelOpt exports name no method.
  const std::string method = config.Has("quant_method")
                                 ? config.String("quant_method")
                                 : (config.Has("quant_algo") ? "modelopt" : "");
  if (method.empty()) config.FailExpected("quant_method", "a string", config.Find("quant_method"));
  if (method == "mxfp4") return {.weights = WeightQuant::kMxfp4, .kv_cache_format = std::nullopt};
  if (method == "compressed-tensors") {
    return {.weights = ReadCompressedTensors(config), .kv_cache_format = ReadKvScheme(config)};
  }
  if (method == "modelopt") {
    auto kv = ReadKvScheme(config);
    if (!kv) kv = ReadKvAlgorithm(config);
    return {.weights = ReadModelOptAlgorithm(config, kv.has_value()), .kv_cache_format = kv};
  }
  if (method == "fp8") {
    if (config.Has("weight_block_size")) {
      config.Fail("weight_block_size", "float8 weights with block scales are not supported",
                  ErrorCode::kUnsupported);
    }
    return {.weights = WeightQuant::kFp8, .kv_cache_format = ReadKvScheme(config)};
  }
  config.Fail("quant_method",
              fmt::format("{} is not supported (compressed-tensors and modelopt float8, mxfp4)",
                          Quote(method)),
              ErrorCode::kUnsupported);
}

Quantization ReadModelOptFile(const ConfigReader& file) {
  const auto config = file.Object("quantization");
  if (!config) file.FailExpected("quantization", "an object", file.Find("quantization"));
  const auto kv = ReadKvAlgorithm(*config);
  return {.weights = ReadModelOptAlgorithm(*config, kv.has_value()), .kv_cache_format = kv};
}

}  // namespace octavo
