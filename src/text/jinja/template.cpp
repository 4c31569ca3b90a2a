#include "text/jinja/template.h"

#include <fmt/format.h>

#include <chrono>

#include "base/error.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/lexer.h"
#include "text/jinja/parser.h"
#include "text/jinja/python_text.h"
#include "text/jinja/scope.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

using Json = nlohmann::ordered_json;

ErrorCode CodeOf(Fault::Kind kind) {
  switch (kind) {
    case Fault::Kind::kError:
      return ErrorCode::kInvalidArgument;
    case Fault::Kind::kLimit:
      return ErrorCode::kResourceExhausted;
    case Fault::Kind::kUnsupported:
      return ErrorCode::kUnsupported;
  }
  return ErrorCode::kInvalidArgument;
}

// One line, of which templates and messages decide the content.
std::string OneLine(std::string_view text) {
  constexpr size_t kMost = 2000;
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const char32_t c = NextCodePoint(text, &at);
    if (begin > kMost) return out + "...";
    if (c == '\n') {
      out += "\\n";
    } else if (IsPrintable(c)) {
      out += text.substr(begin, at - begin);
    } else {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c));
    }
  }
  return out;
}

[[noreturn]] void Rethrow(const Fault& fault, const std::string& name, int line) {
  throw Error(CodeOf(fault.kind()), fmt::format("{}:{}: {}", name, line, OneLine(fault.what())));
}

Value FromText(Heap& heap, const std::string& text) {
  if (ValidUtf8Length(text) != text.size()) ThrowValueError("a text that is not UTF-8");
  return CopyString(heap, text);
}

Value FromJson(Heap& heap, const Json& json, int depth) {
  if (depth > kMaxValueDepth) {
    ThrowLimit(fmt::format("values nested deeper than {}", kMaxValueDepth));
  }
  switch (json.type()) {
    case Json::value_t::boolean:
      return Value::Bool(json.get<bool>());
    case Json::value_t::number_integer:
      return Value::Integer(json.get<int64_t>());
    case Json::value_t::number_unsigned:
      return Value::Integer(json.get<uint64_t>());
    case Json::value_t::number_float:
      return Value::Float(json.get<double>());
    case Json::value_t::string:
      return FromText(heap, json.get_ref<const std::string&>());
    case Json::value_t::array: {
      Values items;
      items.reserve(json.size());
      for (const Json& item : json) items.push_back(FromJson(heap, item, depth + 1));
      return MakeList(heap, std::move(items));
    }
    case Json::value_t::object: {
      std::vector<Dict::Entry> entries;
      entries.reserve(json.size());
      for (const auto& [key, value] : json.items()) {
        entries.emplace_back(FromText(heap, key), FromJson(heap, value, depth + 1));
      }
      return MakeDict(heap, std::move(entries));
    }
    case Json::value_t::null:
    case Json::value_t::binary:
    case Json::value_t::discarded:
      return Value::None();
  }
  return Value::None();
}

}  // namespace

std::tm LocalTime() {
  const std::time_t now = std::time(nullptr);
  std::tm local = {};
  localtime_r(&now, &local);
  return local;
}

Template::Template(std::string_view source, std::string name, const Limits& limits)
    : name_(std::move(name)), limits_(limits) {
  constexpr int kFirstLine = 1;
  try {
    if (source.size() > limits_.max_source_bytes) {
      ThrowLimit(fmt::format("a template of {} bytes, at most {} are read", source.size(),
                             limits_.max_source_bytes));
    }
    if (const size_t valid = ValidUtf8Length(source); valid != source.size()) {
      ThrowValueError(fmt::format("expected UTF-8, found none at byte {}", valid));
    }
    std::unique_ptr<Program> program = Parse(source);
    Resolve(program.get());
    program_ = std::move(program);
  } catch (const SyntaxFault& fault) {
    Rethrow(fault, name_, fault.line());
  } catch (const Fault& fault) {
    Rethrow(fault, name_, kFirstLine);
  }
}

Template::Template(Template&&) noexcept = default;
Template& Template::operator=(Template&&) noexcept = default;
Template::~Template() = default;

std::string Template::Render(const Json& variables, const std::tm& now,
                             const std::atomic<bool>* abandoned) const {
  OCTAVO_CHECK(variables.is_object());
  Heap heap(limits_, abandoned);
  int line = 1;
  try {
    Interpreter interpreter(*program_, FromJson(heap, variables, 0), now, &heap);
    try {
      return interpreter.Run();
    } catch (const Fault&) {
      line = interpreter.line();
      throw;
    }
  } catch (const Fault& fault) {
    Rethrow(fault, name_, line);
  }
}

}  // namespace octavo::jinja
