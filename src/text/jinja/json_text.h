// json.dumps of values, as transformers' tojson filter calls it.
#pragma once

#include <optional>
#include <string>

#include "text/jinja/value.h"

namespace octavo::jinja {

struct JsonStyle {
  bool ensure_ascii = false;
  bool sort_keys = false;
  std::optional<std::string> indent;  // one level of it; nothing: all on one line
  std::string item_separator = ", ", key_separator = ": ";
};

// Throws TypeError for what JSON cannot hold.
std::string ToJson(Heap& heap, const Value& value, const JsonStyle& style);

}  // namespace octavo::jinja
