// Typed, checked access to the fields of a config.json object. Every error names the file and the
// field, what was expected and what was found. "Missing" and null differ in transformers, so they
// differ here: a default stands for a missing field.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "base/error.h"
#include "io/json.h"

namespace octavo {

// The value, if it is an integer in [least, most].
std::optional<int64_t> AsInt(const Json& value, int64_t least, int64_t most);

class ConfigReader {
 public:
  // `source` is the file; `path` the way to this object within it ("text_config."). `object` must
  // outlive the reader.
  ConfigReader(const Json& object, std::string source, std::string path = "");

  const std::string& source() const { return source_; }
  const Json& json() const { return object_; }

  const Json* Find(std::string_view key) const;  // null pointer: missing
  bool Has(std::string_view key) const;          // there and not null
  bool WasAsked(std::string_view key) const { return asked_.contains(key); }  // before

  // Integers in [least, most]; numbers in [least, most].
  int64_t Int(std::string_view key, int64_t least, int64_t most) const;
  int64_t Int(std::string_view key, int64_t least, int64_t most,
              std::optional<int64_t> missing) const;
  std::optional<int64_t> NullableInt(std::string_view key, int64_t least, int64_t most,
                                     std::optional<int64_t> missing = std::nullopt) const;
  double Number(std::string_view key, double least, double most,
                std::optional<double> missing = std::nullopt) const;
  std::optional<double> NullableNumber(std::string_view key, double least, double most,
                                       std::optional<double> missing = std::nullopt) const;
  bool Bool(std::string_view key, bool missing) const;
  std::string String(std::string_view key, std::optional<std::string> missing = std::nullopt) const;
  std::optional<ConfigReader> Object(std::string_view key) const;  // nullopt: missing or null
  const Json* Array(std::string_view key) const;                   // null pointer: missing or null

  [[noreturn]] void Fail(std::string_view key, std::string_view what,
                         ErrorCode code = ErrorCode::kInvalidArgument) const;
  [[noreturn]] void FailExpected(std::string_view key, std::string_view expected,
                                 const Json* found) const;

 private:
  const Json& object_;
  std::string source_, path_;
  mutable std::set<std::string, std::less<>> asked_;
};

}  // namespace octavo
