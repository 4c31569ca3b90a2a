// Filters whose result is one text or one number.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "text/jinja/attributes.h"
#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/json_text.h"
#include "text/jinja/numbers.h"
#include "text/jinja/operators.h"
#include "text/jinja/python_text.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

// soft_str: markup stays markup, all else becomes str.
Value SoftText(Interpreter& interpreter, const Value& value) {
  return value.IsString() ? value : interpreter.ToString(value);
}

Value Mapped(Interpreter& interpreter, const Value& value, const Arguments& arguments,
             std::string_view filter, std::string (*map)(std::string_view)) {
  const Bound bound(filter, arguments, {});
  const Value text = SoftText(interpreter, value);
  interpreter.heap().Reserve(3 * text.text().size());
  return MakeString(interpreter.heap(), map(text.text()), text.As<String>().markup);
}

Value UpperFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  return Mapped(interpreter, value, arguments, "do_upper()", Upper);
}

Value LowerFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  return Mapped(interpreter, value, arguments, "do_lower()", Lower);
}

Value CapitalizeFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  return Mapped(interpreter, value, arguments, "do_capitalize()", Capitalize);
}

// Words begin after white space, hyphens and opening brackets.
std::string TitleWords(std::string_view text) {
  std::string out;
  size_t begin = 0;
  const auto flush = [&](size_t end) {
    if (begin == end) return;
    size_t rest = begin;
    NextCodePoint(text, &rest);
    out += Upper(text.substr(begin, rest - begin));
    out += Lower(text.substr(rest, end - rest));
    begin = end;
  };
  for (size_t at = 0; at < text.size();) {
    const size_t here = at;
    const auto is_break = [](char32_t c) {
      return IsSpace(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
    };
    if (!is_break(NextCodePoint(text, &at))) continue;
    flush(here);
    while (at < text.size()) {
      size_t next = at;
      if (!is_break(NextCodePoint(text, &next))) break;
      at = next;
    }
    out += text.substr(here, at - here);
    begin = at;
  }
  flush(text.size());
  return out;
}

Value TitleFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Value text = Mapped(interpreter, value, arguments, "do_title()", TitleWords);
  return MakeString(interpreter.heap(), text.text());
}

Value TrimFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_trim()", arguments, {"chars"});
  const Value text = SoftText(interpreter, value);
  interpreter.heap().WorkOnBytes(text.text().size());
  std::string_view stripped;
  if (!bound.HasValue(0)) {
    stripped = StripSpace(text.text());
  } else {
    if (!bound[0].IsString()) ThrowTypeError("strip arg must be None or str");
    stripped = Strip(text.text(), bound[0].text(), Side::kBoth);
  }
  if (stripped.size() == text.text().size()) return text;
  return CopyString(interpreter.heap(), stripped, text.As<String>().markup);
}

Value StringFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("soft_str()", arguments, {});
  return SoftText(interpreter, value);
}

Value SafeFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_mark_safe()", arguments, {});
  const Value text = SoftText(interpreter, value);
  return CopyString(interpreter.heap(), text.text(), true);
}

Value EscapeFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("escape()", arguments, {});
  return Escape(interpreter.heap(), value);
}

Value ForceEscapeFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_forceescape()", arguments, {});
  return Escape(interpreter.heap(), interpreter.ToString(value));
}

Value ReplaceFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_replace()", arguments, {"old", "new", "count"}, 2);
  const int64_t most = bound.HasValue(2) ? ClampedIndexOf(bound[2]) : -1;
  const Value text = interpreter.ToString(value), from = interpreter.ToString(bound[0]),
              to = interpreter.ToString(bound[1]);
  interpreter.heap().WorkOnBytes(text.text().size());
  interpreter.heap().Reserve(ReplacedSize(text.text(), from.text(), to.text(), most));
  return MakeString(interpreter.heap(), Replace(text.text(), from.text(), to.text(), most));
}

Value CenterFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_center()", arguments, {"width"});
  Arguments width;
  width.positional.push_back(bound.Has(0) ? bound[0] : Value::Integer(80));
  const Value text = SoftText(interpreter, value);
  return FindMethod(text, "center")(interpreter, text, width);
}

