#include "models/config.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "io/mapped_file.h"
#include "models/config_reader.h"
#include "models/families/family.h"
#include "models/quantization.h"
#include "models/rope.h"

namespace octavo {
namespace {

constexpr const Family* kFamilies[] = {&kLlama,   &kQwen2,  &kQwen3,      &kQwen3Moe, &kMistral,
                                       &kMixtral, &kGemma2, &kGemma3Text, &kGptOss};

// Models that hold the text model in text_config.
struct Wrapper {
  std::string_view model_type, text_model_type;
};
constexpr Wrapper kWrappers[] = {{"gemma3", "gemma3_text"}};

// Models that people will try, and why they do not run.
struct NotYet {
  std::string_view prefix, reason;
};
constexpr NotYet kNotYet[] = {
    {"gemma4", "head sizes and K/V sharing differ by layer"},
    {"qwen3_5", "linear attention layers"},
    {"qwen3_next", "linear attention layers"},
    {"gemma3n", "K/V sharing and per-layer embeddings"},
    {"deepseek", "multi-head latent attention"},
};

// Far above any real model's; small enough that no product of them overflows.
constexpr int64_t kMostVocab = 1 << 24;
constexpr int64_t kMostHidden = 1 << 20;
constexpr int64_t kMostLayers = 1024;
constexpr int64_t kMostHeads = 4096;
constexpr int64_t kMostHeadDim = 512;
constexpr int64_t kMostPositions = 1 << 30;

[[noreturn]] void RefuseModelType(const ConfigReader& config, const std::string& model_type) {
  for (const NotYet& model : kNotYet) {
    if (model_type.starts_with(model.prefix)) {
      config.Fail("model_type",
                  fmt::format("{} is not supported yet ({})", Quote(model_type), model.reason),
                  ErrorCode::kUnsupported);
    }
  }
  std::vector<std::string_view> known;
  for (const Family* family : kFamilies) known.push_back(family->model_type);
  config.Fail("model_type",
              fmt::format("{} is not supported ({})", Quote(model_type), fmt::join(known, ", ")),
              ErrorCode::kUnsupported);
}

const Family* FamilyOrNull(std::string_view model_type) {
  const auto it =
      std::find_if(std::begin(kFamilies), std::end(kFamilies),
                   [&](const Family* family) { return family->model_type == model_type; });
  return it == std::end(kFamilies) ? nullptr : *it;
}

bool IsArchitectureOf(const Family& family, const Json& name) {
  return std::any_of(family.architectures.begin(), family.architectures.end(),
                     [&](std::string_view architecture) { return name == Json(architecture); });
}

// By model_type, or in files without one, by architectures; where both are there, they must agree.
const Family& ChooseFamily(const ConfigReader& config) {
  const Json* architectures = config.Array("architectures");
  const Family* family = nullptr;
  if (config.Find("model_type")) {
    std::string model_type = config.String("model_type");
    for (const Wrapper& wrapper : kWrappers) {
      if (model_type == wrapper.model_type) model_type = wrapper.text_model_type;
    }
    family = FamilyOrNull(model_type);
    if (!family) RefuseModelType(config, model_type);
  }
  if (!architectures || architectures->empty()) {
    if (!family) config.FailExpected("model_type", "a string", nullptr);
    return *family;
  }
  for (const Json& name : *architectures) {
    for (const Family* candidate : kFamilies) {
      if (IsArchitectureOf(*candidate, name) && (!family || family == candidate)) return *candidate;
    }
  }
  config.Fail("architectures",
              fmt::format("{} is not supported{}", Describe(architectures->front()),
                          family ? fmt::format(" for model_type '{}' ({})", family->model_type,
                                               fmt::join(family->architectures, ", "))
                                 : ""),
              ErrorCode::kUnsupported);
}

Activation ReadActivation(const ConfigReader& config, const ClassDefaults& defaults) {
  const char* key = defaults.activation_key;
  const std::string name = config.Has(key) ? config.String(key) : defaults.activation;
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  config.Fail(key, fmt::format("{} is not supported (silu, gelu_pytorch_tanh)", Quote(name)),
              ErrorCode::kUnsupported);
}

// The sizes and the layers as all families have them.
ModelSpec ReadCommon(const ConfigReader& config, const Family& family) {
  const ClassDefaults& defaults = family.defaults;
  ModelSpec spec;
  spec.family = family.model_type;
  spec.vocab = config.Int("vocab_size", 1, kMostVocab, defaults.vocab);
  spec.hidden = config.Int("hidden_size", 1, kMostHidden);
  spec.max_position_embeddings =
      config.Int("max_position_embeddings", 1, kMostPositions, defaults.max_position_embeddings);
  spec.norm_eps = static_cast<float>(config.Number("rms_norm_eps", 1e-12, 0.1, defaults.norm_eps));

  LayerSpec layer;
  const int64_t heads = config.Int("num_attention_heads", 1, kMostHeads, defaults.heads);
  const int64_t kv_heads =
      config.NullableInt("num_key_value_heads", 1, kMostHeads, defaults.kv_heads).value_or(heads);
  if (heads % kv_heads != 0) {
    config.Fail("num_key_value_heads",
                fmt::format("{} does not divide num_attention_heads {}", kv_heads, heads));
  }
  auto head_dim = config.NullableInt("head_dim", 1, kMostHeadDim, defaults.head_dim);
  if (!head_dim) {
    if (spec.hidden % heads != 0 || spec.hidden / heads > kMostHeadDim) {
      config.Fail("hidden_size", fmt::format("{} / num_attention_heads {} is no head_dim up to {}",
                                             spec.hidden, heads, kMostHeadDim));
    }
    head_dim = spec.hidden / heads;
  }
  if (*head_dim % 2 != 0) config.Fail("head_dim", fmt::format("{} is odd", *head_dim));
  layer.heads = static_cast<int>(heads);
  layer.kv_heads = static_cast<int>(kv_heads);
  layer.head_dim = static_cast<int>(*head_dim);
  layer.attention_scale = static_cast<float>(std::pow(static_cast<double>(*head_dim), -0.5));
  layer.ffn.activation = ReadActivation(config, defaults);
  layer.ffn.intermediate = config.Int("intermediate_size", 1, kMostIntermediate);
  spec.layers.assign(config.Int("num_hidden_layers", 1, kMostLayers), layer);
  return spec;
}

// A field that may stand in the text model's config, beside it, or in both with one meaning.
const ConfigReader& ReaderOf(std::string_view key, const ConfigReader& outer,
                             const ConfigReader& text) {
  return outer.Has(key) ? outer : text;
}

bool ReadTied(const ConfigReader& outer, const ConfigReader& text, bool missing) {
  constexpr const char* kKey = "tie_word_embeddings";
  const bool tied = ReaderOf(kKey, outer, text).Bool(kKey, missing);
  if (text.Bool(kKey, tied) != tied) text.Fail(kKey, "contradicts the one beside text_config");
  return tied;
}

DType ReadDType(const ConfigReader& outer, const ConfigReader& text) {
  const char* key = text.Has("dtype") || outer.Has("dtype") ? "dtype" : "torch_dtype";
  const ConfigReader& config = text.Has(key) ? text : outer;
  if (!config.Has(key)) return DType::kBF16;
  const std::string name = config.String(key);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    if (name == Name(dtype)) return dtype;
  }
  config.Fail(key, fmt::format("{} is not supported (bfloat16, float16, float32)", Quote(name)),
              ErrorCode::kUnsupported);
}

void AddEosIds(const ConfigReader& config, int64_t vocab, std::vector<int32_t>& ids) {
  constexpr const char* kKey = "eos_token_id";
  if (!config.Has(kKey)) return;
  const Json& value = *config.Find(kKey);
  const auto add = [&](const Json& id) {
    const auto token = AsInt(id, 0, vocab - 1);
    if (!token) config.FailExpected(kKey, fmt::format("token ids below vocab_size {}", vocab), &id);
    if (std::find(ids.begin(), ids.end(), *token) == ids.end()) {
      ids.push_back(static_cast<int32_t>(*token));
    }
  };
  if (value.is_array()) {
    for (const Json& id : value) add(id);
  } else {
    add(value);
  }
}

void ReadTokenIds(const ConfigReader& outer, const ConfigReader& text,
                  const ClassDefaults& defaults, ModelSpec& spec) {
  const ConfigReader& bos = ReaderOf("bos_token_id", outer, text);
  if (const auto id = bos.NullableInt("bos_token_id", 0, spec.vocab - 1, defaults.bos)) {
    spec.bos_token_id = static_cast<int32_t>(*id);
  }
  const ConfigReader& eos = ReaderOf("eos_token_id", outer, text);
  if (!eos.Find("eos_token_id") && defaults.eos) spec.eos_token_ids = {*defaults.eos};
  AddEosIds(eos, spec.vocab, spec.eos_token_ids);
}

void SetQuantization(const ConfigReader& config, const Quantization& quantization,
                     ModelSpec& spec) {
  if (quantization.weights == WeightQuant::kMxfp4 && spec.family != kGptOss.model_type) {
    config.Fail("quant_method", "'mxfp4' is supported for gpt_oss only", ErrorCode::kUnsupported);
  }
  spec.weight_quant = quantization.weights;
  spec.kv_cache_format = quantization.kv_cache_format;
}

// compression_config is what compressed-tensors called it at first.
void ReadQuantization(const ConfigReader& outer, const ConfigReader& text, ModelSpec& spec) {
  std::optional<Quantization> found;
  for (const char* key : {"quantization_config", "compression_config"}) {
    const ConfigReader& config = ReaderOf(key, outer, text);
    const auto object = config.Object(key);
    if (!object) continue;
    const Quantization quantization = ReadQuantizationConfig(*object);
    if (found && *found != quantization) config.Fail(key, "contradicts quantization_config");
    found = quantization;
    SetQuantization(*object, quantization, spec);
  }
  const ConfigReader& mlx = ReaderOf("quantization", outer, text);
  if (mlx.Has("quantization")) {
    mlx.Fail("quantization", "weights in MLX's formats are not supported", ErrorCode::kUnsupported);
  }
}

// A field by which some family, or another engine's reading of this one, computes something else.
struct Trait {
  const char *key, *nothing;  // `nothing`: the value that changes nothing, besides null
  bool (*changes_nothing)(const ConfigReader& config, const Json& value);
};
bool IsFalse(const ConfigReader&, const Json& value) { return value == Json(false); }
bool IsTrue(const ConfigReader&, const Json& value) { return value == Json(true); }
bool IsNull(const ConfigReader&, const Json& value) { return value.is_null(); }
void CheckCount(const ConfigReader& config, const Json& layer_types, int64_t layers) {
  if (std::ssize(layer_types) == layers) return;
  config.Fail("layer_types", fmt::format("expected num_hidden_layers {} entries, found {}", layers,
                                         layer_types.size()));
}
bool IsFullAttention(const ConfigReader& config, const Json& value) {
  if (value.is_array()) CheckCount(config, value, config.Int("num_hidden_layers", 1, kMostLayers));
  return value.is_array() && std::all_of(value.begin(), value.end(),
                                         [](const Json& type) { return type == "full_attention"; });
}
bool IsUnusedWindow(const ConfigReader& config, const Json&) {
  return config.Has("use_sliding_window") && !config.Bool("use_sliding_window", false);
}
constexpr Trait kTraits[] = {
    {"attention_bias", "false", IsFalse},
    {"mlp_bias", "false", IsFalse},
    {"is_causal", "true", IsTrue},
    {"use_bidirectional_attention", "false", IsFalse},
    {"layer_types", "full_attention alone", IsFullAttention},
    {"sliding_window", "null", IsUnusedWindow},
    {"attn_logit_softcapping", "null", IsNull},
    {"final_logit_softcapping", "null", IsNull},
    {"query_pre_attn_scalar", "null", IsNull},
    {"swiglu_limit", "null", IsNull},
};

// transformers ignores such fields outside their families. Whoever wrote one there meant something.
void RefuseUnreadTraits(const ConfigReader& config, const Family& family) {
  for (const Trait& trait : kTraits) {
    if (config.WasAsked(trait.key) || !config.Has(trait.key)) continue;
    const Json& value = *config.Find(trait.key);
    if (trait.changes_nothing(config, value)) continue;
    config.Fail(trait.key,
                fmt::format("{} is not supported for {} ({} is)", Describe(value),
                            family.model_type, trait.nothing),
                ErrorCode::kUnsupported);
  }
}

}  // namespace

