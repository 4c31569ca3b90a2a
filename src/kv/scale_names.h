// The tensor names by which checkpoints call scales of keys and values; the list is in kv/scales.h.
#pragma once

#include <string_view>

namespace octavo {

enum class ScaleRole {
  kNone,  // not about the KV cache
  kK,
  kV,
  kBoth,       // one scale for K and V
  kUnused,     // known, but Octavo has no use for it: scales of queries and probabilities
  kZeroPoint,  // known; harmless only if it is zero
  kUnknown,    // named like a scale of the cache, in no dialect
};

struct ScaleName {
  ScaleRole role = ScaleRole::kNone;
  bool other_part = false;  // of layers that are not the decoder's: mtp.layers.0, a vision tower
  int layer = 0;
};

ScaleName ParseScaleName(std::string_view tensor_name);

}  // namespace octavo
