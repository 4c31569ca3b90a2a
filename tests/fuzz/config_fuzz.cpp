// Any bytes as config.json: an Error of one line, or a spec that a decoder can rely on.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "io/json.h"
#include "models/config.h"
#include "models/inspect.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

void CheckSpec(const octavo::ModelSpec& spec) {
  Require(spec.vocab > 0 && spec.hidden > 0 && spec.norm_eps > 0 &&
          spec.max_position_embeddings > 0);
  Require(!spec.layers.empty());
  for (const octavo::LayerSpec& layer : spec.layers) {
    Require(layer.kv_heads > 0 && layer.heads % layer.kv_heads == 0);
    Require(layer.window >= 0 && layer.soft_cap >= 0 && std::isfinite(layer.soft_cap));
    Require(layer.attention_scale > 0 && std::isfinite(layer.attention_scale));
    Require(layer.ffn.intermediate > 0 && layer.ffn.top_k <= layer.ffn.experts);
    const octavo::RopeSpec& rope = spec.ropes.at(layer.rope);
    Require(rope.inv_freq.size() * 2 == static_cast<size_t>(layer.head_dim));
    Require(rope.scaling > 0 && std::isfinite(rope.scaling));
    for (const float f : rope.inv_freq) Require(std::isfinite(f));
  }
  for (const int32_t id : spec.eos_token_ids) Require(id >= 0 && id < spec.vocab);
  octavo::ToText(octavo::InspectCache(spec, int64_t{80} << 30, spec.max_position_embeddings));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    CheckSpec(octavo::ParseConfig(octavo::ParseJson(text, "fuzz"), "fuzz"));
  } catch (const octavo::Error& error) {
    Require(!error.message().empty() && error.message().find('\n') == std::string::npos);
  }
  return 0;
}
