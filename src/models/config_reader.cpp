#include "models/config_reader.h"

#include <cmath>

#include <fmt/format.h>

namespace octavo {

std::optional<int64_t> AsInt(const Json& value, int64_t least, int64_t most) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX) return std::nullopt;
  const int64_t integer = value.get<int64_t>();
  return integer >= least && integer <= most ? std::optional(integer) : std::nullopt;
}

ConfigReader::ConfigReader(const Json& object, std::string source, std::string path)
    : object_(object), source_(std::move(source)), path_(std::move(path)) {
  if (!object.is_object()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: {}expected an object, found {}", source_,
                            path_.empty() ? "" : path_.substr(0, path_.size() - 1) + ": ",
                            Describe(object)));
  }
}

const Json* ConfigReader::Find(std::string_view key) const {
  asked_.emplace(key);
  const auto it = object_.find(key);
  return it == object_.end() ? nullptr : &*it;
}

bool ConfigReader::Has(std::string_view key) const {
  const Json* value = Find(key);
  return value && !value->is_null();
}

int64_t ConfigReader::Int(std::string_view key, int64_t least, int64_t most) const {
  const Json* value = Find(key);
  const auto integer = value ? AsInt(*value, least, most) : std::nullopt;
  if (!integer) FailExpected(key, fmt::format("an integer from {} to {}", least, most), value);
  return *integer;
}

int64_t ConfigReader::Int(std::string_view key, int64_t least, int64_t most,
                          std::optional<int64_t> missing) const {
  return missing && !Find(key) ? *missing : Int(key, least, most);
}

std::optional<int64_t> ConfigReader::NullableInt(std::string_view key, int64_t least, int64_t most,
                                                 std::optional<int64_t> missing) const {
  if (!Find(key)) return missing;
  return Has(key) ? std::optional(Int(key, least, most)) : std::nullopt;
}

double ConfigReader::Number(std::string_view key, double least, double most,
                            std::optional<double> missing) const {
  const Json* value = Find(key);
  if (!value && missing) return *missing;
  const double number = value && value->is_number() ? value->get<double>() : NAN;
  if (!(number >= least && number <= most)) {
    FailExpected(key, fmt::format("a number from {:g} to {:g}", least, most), value);
  }
  return number;
}

std::optional<double> ConfigReader::NullableNumber(std::string_view key, double least, double most,
                                                   std::optional<double> missing) const {
  if (!Find(key)) return missing;
  return Has(key) ? std::optional(Number(key, least, most)) : std::nullopt;
}

bool ConfigReader::Bool(std::string_view key, bool missing) const {
  const Json* value = Find(key);
  if (!value) return missing;
  if (!value->is_boolean()) FailExpected(key, "true or false", value);
  return value->get<bool>();
}

std::string ConfigReader::String(std::string_view key, std::optional<std::string> missing) const {
  const Json* value = Find(key);
  if (!value && missing) return *missing;
  if (!value || !value->is_string()) FailExpected(key, "a string", value);
  return value->get<std::string>();
}

std::optional<ConfigReader> ConfigReader::Object(std::string_view key) const {
  if (!Has(key)) return std::nullopt;
  return ConfigReader(*Find(key), source_, fmt::format("{}{}.", path_, key));
}

const Json* ConfigReader::Array(std::string_view key) const {
  if (!Has(key)) return nullptr;
  const Json* value = Find(key);
  if (!value->is_array()) FailExpected(key, "an array", value);
  return value;
}

void ConfigReader::Fail(std::string_view key, std::string_view what, ErrorCode code) const {
  throw Error(code, fmt::format("{}: {}{}: {}", source_, path_, key, what));
}

void ConfigReader::FailExpected(std::string_view key, std::string_view expected,
                                const Json* found) const {
  Fail(key, fmt::format("expected {}, found {}", expected, found ? Describe(*found) : "nothing"));
}

}  // namespace octavo