Value IndentFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_indent()", arguments, {"width", "first", "blank"});
  if (value.IsUndefined()) ThrowUndefined(value);
  if (!value.IsString()) {
    ThrowTypeError(fmt::format("can only indent str, not {}", TypeName(value)));
  }
  Heap& heap = interpreter.heap();
  std::string indent;
  if (bound.Has(0) && bound[0].IsString()) {
    indent = bound[0].text();
    if (value.As<String>().markup && !bound[0].As<String>().markup) indent = EscapeText(indent);
  } else {
    const int64_t width = bound.Has(0) ? IndexOf(bound[0]) : 4;
    heap.Reserve(std::max<int64_t>(width, 0));
    indent.assign(std::max<int64_t>(width, 0), ' ');
  }
  const bool first = bound.Has(1) && Truth(bound[1]);
  const bool blank = bound.Has(2) && Truth(bound[2]);
  heap.WorkOnBytes(value.text().size());
  const std::string with_end = value.text() + '\n';
  std::string out = first ? indent : "";
  bool is_first = true;
  for (std::string_view line : SplitLines(with_end, false)) {
    if (!is_first) out += '\n';
    if (!is_first && (blank || !line.empty())) out += indent;
    out += line;
    heap.Reserve(out.size());
    is_first = false;
  }
  return MakeString(heap, std::move(out), value.As<String>().markup);
}

Value TruncateFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_truncate()", arguments, {"length", "killwords", "end", "leeway"});
  Heap& heap = interpreter.heap();
  const int64_t length = bound.Has(0) ? IndexOf(bound[0]) : 255;
  const Value end = bound.Has(2) ? bound[2] : CopyString(heap, "...");
  const int64_t leeway = bound.HasValue(3) ? IndexOf(bound[3]) : 5;
  const auto fail = [](std::string_view what, int64_t least, int64_t got) {
    throw Fault("AssertionError", fmt::format("expected {} >= {}, got {}", what, least, got));
  };
  if (length < Length(end)) fail("length", Length(end), length);
  if (leeway < 0) fail("leeway", 0, leeway);
  if (Int{Length(value)} <= Int{length} + leeway) return value;
  Value cut =
      Slice(heap, value, Value::None(), Value::Integer(length - Length(end)), Value::None());
  const bool kill_words = bound.Has(1) && Truth(bound[1]);
  if (!kill_words) {
    if (!cut.IsString()) ThrowTypeError("can only truncate str");
    const size_t space = cut.text().rfind(' ');
    if (space != std::string::npos) {
      cut = CopyString(heap, cut.text().substr(0, space), cut.As<String>().markup);
    }
  }
  return Binary(heap, BinaryOp::kAdd, cut, end);
}

// Runs of letters, digits and underscores.
Value WordCountFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_wordcount()", arguments, {});
  const Value text = SoftText(interpreter, value);
  interpreter.heap().WorkOnBytes(16 * text.text().size());
  int64_t count = 0;
  bool in_word = false;
  for (size_t at = 0; at < text.text().size();) {
    const char32_t c = NextCodePoint(text.text(), &at);
    std::string character;
    AppendUtf8(c, &character);
    const bool word = c == '_' || IsAll(TextClass::kAlnum, character);
    count += word && !in_word;
    in_word = word;
  }
  return Value::Integer(count);
}

Value LengthFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("len()", arguments, {});
  return Value::Integer(interpreter.LengthOf(value));
}

Value DefaultFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_default()", arguments, {"default_value", "boolean"});
  const bool falsy = bound.Has(1) && Truth(bound[1]) && !interpreter.TruthOf(value);
  if (!value.IsUndefined() && !falsy) return value;
  return bound.Has(0) ? bound[0] : CopyString(interpreter.heap(), "");
}

Value AbsFilter(Interpreter&, const Value& value, Arguments& arguments) {
  const Bound bound("abs()", arguments, {});
  if (value.IsIntegral()) {
    return value.int_value() < 0 ? Negate(value) : Value::Integer(value.int_value());
  }
  if (value.Is(Kind::kFloat)) return Value::Float(std::fabs(value.float_value()));
  if (value.IsUndefined()) ThrowUndefined(value);
  ThrowTypeError(fmt::format("bad operand type for abs(): '{}'", TypeName(value)));
}

Value IntFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_int()", arguments, {"default", "base"});
  const Value otherwise = bound.Has(0) ? bound[0] : Value::Integer(0);
  const int64_t base = bound.Has(1) ? IndexOf(bound[1]) : 10;
  if (value.IsIntegral()) return Value::Integer(value.int_value());
  if (value.IsUndefined()) ThrowUndefined(value);
  double number = 0;
  if (value.Is(Kind::kFloat)) {
    number = value.float_value();
    // Only what int() raises a ValueError for has a second chance, and that one fails too.
    if (std::isnan(number)) return otherwise;
    return Value::Integer(Truncate(number));
  }
  if (!value.IsString()) return otherwise;
  interpreter.heap().WorkOnBytes(value.text().size());
  if (base == 0 || (base >= 2 && base <= 36)) {
    if (const auto parsed = ParseInt(value.text(), static_cast<int>(base))) {
      return Value::Integer(*parsed);
    }
  }
  const auto parsed = ParseFloat(value.text());
  if (!parsed || !std::isfinite(*parsed)) return otherwise;
  return Value::Integer(Truncate(*parsed));
}

