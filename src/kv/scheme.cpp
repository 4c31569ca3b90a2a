#include "kv/scheme.h"

#include <string_view>

#include <fmt/format.h>

#include "base/error.h"

namespace octavo {
namespace {

// A member of an object; null where it is absent or JSON null.
const Json* Find(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

[[noreturn]] void Unsupported(const std::string& where, std::string_view expected,
                              const Json& found) {
  throw Error(ErrorCode::kUnsupported,
              fmt::format("{}: the KV cache scheme is not supported: expected {}, found {}", where,
                          expected, Describe(found)));
}

// A field that is either absent, where that is allowed, or has the one value that is supported.
void Require(const Json& object, const char* key, const Json& value, bool may_be_absent,
             const std::string& where) {
  const Json* found = Find(object, key);
  if (found == nullptr && may_be_absent) return;
  if (found == nullptr || *found != value) {
    Unsupported(fmt::format("{}.{}", where, key), value.dump(), found == nullptr ? Json() : *found);
  }
}

void RequireObject(const Json& value, const std::string& where) {
  if (value.is_object()) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected an object, found {}", where, Describe(value)));
}

KvScheme ParseSchemeObject(const Json& scheme, const std::string& where) {
  if (scheme == Json("static")) return {};  // AutoFP8
  if (scheme.is_string()) Unsupported(where, "an object or \"static\"", scheme);
  RequireObject(scheme, where);
  Require(scheme, "num_bits", 8, false, where);
  Require(scheme, "type", "float", false, where);
  Require(scheme, "dynamic", false, true, where);
  Require(scheme, "symmetric", true, true, where);
  const Json* strategy = Find(scheme, "strategy");
  if (strategy == nullptr || *strategy == Json("tensor")) return {};
  if (*strategy != Json("attn_head")) {
    Unsupported(where + ".strategy", "\"tensor\" or \"attn_head\"", *strategy);
  }
  return {.format = KvFormat::kFp8E4M3, .strategy = KvScaleStrategy::kHead};
}

// Quark's groups are patterns such as "*k_proj"; a star stands for any beginning.
bool Matches(std::string_view name, std::string_view pattern) {
  if (!pattern.starts_with('*')) return name == pattern;
  return name.ends_with(pattern.substr(1));
}

std::optional<KvScheme> ParseQuark(const Json& config, const std::string& source) {
  const Json* exported = Find(config, "export");
  const Json* group =
      exported != nullptr && exported->is_object() ? Find(*exported, "kv_cache_group") : nullptr;
  if (group == nullptr || group->empty()) return std::nullopt;
  const Json* layers = Find(config, "layer_quant_config");
  const std::string where = source + ": layer_quant_config";
  if (layers == nullptr) RequireObject(Json(), where);
  RequireObject(*layers, where);
  for (const Json& pattern : *group) {
    if (!pattern.is_string()) Unsupported(source + ": export.kv_cache_group", "names", pattern);
    const auto& text = pattern.get_ref<const std::string&>();
    bool any = false;
    for (const auto& [name, layer] : layers->items()) {
      if (!Matches(name, text)) continue;
      any = true;
      const std::string tensors = fmt::format("{}.{}.output_tensors", where, Quote(name));
      RequireObject(layer, fmt::format("{}.{}", where, Quote(name)));
      const Json* output = Find(layer, "output_tensors");
      if (output == nullptr) RequireObject(Json(), tensors);
      RequireObject(*output, tensors);
      Require(*output, "dtype", "fp8_e4m3", false, tensors);
      Require(*output, "qscheme", "per_tensor", false, tensors);
      Require(*output, "is_dynamic", false, true, tensors);
    }
    if (!any) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: export.kv_cache_group names {}, but layer_quant_config has no "
                              "such entry",
                              source, Quote(text)));
    }
  }
  return KvScheme{};
}

}  // namespace

std::optional<KvScheme> ParseKvCacheScheme(const Json& config, const std::string& source) {
  RequireObject(config, source);
  if (const Json* inner = Find(config, "quantization")) {
    return ParseKvCacheScheme(*inner, source + ": quantization");
  }
  if (const Json* scheme = Find(config, "kv_cache_scheme")) {
    return ParseSchemeObject(*scheme, source + ": kv_cache_scheme");
  }
  if (const Json* algorithm = Find(config, "kv_cache_quant_algo")) {
    if (*algorithm != Json("FP8")) {
      Unsupported(source + ": kv_cache_quant_algo", "\"FP8\"", *algorithm);
    }
    return KvScheme{};
  }
  const Json* method = Find(config, "quant_method");
  if (method != nullptr && *method == Json("quark")) return ParseQuark(config, source);
  return std::nullopt;
}

}  // namespace octavo
