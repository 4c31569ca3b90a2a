#include "text/jinja/format.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "text/jinja/attributes.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/numbers.h"
#include "text/jinja/operators.h"
#include "text/jinja/python_text.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

// Digits after the point, and the width of a number: beyond is no format but an attack.
constexpr int64_t kMaxPrecision = 1000;
constexpr int64_t kMaxWidth = 1 << 20;

struct Spec {
  std::string fill = " ";
  char align = '\0';  // '<', '>', '^', '='; '\0': the type's own
  char sign = '-';    // '-', '+', ' '
  bool alternate = false;
  bool zero = false;
  char grouping = '\0';
  int64_t width = 0;
  std::optional<int64_t> precision;
  char type = '\0';
};

size_t CodePoints(std::string_view text) {
  return std::ranges::count_if(text, [](char c) { return (c & 0xC0) != 0x80; });
}

bool IsAsciiDigit(char c) { return c >= '0' && c <= '9'; }

int64_t TakeNumber(std::string_view* text, int64_t most) {
  int64_t number = 0;
  while (!text->empty() && IsAsciiDigit(text->front())) {
    number = number * 10 + (text->front() - '0');
    if (number > most) ThrowLimit(fmt::format("a width or precision of more than {}", most));
    text->remove_prefix(1);
  }
  return number;
}

bool TakeChar(std::string_view* text, char c) {
  if (!text->starts_with(c)) return false;
  text->remove_prefix(1);
  return true;
}

std::string Pad(const std::string& body, const Spec& spec, char own_align) {
  const auto length = static_cast<int64_t>(CodePoints(body));
  if (length >= spec.width) return body;
  const int64_t missing = spec.width - length;
  const char align = spec.align == '\0' ? own_align : spec.align;
  const int64_t left = align == '<' ? 0 : align == '^' ? missing / 2 : missing;
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += spec.fill;
  out += body;
  for (int64_t i = left; i < missing; ++i) out += spec.fill;
  return out;
}

std::string Group(const std::string& digits, char separator, size_t every) {
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % every == 0) out += separator;
    out += digits[i];
  }
  return out;
}

// Sign, prefix (0x), digits before the point, and the rest, put together and padded.
std::string PadNumber(bool negative, const std::string& prefix, std::string whole,
                      const std::string& rest, const Spec& spec, size_t group) {
  std::string head = negative ? "-" : spec.sign == '-' ? "" : std::string(1, spec.sign);
  head += prefix;
  const bool inside = spec.align == '=' || (spec.align == '\0' && spec.zero);
  const std::string fill = spec.zero && spec.align == '\0' ? "0" : spec.fill;
  if (spec.grouping != '\0') {
    // Zeros that fill are grouped too.
    std::string grouped = Group(whole, spec.grouping, group);
    while (inside && fill == "0" &&
           static_cast<int64_t>(head.size() + grouped.size() + rest.size()) < spec.width) {
      whole.insert(0, 1, '0');
      grouped = Group(whole, spec.grouping, group);
    }
    whole = grouped;
  }
  if (!inside) return Pad(head + whole + rest, spec, '>');
  const auto length = static_cast<int64_t>(head.size() + whole.size() + rest.size());
  for (int64_t i = length; i < spec.width; ++i) head += fill;
  return head + whole + rest;
}

// Without its sign.
std::string FloatDigits(double value, char type, std::optional<int64_t> precision, bool alternate) {
  if (!std::isfinite(value)) {
    const std::string text = std::isnan(value) ? "nan" : "inf";
    return type == 'E' || type == 'F' || type == 'G' ? Upper(text) : text;
  }
  if (type == '\0' && !precision) return FloatText(value);
  int64_t digits = precision.value_or(6);
  if (type == '%') return fmt::format("{:.{}f}%", value * 100, digits);
  if (type == '\0' || type == 'n') {
    if (digits == 0) digits = 1;
    std::string text = fmt::format("{:.{}g}", value, digits);
    if (type == '\0' && text.find_first_of(".e") == text.npos) text += ".0";
    return text;
  }
  if ((type == 'g' || type == 'G') && digits == 0) digits = 1;
  const std::string spec = fmt::format("{{:{}.{}{}}}", alternate ? "#" : "", digits, type);
  return fmt::format(fmt::runtime(spec), value);
}

