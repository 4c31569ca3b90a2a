// What a checkpoint's config says about its KV cache: ParseKvCacheScheme reads the dialects of
// compressed-tensors, AutoFP8, ModelOpt and Quark.
//
//   compressed-tensors, ModelOpt   "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic":
//   false,
//                                   "symmetric": true, "strategy": "tensor" | "attn_head"}
//   AutoFP8                         "kv_cache_scheme": "static"
//   ModelOpt hf_quant_config.json   {"quantization": {"kv_cache_quant_algo": "FP8"}}, or the inner
//   object alone Quark                           {"quant_method": "quark", "export":
//   {"kv_cache_group": ["*k_proj", "*v_proj"]},
//                                   "layer_quant_config": {"*k_proj": {"output_tensors": {"dtype":
//                                   "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": false}},
//                                   ...}}
//
// All of them come down to static fp8_e4m3. Anything else (nvfp4, int8, dynamic scales, zero
// points) is an Error that names it. The quantisation of weights is none of this file's business.
#pragma once

#include <optional>
#include <string>

#include "io/json.h"
#include "kernels/kv_layout.h"

namespace octavo {

enum class KvScaleStrategy { kTensor, kHead };

struct KvScheme {
  KvFormat format = KvFormat::kFp8E4M3;
  KvScaleStrategy strategy = KvScaleStrategy::kTensor;
  bool operator==(const KvScheme&) const = default;
};

// `config` is quantization_config, or all of hf_quant_config.json; `source` names it in errors.
// nullopt: it asks for no quantised cache.
std::optional<KvScheme> ParseKvCacheScheme(const Json& config, const std::string& source);

}  // namespace octavo
