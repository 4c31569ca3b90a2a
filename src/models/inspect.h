// What a model's weights and its KV cache cost: bytes by format, and how many tokens and sequences
// fit in a given memory. Pure; uses the same claims (KvLayout) as the cache itself, so the numbers
// are those that serving will have.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "models/spec.h"
#include "octavo/kv_layout.h"

namespace octavo {

// Layers with the same cache geometry.
struct LayerGroup {
  int window = 0;  // 0: full attention
  int layers = 0;
  int heads = 0, kv_heads = 0, head_dim = 0;
};

// The cache under one policy.
struct CacheCost {
  KvFormat format = KvFormat::kBF16;         // of the full layers
  KvFormat window_format = KvFormat::kBF16;  // of the window layers
  double bytes_per_token = 0;                // of all full layers: this grows with the context
  // Of one sequence: all its window layers, at most this, however long it is; of the report's
  // length. Double, as sums of bytes here may exceed 2^63.
  double window_bytes = 0, sequence_bytes = 0;
  int64_t sequences = 0;          // of that length that fit
  std::optional<int64_t> tokens;  // of one sequence that fit; none: no bound (windows only)
};

struct CacheReport {
  std::vector<LayerGroup> groups;
  int64_t memory_bytes = 0, length = 0;
  // By format, in kOfferedFormats' order; 8-bit ones in models with windows also with window layers
  // skipped.
  std::vector<CacheCost> costs;
};

// The matrices as a GPU keeps them, in bytes; norms and biases are left out.
struct WeightReport {
  double bytes = 0;
  double bytes_per_token = 0;  // that a decode step of one token reads: of experts, those it uses
};

WeightReport InspectWeights(const ModelSpec& spec);
std::string ToText(const WeightReport& report);
CacheReport InspectCache(const ModelSpec& spec, int64_t memory_bytes, int64_t length);
std::string ToText(const CacheReport& report);

}  // namespace octavo