const Family& FindFamily(std::string_view model_type) {
  const Family* family = FamilyOrNull(model_type);
  OCTAVO_CHECK(family, model_type);
  return *family;
}

void SetWindows(const ConfigReader& config, std::optional<int64_t> window,
                const std::function<bool(int layer)>& sliding, ModelSpec& spec) {
  const Json* types = config.Array("layer_types");
  if (types) CheckCount(config, *types, std::ssize(spec.layers));
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    bool slides = false;
    if (!types) {
      slides = sliding(static_cast<int>(i));
    } else if (const Json& type = (*types)[i]; type == "sliding_attention") {
      slides = true;
    } else if (type != "full_attention") {
      config.Fail(
          "layer_types",
          fmt::format("{} is not supported (full_attention, sliding_attention)", Describe(type)),
          ErrorCode::kUnsupported);
    }
    if (slides && !window) {
      config.Fail("sliding_window", fmt::format("layer {} has a window, and none is given", i));
    }
    spec.layers[i].window = slides ? static_cast<int>(*window) : 0;
  }
}

void SetOneWindow(const ConfigReader& config, std::optional<int64_t> window, ModelSpec& spec) {
  SetWindows(
      config, window, [&](int) { return window.has_value(); }, spec);
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (window && spec.layers[i].window == 0) {
      config.Fail("layer_types", fmt::format("layer {} has none of the window {} of all {} layers",
                                             i, *window, spec.family));
    }
  }
}

