// Bounded JSON: files and network bodies from strangers. Depth and size are limited before anything is built, since
// nlohmann's destructor recurses.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace octavo {

using Json = nlohmann::json;

struct JsonLimits {
  size_t max_bytes = 64 << 20;
  int max_depth = 64;
};

// Errors: `source` (a path, or what the text is), then what is wrong. Rejects invalid UTF-8 and trailing text.
Json ParseJson(std::string_view text, const std::string& source, const JsonLimits& limits = {});
Json ReadJsonFile(const std::filesystem::path& path, const JsonLimits& limits = {});

}  // namespace octavo
