// Rotary position embeddings: from the config's dictionary, in either dialect, to a table of
// frequencies.
//
// Frequencies are computed as transformers does, in float32 where it does, so that they agree to
// the last bit or so: at position 100,000 an angle is off by what its frequency is off, times
// 100,000.
#pragma once

#include <string>
#include <string_view>

#include "models/config_reader.h"
#include "models/spec.h"

namespace octavo {

enum class RopeType : uint8_t { kDefault, kLinear, kLlama3, kYarn };

struct RopeParameters {
  RopeType type = RopeType::kDefault;
  double theta = 10000;
  double factor = 1;                                 // all but default
  double original_max_position_embeddings = 0;       // llama3, yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  double beta_fast = 32, beta_slow = 1;              // yarn
  double attention_factor = 1;                       // yarn
  bool truncate = true;                              // yarn
};

// The dictionary of `layer_type` ("full_attention", "sliding_attention"): transformers v5's
// rope_parameters (one for all layers, or one per layer type), else the hub's rope_theta and
// rope_scaling, else `missing`. `max_position_embeddings` is the config's or the class default.
RopeParameters ReadRope(const ConfigReader& config, std::string_view layer_type,
                        const RopeParameters& missing, int64_t max_position_embeddings);

RopeSpec MakeRope(const RopeParameters& parameters, int head_dim);

// The index of `rope` in spec.ropes, added if it is not there yet.
int AddRope(ModelSpec& spec, RopeSpec rope);

}  // namespace octavo