Value FloatFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_float()", arguments, {"default"});
  if (value.IsNumber()) return Value::Float(value.float_value());
  if (value.IsUndefined()) ThrowUndefined(value);
  if (value.IsString()) {
    interpreter.heap().WorkOnBytes(value.text().size());
    if (const auto parsed = ParseFloat(value.text())) return Value::Float(*parsed);
  }
  return bound.Has(0) ? bound[0] : Value::Float(0);
}

Value RoundFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_round()", arguments, {"precision", "method"});
  const std::string method = bound.Has(1) ? Str(bound[1]) : "common";
  if (method != "common" && method != "ceil" && method != "floor") {
    throw Fault("FilterArgumentError", "method must be common, ceil or floor");
  }
  const Value precision = bound.Has(0) ? bound[0] : Value::Integer(0);
  if (value.IsUndefined()) ThrowUndefined(value);
  if (!value.IsNumber()) {
    ThrowTypeError(fmt::format("type {} doesn't define __round__ method", TypeName(value)));
  }
  if (method == "common") return Round(value, IndexOf(precision));
  Heap& heap = interpreter.heap();
  const Value scale = Binary(heap, BinaryOp::kPower, Value::Integer(10), precision);
  const Value scaled = Binary(heap, BinaryOp::kMultiply, value, scale);
  const double number = scaled.float_value();
  const Value whole =
      scaled.IsIntegral()
          ? scaled
          : Value::Integer(Truncate(method == "ceil" ? std::ceil(number) : std::floor(number)));
  return Binary(heap, BinaryOp::kDivide, whole, scale);
}

Value FileSizeFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_filesizeformat()", arguments, {"binary"});
  const bool binary = bound.Has(0) && Truth(bound[0]);
  double bytes = 0;
  if (value.IsNumber()) {
    bytes = value.float_value();
  } else if (value.IsString()) {
    const auto parsed = ParseFloat(value.text());
    if (!parsed) ThrowValueError("could not convert string to float: " + Repr(value));
    bytes = *parsed;
  } else {
    if (value.IsUndefined()) ThrowUndefined(value);
    ThrowTypeError(fmt::format("float() argument must be a string or a real number, not '{}'",
                               TypeName(value)));
  }
  const double base = binary ? 1024 : 1000;
  Heap& heap = interpreter.heap();
  if (bytes == 1) return CopyString(heap, "1 Byte");
  if (bytes < base) return CopyString(heap, IntText(Truncate(bytes)) + " Bytes");
  constexpr std::string_view kPrefixes = "kMGTPEZY";
  double unit = base;
  size_t at = 0;
  do {
    unit *= base;
  } while (bytes >= unit && ++at < kPrefixes.size());
  if (at == kPrefixes.size()) --at;
  std::string prefix(1, kPrefixes[at]);
  if (binary) prefix = Upper(prefix) + "i";
  return CopyString(heap, fmt::format("{:.1f} {}B", base * bytes / unit, prefix));
}

Value FormatFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  Heap& heap = interpreter.heap();
  if (!arguments.positional.empty() && !arguments.named.empty()) {
    throw Fault("FilterArgumentError",
                "can't handle positional and keyword arguments at the same time");
  }
  const Value text = SoftText(interpreter, value);
  if (arguments.named.empty()) {
    return Binary(heap, BinaryOp::kModulo, text, MakeTuple(heap, std::move(arguments.positional)));
  }
  std::vector<Dict::Entry> entries;
  for (auto& [name, argument] : arguments.named) {
    entries.emplace_back(CopyString(heap, name), std::move(argument));
  }
  return Binary(heap, BinaryOp::kModulo, text, MakeDict(heap, std::move(entries)));
}

Value AttrFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_attr()", arguments, {"name"}, 1);
  if (!bound[0].IsString()) ThrowTypeError("attribute name must be string");
  return GetAttribute(interpreter, value, bound[0]);
}

std::string QuoteUrl(std::string_view text, bool for_query) {
  std::string out;
  for (char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       c == '_' || c == '.' || c == '-' || c == '~' || (c == '/' && !for_query);
    if (plain) {
      out += c;
    } else if (c == ' ' && for_query) {
      out += '+';
    } else {
      out += fmt::format("%{:02X}", static_cast<unsigned char>(c));
    }
  }
  return out;
}