std::string FormatFloat(double value, const Spec& spec) {
  const bool negative = std::signbit(value) && !std::isnan(value);
  const std::string text = FloatDigits(std::fabs(value), spec.type, spec.precision, spec.alternate);
  const size_t point = std::min(text.find_first_not_of("0123456789"), text.size());
  return PadNumber(negative, "", text.substr(0, point), text.substr(point), spec, 3);
}

int BaseOf(char type) {
  switch (type) {
    case 'b':
      return 2;
    case 'o':
      return 8;
    case 'x':
    case 'X':
      return 16;
    default:
      return 10;
  }
}

std::string FormatInt(Int value, const Spec& spec) {
  const int base = BaseOf(spec.type);
  std::string digits = IntText(value, base);
  const bool negative = value < 0;
  if (negative) digits.erase(0, 1);
  std::string prefix = spec.alternate && base != 10 ? std::string("0") + spec.type : "";
  if (spec.type == 'X') digits = Upper(digits);
  return PadNumber(negative, prefix, digits, "", spec, base == 10 ? 3 : 4);
}

std::string CharacterOf(Int value) {
  if (value < 0 || value > 0x10FFFF) {
    throw Fault("OverflowError", "%c arg not in range(0x110000)");
  }
  if (value >= 0xD800 && value < 0xE000) ThrowUnsupported("surrogates are no characters");
  std::string out;
  AppendUtf8(static_cast<char32_t>(value), &out);
  return out;
}

std::string Truncated(const std::string& text, const Spec& spec) {
  if (!spec.precision || *spec.precision >= static_cast<int64_t>(CodePoints(text))) return text;
  return text.substr(0, ByteOffset(text, *spec.precision, false));
}