void SetRopes(const ConfigReader& config, const RopeParameters& missing, ModelSpec& spec) {
  double extended = 0;
  for (LayerSpec& layer : spec.layers) {
    const RopeParameters rope =
        ReadRope(config, layer.window ? "sliding_attention" : "full_attention", missing,
                 spec.max_position_embeddings);
    layer.rope = AddRope(spec, MakeRope(rope, layer.head_dim));
    if (rope.type == RopeType::kYarn) {
      extended = std::max(extended, rope.original_max_position_embeddings * rope.factor);
    }
  }
  extended = std::min(extended, static_cast<double>(kMostPositions));
  spec.max_position_embeddings =
      std::max(spec.max_position_embeddings, static_cast<int64_t>(extended));
}

void SetExperts(const ConfigReader& config, int64_t experts, int64_t default_top_k,
                LayerSpec& layer) {
  layer.ffn.experts = static_cast<int>(experts);
  layer.ffn.top_k = static_cast<int>(config.Int("num_experts_per_tok", 1, experts, default_top_k));
  if (layer.ffn.top_k > layer.ffn.experts) {
    config.Fail("num_experts_per_tok", fmt::format("{} of {} experts", layer.ffn.top_k, experts));
  }
}

ModelSpec ParseConfig(const Json& json, const std::string& source) {
  const ConfigReader outer(json, source);
  const Family& family = ChooseFamily(outer);
  const auto nested = outer.Object("text_config");
  const ConfigReader& text = nested ? *nested : outer;
  if (nested && text.Has("model_type") && text.String("model_type") != family.model_type) {
    text.FailExpected("model_type", fmt::format("'{}'", family.model_type),
                      text.Find("model_type"));
  }
  ModelSpec spec = ReadCommon(text, family);
  family.parse(text, spec);
  RefuseUnreadTraits(text, family);
  spec.dtype = ReadDType(outer, text);
  spec.tie_word_embeddings = ReadTied(outer, text, family.defaults.tie_word_embeddings);
  ReadTokenIds(outer, text, family.defaults, spec);
  ReadQuantization(outer, text, spec);
  return spec;
}