Value UrlEncodeFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_urlencode()", arguments, {});
  Heap& heap = interpreter.heap();
  if (value.IsString() || !interpreter.IsIterable(value)) {
    const std::string text = Str(value);
    heap.Reserve(3 * text.size());
    return MakeString(heap, QuoteUrl(text, false));
  }
  const Value pairs =
      value.IsDict() ? Value(Kind::kView, new View(&heap, value, View::Part::kItems)) : value;
  std::string out;
  for (const Value& pair : interpreter.Collect(pairs)) {
    const Values parts = interpreter.Collect(pair);
    if (parts.size() != 2) ThrowValueError("urlencode wants pairs of a key and a value");
    if (!out.empty()) out += '&';
    const std::string key = Str(parts[0]), text = Str(parts[1]);
    heap.Reserve(out.size() + 3 * (key.size() + text.size()));
    out += QuoteUrl(key, true) + '=' + QuoteUrl(text, true);
  }
  return MakeString(heap, std::move(out));
}

Value XmlAttrFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_xmlattr()", arguments, {"autospace"});
  if (!value.IsDict()) ThrowTypeError("xmlattr wants a dict");
  Heap& heap = interpreter.heap();
  std::string out;
  for (const auto& [key, attribute] : value.As<Dict>().entries()) {
    if (attribute.IsNone() || attribute.IsUndefined()) continue;
    if (!key.IsString()) ThrowTypeError("expected string or bytes-like object");
    for (char c : key.text()) {
      if (IsSpace(c) || c == '/' || c == '>' || c == '=') {
        ThrowValueError("Invalid character in attribute name: " + Repr(key));
      }
    }
    if (!out.empty()) out += ' ';
    out += Escape(heap, key).text() + "=\"" + Escape(heap, attribute).text() + '"';
    heap.Reserve(out.size());
  }
  const bool space = !bound.Has(0) || Truth(bound[0]);
  return MakeString(heap, space && !out.empty() ? ' ' + out : out);
}

// transformers' own: json.dumps, without the escapes that Jinja2's adds.
Value ToJsonFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("tojson()", arguments, {"ensure_ascii", "indent", "separators", "sort_keys"});
  Heap& heap = interpreter.heap();
  JsonStyle style = {.ensure_ascii = bound.Has(0) && Truth(bound[0]),
                     .sort_keys = bound.Has(3) && Truth(bound[3])};
  if (bound.HasValue(1)) {
    if (bound[1].IsString()) {
      style.indent = bound[1].text();
    } else {
      const int64_t width = std::max<int64_t>(0, IndexOf(bound[1]));
      heap.Reserve(width);
      style.indent = std::string(width, ' ');
    }
    style.item_separator = ",";
  }
  if (bound.HasValue(2)) {
    const Values separators = interpreter.Collect(bound[2]);
    if (separators.size() != 2 || !separators[0].IsString() || !separators[1].IsString()) {
      ThrowValueError("tojson wants two separators");
    }
    style.item_separator = separators[0].text();
    style.key_separator = separators[1].text();
  }
  return MakeString(heap, ToJson(heap, value, style));
}

constexpr Builtin kFilters[] = {{"abs", AbsFilter},
                                {"attr", AttrFilter},
                                {"capitalize", CapitalizeFilter},
                                {"center", CenterFilter},
                                {"count", LengthFilter},
                                {"d", DefaultFilter},
                                {"default", DefaultFilter},
                                {"e", EscapeFilter},
                                {"escape", EscapeFilter},
                                {"filesizeformat", FileSizeFilter},
                                {"float", FloatFilter},
                                {"forceescape", ForceEscapeFilter},
                                {"format", FormatFilter},
                                {"indent", IndentFilter},
                                {"int", IntFilter},
                                {"length", LengthFilter},
                                {"lower", LowerFilter},
                                {"replace", ReplaceFilter},
                                {"round", RoundFilter},
                                {"safe", SafeFilter},
                                {"string", StringFilter},
                                {"title", TitleFilter},
                                {"tojson", ToJsonFilter},
                                {"trim", TrimFilter},
                                {"truncate", TruncateFilter},
                                {"upper", UpperFilter},
                                {"urlencode", UrlEncodeFilter},
                                {"wordcount", WordCountFilter},
                                {"xmlattr", XmlAttrFilter}};

}  // namespace

Native FindTextFilter(std::string_view name) {
  const auto found = std::ranges::find(kFilters, name, &Builtin::name);
  return found == std::end(kFilters) ? nullptr : found->function;
}

}  // namespace octavo::jinja
