// Static scales of keys and values, and where they came from.
#pragma once

#include <string>
#include <vector>

namespace octavo {

// The static scales of one layer's K or V: stored = saturate(round(x / scale)), x ~ stored * scale.
struct KvScale {
  std::vector<float> values;  // [kv_heads]; empty: the format has no static scale
  bool per_head = false;      // else all values are one number
  std::string
      source;  // "checkpoint model.layers.3.self_attn.k_scale", "side-car FILE", "default 1.0"
};

struct LayerScales {
  KvScale k, v;
};

}  // namespace octavo
