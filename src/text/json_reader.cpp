#include "text/json_reader.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "io/json.h"

namespace octavo {
namespace {

// Real files nest 8 deep.
constexpr size_t kMaxDepth = 64;

std::string DescribeElement(const simdjson::dom::element& element) {
  using Type = simdjson::dom::element_type;
  switch (element.type()) {
    case Type::ARRAY:
      return "an array";
    case Type::OBJECT:
      return "an object";
    case Type::NULL_VALUE:
      return "null";
    case Type::BOOL:
      return element.get_bool().value_unsafe() ? "true" : "false";
    case Type::INT64:
      return fmt::format("{}", element.get_int64().value_unsafe());
    case Type::UINT64:
      return fmt::format("{}", element.get_uint64().value_unsafe());
    case Type::DOUBLE:
      return fmt::format("{}", element.get_double().value_unsafe());
    case Type::STRING:
      return Quote(element.get_string().value_unsafe());
  }
  return "something else";
}

}  // namespace

std::optional<JsonValue> JsonValue::Find(std::string_view key) const {
  simdjson::dom::object object;
  if (element_.get(object) != simdjson::SUCCESS) Expected("an object");
  simdjson::dom::element member;
  if (object.at_key(key).get(member) != simdjson::SUCCESS || member.is_null()) return std::nullopt;
  // "name: " ends where the path in the document begins.
  return JsonValue(member, fmt::format("{}{}{}", where_, where_.ends_with(": ") ? "" : ".", key));
}

JsonValue JsonValue::Get(std::string_view key) const {
  std::optional<JsonValue> member = Find(key);
  if (member) return *std::move(member);
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}{}{}: expected a value, found none", where_,
                          where_.ends_with(": ") ? "" : ".", key));
}

std::string_view JsonValue::String() const {
  std::string_view value;
  if (element_.get(value) != simdjson::SUCCESS) Expected("a string");
  return value;
}

bool JsonValue::Bool() const {
  bool value = false;
  if (element_.get(value) != simdjson::SUCCESS) Expected("true or false");
  return value;
}

int64_t JsonValue::Integer(int64_t least, int64_t most) const {
  int64_t value = 0;
  if (element_.get(value) != simdjson::SUCCESS || value < least || value > most) {
    Expected(fmt::format("a whole number from {} to {}", least, most));
  }
  return value;
}

std::vector<JsonValue> JsonValue::Array() const {
  simdjson::dom::array array;
  if (element_.get(array) != simdjson::SUCCESS) Expected("an array");
  std::vector<JsonValue> values;
  for (simdjson::dom::element element : array) {
    values.emplace_back(element, fmt::format("{}[{}]", where_, values.size()));
  }
  return values;
}

std::string_view JsonValue::StringOr(std::string_view key, std::string_view otherwise) const {
  const auto value = Find(key);
  return value ? value->String() : otherwise;
}

bool JsonValue::BoolOr(std::string_view key, bool otherwise) const {
  const auto value = Find(key);
  return value ? value->Bool() : otherwise;
}

void JsonValue::Expected(std::string_view what) const {
  const std::string_view separator = where_.ends_with(": ") ? "" : ": ";
  throw Error(ErrorCode::kInvalidArgument, fmt::format("{}{}expected {}, found {}", where_,
                                                       separator, what, DescribeElement(element_)));
}

void JsonValue::Unsupported(std::string_view what) const {
  const std::string_view separator = where_.ends_with(": ") ? "" : ": ";
  throw Error(ErrorCode::kUnsupported, fmt::format("{}{}expected {}, found {}", where_, separator,
                                                   what, DescribeElement(element_)));
}

JsonDocument::JsonDocument(std::string_view text, const std::string& name) : text_(text) {
  simdjson::error_code code = parser_.allocate(std::max<size_t>(text.size(), 64), kMaxDepth);
  simdjson::dom::element root;
  if (code == simdjson::SUCCESS) code = parser_.parse(text_).get(root);
  if (code != simdjson::SUCCESS) {
    const std::string found = code == simdjson::DEPTH_ERROR
                                  ? fmt::format("more than {} levels of nesting", kMaxDepth)
                                  : std::string(simdjson::error_message(code));
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected JSON, found {} bytes that are not: {}", name, text.size(),
                            found));
  }
  root_.emplace(root, name + ": ");
}

}  // namespace octavo