Spec ParseSpec(std::string_view text, const Value& value) {
  Spec spec;
  const auto is_align = [](char c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  if (!text.empty()) {
    size_t after_first = 0;
    NextCodePoint(text, &after_first);
    if (after_first < text.size() && is_align(text[after_first])) {
      spec.fill = text.substr(0, after_first);
      spec.align = text[after_first];
      text.remove_prefix(after_first + 1);
    } else if (is_align(text[0])) {
      spec.align = text[0];
      text.remove_prefix(1);
    }
  }
  for (char sign : {'+', '-', ' '}) {
    if (TakeChar(&text, sign)) {
      spec.sign = sign;
      break;
    }
  }
  spec.alternate = TakeChar(&text, '#');
  spec.zero = TakeChar(&text, '0');
  spec.width = TakeNumber(&text, kMaxWidth);
  for (char separator : {',', '_'}) {
    if (TakeChar(&text, separator)) spec.grouping = separator;
  }
  if (TakeChar(&text, '.')) {
    if (text.empty() || !IsAsciiDigit(text[0]))
      ThrowValueError("Format specifier missing precision");
    spec.precision = TakeNumber(&text, kMaxPrecision);
  }
  if (text.size() > 1) {
    ThrowValueError(
        fmt::format("Invalid format specifier for object of type '{}'", TypeName(value)));
  }
  if (!text.empty()) spec.type = text[0];
  if (spec.zero && spec.align != '\0' && spec.fill == " ") spec.fill = "0";
  return spec;
}

[[noreturn]] void ThrowUnknownCode(char code, const Value& value) {
  ThrowValueError(
      fmt::format("Unknown format code '{}' for object of type '{}'", code, TypeName(value)));
}

// format(value, text).
std::string Format(const Value& value, std::string_view text) {
  if (text.empty()) return Str(value);
  if (value.IsString()) {
    Spec spec = ParseSpec(text, value);
    if (spec.type != '\0' && spec.type != 's') ThrowUnknownCode(spec.type, value);
    if (spec.sign != '-') ThrowValueError("Sign not allowed in string format specifier");
    if (spec.align == '=') {
      ThrowValueError("'=' alignment not allowed in string format specifier");
    }
    if (spec.zero && spec.align == '\0') {
      spec.fill = "0";
      spec.align = '<';
    }
    return Pad(Truncated(value.text(), spec), spec, '<');
  }
  if (!value.IsNumber()) {
    if (value.IsUndefined()) ThrowUndefined(value);
    ThrowTypeError(
        fmt::format("unsupported format string passed to {}.__format__", TypeName(value)));
  }
  const Spec spec = ParseSpec(text, value);
  constexpr std::string_view kFloatTypes = "eEfFgG%";
  const bool as_float = kFloatTypes.find(spec.type) != kFloatTypes.npos && spec.type != '\0';
  if (value.Is(Kind::kFloat) || as_float) {
    if (spec.type != '\0' && spec.type != 'n' && !as_float) ThrowUnknownCode(spec.type, value);
    return FormatFloat(value.float_value(), spec);
  }
  if (spec.precision) ThrowValueError("Precision not allowed in integer format specifier");
  if (spec.type == 'c') return Pad(CharacterOf(value.int_value()), spec, '<');
  constexpr std::string_view kIntTypes("dboxXn\0", 7);
  if (kIntTypes.find(spec.type) == kIntTypes.npos) ThrowUnknownCode(spec.type, value);
  return FormatInt(value.int_value(), spec);
}

// One conversion of the % operator, after its name.
class PercentFormatter {
 public:
  PercentFormatter(Heap* heap, const Value& text, const Value& arguments)
      : heap_(*heap), text_(text.As<String>()), arguments_(arguments), rest_(text_.text) {}

  std::string Run() {
    while (!rest_.empty()) {
      const size_t at = std::min(rest_.find('%'), rest_.size());
      out_ += rest_.substr(0, at);
      rest_.remove_prefix(at);
      if (!rest_.empty()) Convert();
      heap_.Reserve(out_.size());
    }
    const bool tuple = arguments_.Is(Kind::kTuple);
    const size_t given = tuple ? arguments_.items().size() : 1;
    const bool mapping = arguments_.IsDict() || arguments_.Is(Kind::kList) ||
                         arguments_.Is(Kind::kRange) || arguments_.IsUndefined();
    if (used_ < given && !mapping) {
      ThrowTypeError("not all arguments converted during string formatting");
    }
    return std::move(out_);
  }

 private:
  Value NextArgument() {
    if (arguments_.Is(Kind::kTuple)) {
      if (used_ < arguments_.items().size()) return arguments_.items()[used_++];
    } else if (used_ == 0) {
      ++used_;
      return arguments_;
    }
    ThrowTypeError("not enough arguments for format string");
  }

  std::optional<Value> TakeName() {
    if (!TakeChar(&rest_, '(')) return std::nullopt;
    int open = 1;
    size_t end = 0;
    for (; end < rest_.size() && open > 0; ++end) open += (rest_[end] == '(') - (rest_[end] == ')');
    if (open > 0) ThrowValueError("incomplete format key");
    const std::string_view name = rest_.substr(0, end - 1);
    rest_.remove_prefix(end);
    if (!arguments_.IsDict()) ThrowTypeError("format requires a mapping");
    const Value* found = arguments_.As<Dict>().Find(name);
    if (found == nullptr) {
      std::string quoted;
      AppendRepr(name, &quoted);
      throw Fault("KeyError", quoted);
    }
    return *found;
  }

  int64_t TakeSize(int64_t most) {
    if (!TakeChar(&rest_, '*')) return TakeNumber(&rest_, most);
    const Value size = NextArgument();
    if (!size.IsIntegral()) ThrowTypeError("* wants int");
    if (size.int_value() > most) {
      ThrowLimit(fmt::format("a width or precision of more than {}", most));
    }
    return static_cast<int64_t>(std::max(size.int_value(), Int{-most}));
  }

  void Convert() {
    rest_.remove_prefix(1);
    const std::optional<Value> named = TakeName();
    Spec spec;
    bool left = false;
    for (;; rest_.remove_prefix(1)) {
      if (rest_.starts_with('-')) {
        left = true;
      } else if (rest_.starts_with('+')) {
        spec.sign = '+';
      } else if (rest_.starts_with(' ')) {
        spec.sign = spec.sign == '+' ? '+' : ' ';
      } else if (rest_.starts_with('#')) {
        spec.alternate = true;
      } else if (rest_.starts_with('0')) {
        spec.zero = true;
      } else {
        break;
      }
    }
    spec.width = TakeSize(kMaxWidth);
    if (spec.width < 0) {
      left = true;
      spec.width = -spec.width;
    }
    if (TakeChar(&rest_, '.')) spec.precision = std::max<int64_t>(0, TakeSize(kMaxPrecision));
    while (rest_.starts_with('h') || rest_.starts_with('l') || rest_.starts_with('L')) {
      rest_.remove_prefix(1);
    }
    if (rest_.empty()) ThrowValueError("incomplete format");
    spec.type = rest_[0];
    rest_.remove_prefix(1);
    if (left) {
      spec.align = '<';
      spec.zero = false;
    }
    if (spec.type == '%') {
      out_ += '%';
      return;
    }
    out_ += ConvertOne(named ? *named : NextArgument(), spec);
  }

  std::string ConvertOne(const Value& value, Spec spec) {
    switch (spec.type) {
      case 's':
      case 'r':
      case 'a': {
        spec.zero = false;
        std::string text = spec.type == 's' ? Str(value) : Repr(value);
        if (spec.type == 's' && text_.markup && !(value.IsString() && value.As<String>().markup)) {
          text = EscapeText(text);
        }
        return Pad(Truncated(text, spec), spec, '>');
      }
      case 'c': {
        spec.zero = false;
        if (value.IsString()) {
          if (value.As<String>().length != 1) ThrowTypeError("%c requires int or char");
          return Pad(value.text(), spec, '>');
        }
        if (!value.IsIntegral()) ThrowTypeError("%c requires int or char");
        return Pad(CharacterOf(value.int_value()), spec, '>');
      }
      case 'd':
      case 'i':
      case 'u':
        return ConvertInt(value, spec);
      case 'o':
      case 'x':
      case 'X':
        if (!value.IsIntegral()) {
          ThrowTypeError(fmt::format("%{} format: an integer is required, not {}", spec.type,
                                     TypeName(value)));
        }
        return ConvertInt(value, spec);
      case 'e':
      case 'E':
      case 'f':
      case 'F':
      case 'g':
      case 'G':
        if (value.IsUndefined()) ThrowUndefined(value);
        if (!value.IsNumber()) {
          ThrowTypeError(fmt::format("must be real number, not {}", TypeName(value)));
        }
        return FormatFloat(value.float_value(), spec);
      default:
        ThrowValueError(fmt::format("unsupported format character '{}' ({:#x})", spec.type,
                                    static_cast<unsigned>(static_cast<unsigned char>(spec.type))));
    }
  }

  std::string ConvertInt(const Value& value, Spec spec) {
    if (value.IsUndefined()) ThrowUndefined(value);
    if (!value.IsNumber()) {
      ThrowTypeError(
          fmt::format("%{} format: a real number is required, not {}", spec.type, TypeName(value)));
    }
    const Int number = value.IsIntegral() ? value.int_value() : Truncate(value.float_value());
    std::string digits = IntText(number, BaseOf(spec.type));
    if (number < 0) digits.erase(0, 1);
    if (spec.type == 'X') digits = Upper(digits);
    if (spec.precision && static_cast<int64_t>(digits.size()) < *spec.precision) {
      digits.insert(0, *spec.precision - digits.size(), '0');
    }
    const bool prefixed = spec.alternate && BaseOf(spec.type) != 10;
    return PadNumber(number < 0, prefixed ? std::string("0") + spec.type : "", digits, "", spec, 3);
  }

  Heap& heap_;
  const String& text_;
  const Value& arguments_;
  std::string_view rest_;
  std::string out_;
  size_t used_ = 0;
};

// str.format.
class BraceFormatter {
 public:
  BraceFormatter(Interpreter* interpreter, const Arguments& arguments, bool escape)
      : interpreter_(*interpreter), arguments_(arguments), escape_(escape) {}

  // `nesting`: fields may stand in format specifications, one level deep.
  std::string Run(std::string_view text, int nesting) {
    if (nesting < 0) ThrowValueError("Max string recursion exceeded");
    std::string out;
    while (!text.empty()) {
      const size_t at = std::min(text.find_first_of("{}"), text.size());
      out += text.substr(0, at);
      text.remove_prefix(at);
      if (text.empty()) break;
      const char brace = text[0];
      text.remove_prefix(1);
      if (TakeChar(&text, brace)) {
        out += brace;
        continue;
      }
      if (brace == '}') ThrowValueError("Single '}' encountered in format string");
      out += Field(TakeField(&text), nesting);
      interpreter_.heap().Reserve(out.size());
    }
    interpreter_.heap().WorkOnBytes(out.size());
    return out;
  }

 private:
  // What stands before the brace that closes the field.
  static std::string_view TakeField(std::string_view* text) {
    int open = 1;
    for (size_t at = 0; at < text->size(); ++at) {
      open += ((*text)[at] == '{') - ((*text)[at] == '}');
      if (open > 0) continue;
      const std::string_view field = text->substr(0, at);
      text->remove_prefix(at + 1);
      return field;
    }
    if (text->empty()) ThrowValueError("Single '{' encountered in format string");
    ThrowValueError("expected '}' before end of string");
  }

  std::string Field(std::string_view field, int nesting) {
    size_t end = 0;
    for (bool bracket = false; end < field.size(); ++end) {
      if (field[end] == '[') bracket = true;
      if (field[end] == ']') bracket = false;
      if (!bracket && (field[end] == ':' || field[end] == '!')) break;
    }
    Value value = Lookup(field.substr(0, end));
    field.remove_prefix(end);
    bool converted = false;
    if (TakeChar(&field, '!')) {
      if (field.empty()) ThrowValueError("end of string while looking for conversion specifier");
      value = Convert(value, field[0]);
      converted = true;
      field.remove_prefix(1);
      if (!field.empty() && field[0] != ':') {
        ThrowValueError("expected ':' after conversion specifier");
      }
    }
    if (!field.empty()) field.remove_prefix(1);
    const std::string spec = Run(field, nesting - 1);
    if (escape_ && value.IsString() && !converted && spec.empty()) {
      return Escape(interpreter_.heap(), value).text();
    }
    const std::string text = Format(value, spec);
    return escape_ ? EscapeText(text) : text;
  }

  Value Convert(const Value& value, char conversion) {
    switch (conversion) {
      case 's':
        return MakeString(interpreter_.heap(), Str(value));
      case 'r':
      case 'a':
        return MakeString(interpreter_.heap(), Repr(value));
      default:
        ThrowValueError(fmt::format("Unknown conversion specifier {}", conversion));
    }
  }

  Value Lookup(std::string_view path) {
    const size_t end = std::min(path.find_first_of(".["), path.size());
    Value value = First(path.substr(0, end));
    path.remove_prefix(end);
    while (!path.empty()) {
      const bool item = path[0] == '[';
      path.remove_prefix(1);
      const size_t stop = std::min(item ? path.find(']') : path.find_first_of(".["), path.size());
      const std::string_view name = path.substr(0, stop);
      if (name.empty()) ThrowValueError("Empty attribute in format string");
      if (item && stop == path.size()) ThrowValueError("Missing ']' in format string");
      path.remove_prefix(item ? stop + 1 : stop);
      Heap& heap = interpreter_.heap();
      const bool number = item && std::ranges::all_of(name, IsAsciiDigit);
      const Value key = number ? Value::Integer(*ParseInt(name)) : CopyString(heap, name);
      value = item ? GetItem(interpreter_, value, key) : GetAttribute(interpreter_, value, key);
    }
    return value;
  }

  Value First(std::string_view name) {
    if (name.empty()) {
      if (numbering_ == Numbering::kManual) {
        ThrowValueError(
            "cannot switch from manual field specification to automatic field numbering");
      }
      numbering_ = Numbering::kAutomatic;
      return At(next_++);
    }
    if (std::ranges::all_of(name, IsAsciiDigit)) {
      if (numbering_ == Numbering::kAutomatic) {
        ThrowValueError(
            "cannot switch from manual field specification to automatic field numbering");
      }
      numbering_ = Numbering::kManual;
      const Int index = *ParseInt(name);
      return At(index > Int{1} << 60 ? size_t{1} << 60 : static_cast<size_t>(index));
    }
    for (const auto& [key, value] : arguments_.named) {
      if (key == name) return value;
    }
    std::string quoted;
    AppendRepr(name, &quoted);
    throw Fault("KeyError", quoted);
  }

  Value At(size_t index) const {
    if (index < arguments_.positional.size()) return arguments_.positional[index];
    throw Fault("IndexError",
                fmt::format("Replacement index {} out of range for positional args tuple", index));
  }

  enum class Numbering { kUnknown, kAutomatic, kManual };

  Interpreter& interpreter_;
  const Arguments& arguments_;
  const bool escape_;
  Numbering numbering_ = Numbering::kUnknown;
  size_t next_ = 0;
};

}  // namespace

Value FormatPercent(Heap& heap, const Value& text, const Value& arguments) {
  PercentFormatter formatter(&heap, text, arguments);
  return MakeString(heap, formatter.Run(), text.As<String>().markup);
}

Value FormatBraces(Interpreter& interpreter, const Value& text, const Arguments& arguments) {
  const bool markup = text.As<String>().markup;
  BraceFormatter formatter(&interpreter, arguments, markup);
  constexpr int kNesting = 1;
  return MakeString(interpreter.heap(), formatter.Run(text.text(), kNesting), markup);
}

}  // namespace octavo::jinja
