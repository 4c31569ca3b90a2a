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

}  // namespace

Json ParseJson(std::string_view text, const std::string& source, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: JSON of {} bytes, at most {} are read", source, text.size(),
                            limits.max_bytes));
  }
  std::vector<std::unordered_set<std::string>> open;  // the keys of each open object (arrays: none)
  const auto check = [&](int, Json::parse_event_t event, Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
      case Json::parse_event_t::array_start:
        open.emplace_back();
        if (open.size() > static_cast<size_t>(limits.max_depth)) {
          throw Error(ErrorCode::kInvalidArgument,
                      fmt::format("{}: JSON nested deeper than {}", source, limits.max_depth));
        }
        break;
      case Json::parse_event_t::object_end:
      case Json::parse_event_t::array_end:
        open.pop_back();
        break;
      case Json::parse_event_t::key:
        if (!open.back().insert(parsed.get_ref<const std::string&>()).second) {
          throw Error(ErrorCode::kInvalidArgument,
                      fmt::format("{}: the key {} is given twice", source,
                                  Quote(parsed.get_ref<const std::string&>())));
        }
        break;
      case Json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check);
  } catch (const Json::exception& e) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: not valid JSON: {}", source, Reason(e.what())));
  }
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
