// Static scales of keys and values: read from a checkpoint or a side-car file, checked, and traced
// to where they came from. stored = saturate(round(x / scale)), x ~ stored * scale, as in vLLM and
// compressed-tensors.
//
// Checkpoints. Tensors float32, float16 or bfloat16 of shape [], [1], [1, 1, 1] (one per tensor),
// [kv_heads] or [kv_heads, 1, 1] (one per kv head), named PREFIX.layers.N.REST, where PREFIX is
// model, model.language_model, language_model.model, language_model or backbone, or absent, and
// REST is (x is k or v)
//   self_attn.x_scale, self_attn.attn.x_scale        compressed-tensors; vLLM's own names
//   self_attn.x_proj.x_scale, mixer.x_proj.x_scale   ModelOpt
//   self_attn.x_proj.output_scale                    Quark, early FP8 checkpoints
//   self_attn.qkv_proj.x_scale, qkqkv_proj.x_scale   fused projections
//   self_attn.x_cache.scale                          HYV3
//   self_attn.kv_scale                               AutoFP8: one for K and V
// Scales of queries and probabilities and zero points are known and reported as unused; so are
// scales of other parts (mtp.layers.0...), of layers past the last, and of layers that the policy
// does not store in a static 8-bit format.
//
// Side-car files (JSON) win over the checkpoint. Either vLLM's old form, one scale for K and V,
// ranks of tensor parallelism ("0" or "rank0") holding equal shares of the kv heads in order:
//   {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"RANK": {"LAYER": 0.02, ...}, ...}}}
// or Octavo's own, where a number is one scale per tensor and an array one per kv head:
//   {"octavo_kv_scales": 1, "model": "a name for people", "layers": {"LAYER": {"k": 0.02, "v":
//   [0.01, 0.03]}, ...}}
//
// Errors: a scale that is not finite or outside [1e-6, 1e4]; two tensors that disagree about one
// scale; a wrong shape; and scales that are there for some of the layers that need them but not for
// others: half a calibration is a broken one, and 1.0 for the rest would lose accuracy in silence.
// With no scales at all every scale is 1.0, with a warning for fp8_e4m3.
//
// Pure functions but for reading and writing files; any thread.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/checkpoint.h"
#include "kv/policy.h"

namespace octavo {

// The scales of one layer's K or V.
struct KvScale {
  std::vector<float> values;  // [kv_heads]; empty: the format has no static scale
  bool per_head = false;      // else all values are one number
  std::string
      source;  // "checkpoint model.layers.3.self_attn.k_scale", "side-car FILE", "default 1.0"
};

struct LayerScales {
  KvScale k, v;
};

struct KvScales {
  std::vector<LayerScales> layers;  // one per model layer
  std::vector<std::string>
      lines;  // "layers 0-31: K 0.012 to 0.31 per tensor from checkpoint model.layers.N..."
  std::vector<std::string> warnings;
};

// `layers` and `formats`: one per model layer. `side_car`: the file to take all scales from instead
// of the checkpoint.
KvScales LoadKvScales(const Checkpoint& checkpoint,
                      const std::optional<std::filesystem::path>& side_car,
                      std::span<const KvLayerFacts> layers, std::span<const LayerFormat> formats);

}  // namespace octavo
