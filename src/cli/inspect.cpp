#include "models/inspect.h"

#include <algorithm>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/commands.h"
#include "models/config.h"

namespace octavo::cli {

int Inspect(const InspectOptions& options) {
  if (options.memory_bytes <= 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--memory: expected more than 0, found {}", options.memory_bytes));
  }
  const ModelSpec spec = ReadModelSpec(options.model);
  const int64_t length =
      options.length ? options.length : std::min<int64_t>(32768, spec.max_position_embeddings);
  if (length < 0 || length > spec.max_position_embeddings) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--length: expected 1 to max_position_embeddings, {}, found {}",
                            spec.max_position_embeddings, options.length));
  }
  fmt::print("{}: {} layers, hidden {}, vocabulary {}, up to {} tokens\n", spec.family,
             spec.layers.size(), spec.hidden, spec.vocab, spec.max_position_embeddings);
  fmt::print("{}", ToText(InspectWeights(spec)));
  if (spec.kv_cache_format)
    fmt::print("the checkpoint asks for a {} cache\n", *spec.kv_cache_format);
  fmt::print("{}", ToText(InspectCache(spec, options.memory_bytes, length)));
  return 0;
}

}  // namespace octavo::cli
