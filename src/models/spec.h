// A model is data: what one forward pass (models/decoder) must know of any decoder-only transformer
// it can run.
//
// models/config reads a Hugging Face config.json into a ModelSpec; a family (models/families) fills
// in its class defaults and its tensor names. Names follow the config fields.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "kernels/backend.h"

namespace octavo {

// One table of rotation frequencies; pair i is (i, i + inv_freq.size()) of the head.
struct RopeSpec {
  std::vector<float> inv_freq;
  float scaling = 1.0f;  // multiplies cos and sin (yarn)
  bool operator==(const RopeSpec&) const = default;
};

struct FfnSpec {
  Activation activation = Activation::kSilu;
  int64_t intermediate = 0;
  float limit = 0;  // kSwigluOai
  int experts = 0;  // 0: dense
  int top_k = 0;
  bool softmax_first = true;  // softmax over all experts, then top-k; else top-k, then softmax
  bool normalize_topk = true;
  bool bias = false;  // gate, up, down and, with experts, the router have biases
  bool operator==(const FfnSpec&) const = default;
};

struct LayerSpec {
  int heads = 0, kv_heads = 0, head_dim = 0;
  int window = 0;  // 0: full attention
  int rope = 0;    // index into ModelSpec::ropes
  float attention_scale = 0;
  float soft_cap = 0;  // 0: none
  bool qk_norm = false;
  bool qkv_bias = false, out_bias = false;
  bool sinks = false;
  // Gemma: norms after attention and after the FFN, before the residual addition.
  bool post_norms = false;
  FfnSpec ffn;
  bool operator==(const LayerSpec&) const = default;
};

// A quantised checkpoint, as its config says it.
enum class WeightQuant : uint8_t { kNone, kFp8, kMxfp4 };

struct ModelSpec {
  std::string family;  // "llama", "gemma3_text", ...: the model_type of the text model
  int64_t vocab = 0, hidden = 0;
  int64_t max_position_embeddings = 0;
  std::vector<LayerSpec> layers;
  std::vector<RopeSpec> ropes;
  float norm_eps = 0, norm_offset = 0;
  float embedding_scale = 1;  // before rounding to the activation type
  float final_soft_cap = 0;
  bool tie_word_embeddings = false;
  DType dtype = DType::kBF16;  // of the checkpoint
  WeightQuant weight_quant = WeightQuant::kNone;
  // What the checkpoint's kv_cache_scheme asks for: "fp8_e4m3", or the name of a format that Octavo
  // may not have ("nvfp4").
  std::optional<std::string> kv_cache_format;
  std::optional<int32_t> bos_token_id;
  std::vector<int32_t> eos_token_ids;
  bool operator==(const ModelSpec&) const = default;
};

}  // namespace octavo
