#include "eval/variant.h"

namespace octavo {

EngineOptions WithVariant(EngineOptions options, std::string_view variant) {
  if (const size_t slash = variant.find('/'); slash != variant.npos) {
    options.kv_cache_dtype_skip_layers.emplace_back(variant.substr(slash + 1));
    variant = variant.substr(0, slash);
  }
  if (const size_t colon = variant.find(':'); colon != variant.npos) {
    options.attention_math = variant.substr(colon + 1);
    variant = variant.substr(0, colon);
  }
  options.kv_cache_dtype = variant;
  return options;
}

}  // namespace octavo
