#include "kv/scale_names.h"

#include <algorithm>
#include <charconv>
#include <iterator>

namespace octavo {
namespace {

constexpr std::string_view kPrefixes[] = {
    "", "model.", "model.language_model.", "language_model.model.", "language_model.", "backbone."};

struct Row {
  std::string_view rest;  // behind "layers.N."
  ScaleRole role;
};

// vLLM's patterns let the letter of the projection and that of the scale differ; the scale's
// counts.
constexpr Row kRows[] = {
    {"self_attn.k_scale", ScaleRole::kK},
    {"self_attn.v_scale", ScaleRole::kV},
    {"self_attn.attn.k_scale", ScaleRole::kK},
    {"self_attn.attn.v_scale", ScaleRole::kV},
    {"self_attn.k_proj.k_scale", ScaleRole::kK},
    {"self_attn.v_proj.k_scale", ScaleRole::kK},
    {"self_attn.k_proj.v_scale", ScaleRole::kV},
    {"self_attn.v_proj.v_scale", ScaleRole::kV},
    {"mixer.k_proj.k_scale", ScaleRole::kK},
    {"mixer.v_proj.k_scale", ScaleRole::kK},
    {"mixer.k_proj.v_scale", ScaleRole::kV},
    {"mixer.v_proj.v_scale", ScaleRole::kV},
    {"self_attn.k_proj.output_scale", ScaleRole::kK},
    {"self_attn.v_proj.output_scale", ScaleRole::kV},
    {"self_attn.qkv_proj.k_scale", ScaleRole::kK},
    {"self_attn.qkv_proj.v_scale", ScaleRole::kV},
    {"self_attn.qkqkv_proj.k_scale", ScaleRole::kK},
    {"self_attn.qkqkv_proj.v_scale", ScaleRole::kV},
    {"self_attn.k_cache.scale", ScaleRole::kK},
    {"self_attn.v_cache.scale", ScaleRole::kV},
    {"self_attn.kv_scale", ScaleRole::kBoth},
    {"self_attn.q_scale", ScaleRole::kUnused},
    {"self_attn.attn.q_scale", ScaleRole::kUnused},
    {"self_attn.attn.prob_scale", ScaleRole::kUnused},
    {"self_attn.q_proj.q_scale", ScaleRole::kUnused},
    {"self_attn.q_proj.output_scale", ScaleRole::kUnused},
    {"self_attn.prob_output_scale", ScaleRole::kUnused},
    {"self_attn.q.scale", ScaleRole::kUnused},
    {"self_attn.q_zero_point", ScaleRole::kZeroPoint},
    {"self_attn.k_zero_point", ScaleRole::kZeroPoint},
    {"self_attn.v_zero_point", ScaleRole::kZeroPoint},
    {"self_attn.attn.q_zero_point", ScaleRole::kZeroPoint},
    {"self_attn.attn.k_zero_point", ScaleRole::kZeroPoint},
    {"self_attn.attn.v_zero_point", ScaleRole::kZeroPoint},
    {"self_attn.k_proj.k_bias", ScaleRole::kZeroPoint},  // ModelOpt's affine caches
    {"self_attn.v_proj.v_bias", ScaleRole::kZeroPoint},
};

bool LooksLikeCacheScale(std::string_view rest) {
  constexpr std::string_view kLast[] = {"k_scale", "v_scale", "kv_scale", "key_scale",
                                        "value_scale"};
  const std::string_view last = rest.substr(rest.rfind('.') + 1);
  if (std::find(std::begin(kLast), std::end(kLast), last) != std::end(kLast)) return true;
  return rest.find("cache") != std::string_view::npos &&
         last.find("scale") != std::string_view::npos;
}

}  // namespace

ScaleName ParseScaleName(std::string_view name) {
  constexpr std::string_view kLayers = "layers.";
  size_t at = name.find(kLayers);
  while (at != std::string_view::npos && at > 0 && name[at - 1] != '.') {
    at = name.find(kLayers, at + 1);
  }
  if (at == std::string_view::npos) {
    return {.role = LooksLikeCacheScale(name) ? ScaleRole::kUnknown : ScaleRole::kNone,
            .other_part = true};
  }
  ScaleName result;
  const std::string_view prefix = name.substr(0, at);
  result.other_part =
      std::find(std::begin(kPrefixes), std::end(kPrefixes), prefix) == std::end(kPrefixes);
  const std::string_view tail = name.substr(at + kLayers.size());
  const auto [stop, error] = std::from_chars(tail.data(), tail.data() + tail.size(), result.layer);
  const size_t digits = static_cast<size_t>(stop - tail.data());
  const bool numbered = error == std::errc() && digits < tail.size() && tail[digits] == '.';
  if (!numbered || result.layer < 0) return {};
  const std::string_view rest = tail.substr(digits + 1);
  const auto row = std::find_if(std::begin(kRows), std::end(kRows),
                                [&](const Row& r) { return r.rest == rest; });
  if (row != std::end(kRows)) {
    result.role = row->role;
  } else if (LooksLikeCacheScale(rest)) {
    result.role = ScaleRole::kUnknown;
  }
  return result;
}

}  // namespace octavo