namespace {

void Override(const Json& overrides, Json& config) {
  for (const auto& [key, value] : overrides.items()) {
    Json& old = config[key];
    if (key.ends_with("_config") && old.is_object() && value.is_object()) {
      Override(value, old);
    } else {
      old = value;
    }
  }
}

}  // namespace

ModelSpec ReadModelSpec(const std::filesystem::path& folder, const std::string& overrides) {
  const auto read = [&](const char* name) { return ReadJsonFile(folder / name); };
  Json config = read("config.json");
  if (!overrides.empty()) {
    const Json json = ParseJson(overrides, "--hf-overrides");
    Require(json.is_object(), "--hf-overrides", "a JSON object", Describe(json));
    if (config.is_object()) Override(json, config);
  }
  ModelSpec spec = ParseConfig(config, (folder / "config.json").string());

  if (IsThere(folder / "hf_quant_config.json")) {
    const Json json = read("hf_quant_config.json");
    const ConfigReader file(json, (folder / "hf_quant_config.json").string());
    const Quantization quantization = ReadModelOptFile(file);
    const Quantization named = {.weights = spec.weight_quant,
                                .kv_cache_format = spec.kv_cache_format};
    if (named != Quantization() && named != quantization) {
      file.Fail("quantization", "contradicts quantization_config of config.json");
    }
    SetQuantization(file, quantization, spec);
  }
  if (IsThere(folder / "generation_config.json")) {
    const Json json = read("generation_config.json");
    AddEosIds(ConfigReader(json, (folder / "generation_config.json").string()), spec.vocab,
              spec.eos_token_ids);
  }
  return spec;
}

}  // namespace octavo
