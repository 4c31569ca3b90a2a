// Reading large JSON files with errors that name the place.
//
// A JsonValue knows where it stands ("tokenizer.json: model.vocab"); reading it as what it is not
// throws Error: "<where>: expected a string, found 3". Depth is bounded while parsing. simdjson is
// used because tokenizer.json runs to tens of megabytes. Only the files that read tokenizer.json
// include this header (simdjson.h compiles slowly).
#pragma once

#include <simdjson.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace octavo {

class JsonValue {
 public:
  JsonValue(simdjson::dom::element element, std::string where)
      : element_(element), where_(std::move(where)) {}

  // Of an object. Find: nothing if the key is absent or its value is null. Get: that is an error.
  std::optional<JsonValue> Find(std::string_view key) const;
  JsonValue Get(std::string_view key) const;

  std::string_view String() const;
  bool Bool() const;
  int64_t Integer(int64_t least, int64_t most) const;
  std::vector<JsonValue> Array() const;

  bool IsString() const { return element_.is_string(); }
  bool IsObject() const { return element_.is_object(); }
  bool IsArray() const { return element_.is_array(); }

  // With a default for a key that is absent or null.
  std::string_view StringOr(std::string_view key, std::string_view otherwise) const;
  bool BoolOr(std::string_view key, bool otherwise) const;

  // Throws kInvalidArgument: "<where>: expected <what>, found <this value>".
  [[noreturn]] void Expected(std::string_view what) const;
  // Throws kUnsupported in the same form.
  [[noreturn]] void Unsupported(std::string_view what) const;

  const std::string& where() const { return where_; }
  const simdjson::dom::element& element() const { return element_; }

 private:
  simdjson::dom::element element_;
  std::string where_;
};

class JsonDocument {
 public:
  // Throws Error if `text` is not JSON or nests too deeply.
  JsonDocument(std::string_view text, const std::string& name);

  const JsonValue& root() const { return *root_; }

 private:
  simdjson::padded_string text_;
  simdjson::dom::parser parser_;
  std::optional<JsonValue> root_;
};

}  // namespace octavo
