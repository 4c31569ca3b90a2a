// For tests: where the reference checkpoints and the published configs are, and small configs of
// every family.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

#include "io/json.h"

namespace octavo {

// A folder of ../shared (or $OCTAVO_SHARED); empty if it is not there.
inline std::filesystem::path SharedFolder(const std::string& name) {
  const char* shared = std::getenv("OCTAVO_SHARED");
  const std::filesystem::path path =
      std::filesystem::path(shared ? shared : OCTAVO_SOURCE_DIR "/../shared") / name;
  return std::filesystem::is_directory(path) ? path : std::filesystem::path();
}

// The reference checkpoint of a family: tests/golden/<family>, else shared/goldens/<family>; empty
// if neither is there.
inline std::filesystem::path GoldenFolder(const std::string& family) {
  const std::filesystem::path own =
      std::filesystem::path(OCTAVO_SOURCE_DIR "/tests/golden") / family;
  if (std::filesystem::is_directory(own)) return own;
  const std::filesystem::path shared = SharedFolder("goldens");
  return shared.empty() ? shared : shared / family;
}

// A complete small config in the hub's dialect: 2 layers, hidden 64, 4 heads over 2, head_dim 16,
// vocab 32.
inline Json SmallConfig(const std::string& family) {
  Json config = {
      {"model_type", family},      {"vocab_size", 32},       {"hidden_size", 64},
      {"intermediate_size", 96},   {"num_hidden_layers", 2}, {"num_attention_heads", 4},
      {"num_key_value_heads", 2},  {"head_dim", 16},         {"max_position_embeddings", 512},
      {"rms_norm_eps", 1e-5},      {"rope_theta", 10000.0},  {"tie_word_embeddings", false},
      {"torch_dtype", "bfloat16"}, {"bos_token_id", 1},      {"eos_token_id", 2}};
  if (family == "qwen3_moe") {
    config.update({{"num_experts", 4}, {"num_experts_per_tok", 2}, {"moe_intermediate_size", 32}});
  }
  if (family == "mixtral" || family == "gpt_oss") {
    config.update({{"num_local_experts", 4}, {"num_experts_per_tok", 2}});
  }
  if (family == "mistral" || family == "gpt_oss" || family.starts_with("gemma"))
    config["sliding_window"] = 8;
  return config;
}

}  // namespace octavo
