#include "io/json.h"

#include <unordered_set>
#include <vector>

#include <fmt/format.h>

#include "base/error.h"
#include "io/mapped_file.h"

namespace octavo {
namespace {

// nlohmann's message without its own id and without the text it quotes (which may be long and
// binary).
std::string Reason(std::string_view what) {
  if (const size_t id = what.find("] "); id != what.npos) what.remove_prefix(id + 2);
  what = what.substr(0, what.find("; last read"));
  constexpr size_t kMaxLength = 160;
  return std::string(what.substr(0, kMaxLength));
}

// What is checked before any tree is made. nlohmann's parser could call back while it makes one,
// but then walks all of an array's elements at the end of each: hours for 8 MB of `[{},{},...`.
class Check : public nlohmann::json_sax<Json> {
 public:
  Check(const std::string& source, int max_depth) : source_(source), max_depth_(max_depth) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return Open(); }
  bool start_array(size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& key) override {
    key_ = key;
    if (!open_.back().insert(key).second) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: the key {} is given twice", source_, Quote(key)));
    }
    return true;
  }

  bool parse_error(size_t, const std::string&, const Json::exception& error) override {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: not valid JSON: {}{}", source_, Reason(error.what()),
                            key_.empty() ? "" : ", behind the key " + Quote(key_)));
  }

 private:
  bool Open() {
    open_.emplace_back();
    if (open_.size() > static_cast<size_t>(max_depth_)) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: JSON nested deeper than {}", source_, max_depth_));
    }
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  const std::string& source_;
  const int max_depth_;
  std::string key_;                                    // the last
  std::vector<std::unordered_set<std::string>> open_;  // keys of each open object (arrays: none)
};

}  // namespace

Json ParseJson(std::string_view text, const std::string& source, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: JSON of {} bytes, at most {} are read", source, text.size(),
                            limits.max_bytes));
  }
  Check check(source, limits.max_depth);
  Json::sax_parse(text, &check);
  return Json::parse(text);
}

Json ReadJsonFile(const std::filesystem::path& path, const JsonLimits& limits) {
  return ParseJson(MappedFile(path).bytes(), path.string(), limits);
}

std::string Quote(std::string_view text) {
  constexpr size_t kMaxLength = 120;
  std::string out = "'";
  for (const char c : text.substr(0, kMaxLength)) {
    if (c >= 0x20 && c < 0x7F) {
      out += c;
    } else {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return out + (text.size() > kMaxLength ? "...'" : "'");
}

std::string Describe(const Json& value) {
  switch (value.type()) {
    case Json::value_t::string:
      return Quote(value.get_ref<const std::string&>());
    case Json::value_t::array:
      return fmt::format("an array of {}", value.size());
    case Json::value_t::object:
      return "an object";
    default:
      return value.dump();
  }
}

}  // namespace octavo
