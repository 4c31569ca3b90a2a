// What a config says about quantisation: quantization_config of config.json (compressed-tensors,
// ModelOpt, MXFP4, AutoFP8's "fp8") and ModelOpt's hf_quant_config.json. Anything but float-8
// weights with tensor or channel scales and gpt_oss's MXFP4 is refused by name.
#pragma once

#include <optional>
#include <string>

#include "models/config_reader.h"
#include "models/spec.h"

namespace octavo {

struct Quantization {
  WeightQuant weights = WeightQuant::kNone;
  std::optional<std::string> kv_cache_format;
  bool operator==(const Quantization&) const = default;
};

Quantization ReadQuantizationConfig(const ConfigReader& quantization_config);
Quantization ReadModelOptFile(const ConfigReader& hf_quant_config);

}  // namespace octavo
