// config.json -> ModelSpec, in the hub's dialect (rope_theta, rope_scaling, torch_dtype,
// sliding_window_pattern, ...) and in transformers v5's (rope_parameters, layer_types, dtype).
#pragma once

#include <filesystem>
#include <string>

#include "io/json.h"
#include "models/spec.h"

namespace octavo {

// Errors name file and field, what was expected and what was found. Unsupported architectures are
// refused by name.
ModelSpec ParseConfig(const Json& config, const std::string& source);

// Reads folder/config.json, and hf_quant_config.json and generation_config.json (eos ids) where
// present. `overrides`: a JSON object whose fields replace config.json's; those that are configs
// (text_config) are overridden in their turn.
ModelSpec ReadModelSpec(const std::filesystem::path& folder, const std::string& overrides = "");

}  // namespace octavo
