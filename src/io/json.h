// Bounded JSON: files and network bodies from strangers. Depth and size are limited while it is
// read, since nlohmann's trees are as deep as their text.
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

// Errors: `source` (a path, or what the text is), then what is wrong. Rejects invalid UTF-8,
// trailing text, and a key given twice in one object (which of the two counts would depend on the
// reader).
Json ParseJson(std::string_view text, const std::string& source, const JsonLimits& limits = {});
Json ReadJsonFile(const std::filesystem::path& path, const JsonLimits& limits = {});

// A stranger's text as part of a one-line message: in single quotes, what is not printable ASCII as
// \xNN, shortened.
std::string Quote(std::string_view text);
// A value for a message: "null", "12", "'text'", "an array", "an object".
std::string Describe(const Json& value);

}  // namespace octavo
