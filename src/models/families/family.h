// What a family of models adds to the common fields: its class defaults, its own config fields and
// its names of the expert tensors. kFamilies in config.cpp is the one list of them.
//
// A family's function is called with a spec whose sizes, rope-less layers and common fields are
// already there (see ReadCommon in config.cpp), all layers alike: full attention, dense FFN, no
// biases, scale head_dim^-0.5, no rope table.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>

#include "models/config_reader.h"
#include "models/rope.h"
#include "models/spec.h"

namespace octavo {

// What transformers' configuration class assumes of fields that the file does not name.
struct ClassDefaults {
  std::optional<int64_t> vocab = {};     // none: the file must name it
  std::optional<int64_t> heads = {};     // none: the file must name it
  std::optional<int64_t> kv_heads = {};  // none: as many as heads
  std::optional<int64_t> head_dim = {};  // none: hidden_size / heads
  int64_t max_position_embeddings = 2048;
  double norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  const char* activation_key = "hidden_act";
  const char* activation = "silu";
  std::optional<int32_t> bos = {}, eos = {};
};

// Tensor names of a mixture of experts, below "model.layers.N.".
struct ExpertNames {
  std::string_view router = {};   // "mlp.gate"
  std::string_view experts = {};  // "mlp.experts", then ".E."
  // Of one expert: "gate_proj", ... Empty: gpt_oss's stacks of all experts.
  std::string_view gate = {}, up = {}, down = {};
};

struct Family {
  std::string_view model_type;                      // of the text model
  std::span<const std::string_view> architectures;  // that are this model with a language head
  ClassDefaults defaults;
  ExpertNames experts = {};
  void (*parse)(const ConfigReader& config, ModelSpec& spec);
};

const Family& FindFamily(std::string_view model_type);  // CHECKs: of a ModelSpec

extern const Family kLlama, kQwen2, kQwen3, kQwen3Moe, kMistral, kMixtral, kGemma2, kGemma3Text,
    kGptOss;

// For the families' functions.

inline constexpr int64_t kMostWindow = 1 << 30;
inline constexpr int64_t kMostExperts = 4096;
inline constexpr int64_t kMostIntermediate = 1 << 24;

// Sets each layer's window by layer_types, or where the config has none, by `sliding(layer)`.
void SetWindows(const ConfigReader& config, std::optional<int64_t> window,
                const std::function<bool(int layer)>& sliding, ModelSpec& spec);

// For families whose layers are all alike: every layer has the window, or without one, none. Here
// transformers does not read layer_types, which must agree.
void SetOneWindow(const ConfigReader& config, std::optional<int64_t> window, ModelSpec& spec);

// Gives every layer the rope table of its type (of a config with one dictionary: the same). Yarn
// raises max_position_embeddings to what it was made for, which published files often leave as it
// was.
void SetRopes(const ConfigReader& config, const RopeParameters& missing, ModelSpec& spec);

// Makes a mixture of experts of `layer`, from num_experts_per_tok and `experts`.
void SetExperts(const ConfigReader& config, int64_t experts, int64_t default_top_k,
                LayerSpec& layer);

}  // namespace octavo
