#include "text/jinja/json_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "text/jinja/numbers.h"
#include "text/jinja/operators.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

class Writer {
 public:
  Writer(Heap* heap, const JsonStyle& style) : heap_(*heap), style_(style) {}

  void Write(const Value& value, int level) {
    if (out_.size() > charged_) {
      heap_.WorkOnBytes(out_.size() - charged_);
      heap_.Reserve(out_.size());
      charged_ = out_.size();
    }
    switch (value.kind()) {
      case Kind::kNone:
        out_ += "null";
        return;
      case Kind::kBool:
        out_ += value.bool_value() ? "true" : "false";
        return;
      case Kind::kInt:
        out_ += IntText(value.int_value());
        return;
      case Kind::kFloat:
        out_ += NumberText(value.float_value());
        return;
      case Kind::kString:
        WriteString(value.text());
        return;
      case Kind::kList:
      case Kind::kTuple:
        WriteList(value.items(), level);
        return;
      case Kind::kDict:
        WriteDict(value.As<Dict>(), level);
        return;
      default:
        ThrowTypeError(fmt::format("Object of type {} is not JSON serializable", TypeName(value)));
    }
  }

  std::string Take() { return std::move(out_); }

 private:
  static std::string NumberText(double value) {
    if (std::isnan(value)) return "NaN";
    if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
    return FloatText(value);
  }

  void NewLine(int level) {
    if (!style_.indent) return;
    out_ += '\n';
    heap_.Reserve(out_.size() + level * style_.indent->size());
    for (int i = 0; i < level; ++i) out_ += *style_.indent;
  }

  void WriteList(const Values& items, int level) {
    if (items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[';
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      NewLine(level + 1);
      Write(items[i], level + 1);
    }
    NewLine(level);
    out_ += ']';
  }

  static std::string KeyText(const Value& key) {
    switch (key.kind()) {
      case Kind::kString:
        return key.text();
      case Kind::kNone:
        return "null";
      case Kind::kBool:
        return key.bool_value() ? "true" : "false";
      case Kind::kInt:
        return IntText(key.int_value());
      case Kind::kFloat:
        return NumberText(key.float_value());
      default:
        ThrowTypeError(
            fmt::format("keys must be str, int, float, bool or None, not {}", TypeName(key)));
    }
  }

  void WriteDict(const Dict& dict, int level) {
    if (dict.entries().empty()) {
      out_ += "{}";
      return;
    }
    std::vector<const Dict::Entry*> entries;
    for (const Dict::Entry& entry : dict.entries()) entries.push_back(&entry);
    if (style_.sort_keys) {
      std::ranges::stable_sort(entries, [](const auto* a, const auto* b) {
        return Compare(CompareOp::kLess, a->first, b->first);
      });
    }
    out_ += '{';
    for (size_t i = 0; i < entries.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      NewLine(level + 1);
      WriteString(KeyText(entries[i]->first));
      out_ += style_.key_separator;
      Write(entries[i]->second, level + 1);
    }
    NewLine(level);
    out_ += '}';
  }

  void WriteString(const std::string& text) {
    out_ += '"';
    for (size_t at = 0; at < text.size();) {
      const size_t begin = at;
      const char32_t c = NextCodePoint(text, &at);
      if (c == '"' || c == '\\') {
        out_ += '\\';
        out_ += static_cast<char>(c);
      } else if (c < 0x20) {
        WriteControl(c);
      } else if (c < 0x7F || !style_.ensure_ascii) {
        out_.append(text, begin, at - begin);
      } else if (c == 0x7F) {
        out_ += '\x7F';
      } else if (c < 0x10000) {
        WriteEscape(c);
      } else {
        WriteEscape(0xD800 + ((c - 0x10000) >> 10));
        WriteEscape(0xDC00 + ((c - 0x10000) & 0x3FF));
      }
    }
    out_ += '"';
  }

  void WriteControl(char32_t c) {
    switch (c) {
      case '\n':
        out_ += "\\n";
        break;
      case '\r':
        out_ += "\\r";
        break;
      case '\t':
        out_ += "\\t";
        break;
      case '\b':
        out_ += "\\b";
        break;
      case '\f':
        out_ += "\\f";
        break;
      default:
        WriteEscape(c);
    }
  }

  void WriteEscape(char32_t unit) { out_ += fmt::format("\\u{:04x}", static_cast<uint32_t>(unit)); }

  Heap& heap_;
  const JsonStyle& style_;
  std::string out_;
  size_t charged_ = 0;
};

}  // namespace

std::string ToJson(Heap& heap, const Value& value, const JsonStyle& style) {
  Writer writer(&heap, style);
  writer.Write(value, 0);
  return writer.Take();
}

}  // namespace octavo::jinja
