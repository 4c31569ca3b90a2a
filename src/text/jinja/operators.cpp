#include "text/jinja/operators.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "text/jinja/format.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/numbers.h"
#include "text/jinja/python_text.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

// No repr is longer: values may share parts, and what is small can print long.
constexpr size_t kMaxReprBytes = size_t{64} << 20;

const char* Symbol(BinaryOp op) {
  switch (op) {
    case BinaryOp::kAdd:
      return "+";
    case BinaryOp::kSubtract:
      return "-";
    case BinaryOp::kMultiply:
      return "*";
    case BinaryOp::kDivide:
      return "/";
    case BinaryOp::kFloorDivide:
      return "//";
    case BinaryOp::kModulo:
      return "%";
    case BinaryOp::kPower:
      return "** or pow()";
  }
  return "?";
}

const char* Symbol(CompareOp op) {
  switch (op) {
    case CompareOp::kEqual:
      return "==";
    case CompareOp::kNotEqual:
      return "!=";
    case CompareOp::kLess:
      return "<";
    case CompareOp::kLessEqual:
      return "<=";
    case CompareOp::kGreater:
      return ">";
    case CompareOp::kGreaterEqual:
      return ">=";
  }
  return "?";
}

bool Holds(CompareOp op, int order) {
  switch (op) {
    case CompareOp::kEqual:
      return order == 0;
    case CompareOp::kNotEqual:
      return order != 0;
    case CompareOp::kLess:
      return order < 0;
    case CompareOp::kLessEqual:
      return order <= 0;
    case CompareOp::kGreater:
      return order > 0;
    case CompareOp::kGreaterEqual:
      return order >= 0;
  }
  return false;
}

Value Arithmetic(BinaryOp op, const Value& left, const Value& right) {
  if (op == BinaryOp::kPower) return Power(left, right);
  if (op == BinaryOp::kDivide) {
    if (right.float_value() == 0)
      throw Fault("ZeroDivisionError", left.IsIntegral() && right.IsIntegral()
                                           ? "division by zero"
                                           : "float division by zero");
    if (left.IsIntegral() && right.IsIntegral()) {  // rounded once, also beyond 53 bits
      const auto quotient =
          static_cast<long double>(left.int_value()) / static_cast<long double>(right.int_value());
      return Value::Float(static_cast<double>(quotient));
    }
    return Value::Float(left.float_value() / right.float_value());
  }
  if (left.IsIntegral() && right.IsIntegral()) {
    const Int a = left.int_value(), b = right.int_value();
    switch (op) {
      case BinaryOp::kAdd:
        return Value::Integer(AddInts(a, b));
      case BinaryOp::kSubtract:
        return Value::Integer(SubtractInts(a, b));
      case BinaryOp::kMultiply:
        return Value::Integer(MultiplyInts(a, b));
      case BinaryOp::kFloorDivide:
        return Value::Integer(FloorDivideInts(a, b));
      default:
        return Value::Integer(ModuloInts(a, b));
    }
  }
  const double a = left.float_value(), b = right.float_value();
  switch (op) {
    case BinaryOp::kAdd:
      return Value::Float(a + b);
    case BinaryOp::kSubtract:
      return Value::Float(a - b);
    case BinaryOp::kMultiply:
      return Value::Float(a * b);
    case BinaryOp::kFloorDivide:
      return Value::Float(FloorDivideFloats(a, b));
    default:
      return Value::Float(ModuloFloats(a, b));
  }
}

bool IsConcatenable(const Value& value) { return value.IsString() || value.IsSequence(); }

Value Concatenate(Heap& heap, const Value& left, const Value& right) {
  if (left.IsString() && right.IsString()) {
    const String &a = left.As<String>(), &b = right.As<String>();
    heap.Reserve(a.text.size() + b.text.size());
    if (a.markup == b.markup) return MakeString(heap, a.text + b.text, a.markup);
    return MakeString(heap, a.markup ? a.text + EscapeText(b.text) : EscapeText(a.text) + b.text,
                      true);
  }
  if (left.kind() != right.kind()) {
    ThrowTypeError(fmt::format("can only concatenate {} (not \"{}\") to {}",
                               left.IsString() ? "str" : TypeName(left), TypeName(right),
                               left.IsString() ? "str" : TypeName(left)));
  }
  const Values &a = left.items(), &b = right.items();
  heap.Reserve((a.size() + b.size()) * sizeof(Value));
  Values items;
  items.reserve(a.size() + b.size());
  items.insert(items.end(), a.begin(), a.end());
  items.insert(items.end(), b.begin(), b.end());
  return left.Is(Kind::kList) ? MakeList(heap, std::move(items))
                              : MakeTuple(heap, std::move(items));
}

Value Repeat(Heap& heap, const Value& value, const Value& times) {
  const size_t size = value.IsString() ? value.text().size() : value.items().size();
  Int count = std::max<Int>(IndexOf(times), 0);
  if (size == 0) count = 0;
  const size_t unit = value.IsString() ? 1 : sizeof(Value);
  const auto most = static_cast<Int>(std::numeric_limits<int64_t>::max() / unit);
  if (size > 0 && count > most / static_cast<Int>(size)) {
    heap.Reserve(std::numeric_limits<size_t>::max());
  }
  const auto whole = static_cast<size_t>(count);
  heap.Reserve(whole * size * unit);
  if (value.IsString()) {
    std::string text;
    text.reserve(whole * size);
    for (size_t i = 0; i < whole; ++i) text += value.text();
    return MakeString(heap, std::move(text), value.As<String>().markup);
  }
  Values items;
  items.reserve(whole * size);
  for (size_t i = 0; i < whole; ++i) {
    items.insert(items.end(), value.items().begin(), value.items().end());
  }
  return value.Is(Kind::kList) ? MakeList(heap, std::move(items))
                               : MakeTuple(heap, std::move(items));
}

bool EqualDicts(const Dict& left, const Dict& right) {
  if (left.entries().size() != right.entries().size()) return false;
  return std::ranges::all_of(left.entries(), [&](const Dict::Entry& entry) {
    const Value* other = right.Find(entry.first);
    return other != nullptr && Equal(entry.second, *other);
  });
}

bool EqualRanges(const Range& left, const Range& right) {
  if (left.length != right.length) return false;
  if (left.length == 0) return true;
  return left.start == right.start && (left.length == 1 || left.step == right.step);
}

int CompareText(std::string_view left, std::string_view right) {
  return left.compare(right);  // bytes of UTF-8 order as code points do
}

class ReprWriter {
 public:
  void Write(const Value& value) {
    if (out_.size() > kMaxReprBytes) FailSize();
    switch (value.kind()) {
      case Kind::kMissing:
        out_ += "missing";
        break;
      case Kind::kUndefined:
        out_ += "Undefined";
        break;
      case Kind::kNone:
        out_ += "None";
        break;
      case Kind::kBool:
        out_ += value.bool_value() ? "True" : "False";
        break;
      case Kind::kInt:
        out_ += IntText(value.int_value());
        break;
      case Kind::kFloat:
        out_ += FloatText(value.float_value());
        break;
      case Kind::kString:
        if (value.text().size() > kMaxReprBytes) FailSize();
        if (value.As<String>().markup) out_ += "Markup(";
        AppendRepr(value.text(), &out_);
        if (value.As<String>().markup) out_ += ')';
        break;
      case Kind::kList:
        WriteItems('[', value.items(), ']');
        break;
      case Kind::kTuple:
        WriteItems('(', value.items(), ')');
        if (value.items().size() == 1) out_.insert(out_.size() - 1, 1, ',');
        break;
      case Kind::kDict:
        out_ += '{';
        for (const auto& [key, entry] : value.As<Dict>().entries()) WritePair(key, entry);
        Close('}');
        break;
      case Kind::kView:
        WriteView(value.As<View>());
        break;
      case Kind::kRange: {
        const Range& range = value.As<Range>();
        out_ += range.step == 1
                    ? fmt::format("range({}, {})", range.start, range.stop)
                    : fmt::format("range({}, {}, {})", range.start, range.stop, range.step);
        break;
      }
      case Kind::kNamespace:
        WriteNamespace(value.As<Namespace>());
        break;
      case Kind::kMacro: {
        const std::string& name = value.As<MacroValue>().statement.name;
        out_ += "<Macro ";
        if (name.empty()) {
          out_ += "anonymous";
        } else {
          AppendRepr(name, &out_);
        }
        out_ += '>';
        break;
      }
      default:
        out_ += fmt::format("<{}>", TypeName(value));
    }
  }

  std::string Take() { return std::move(out_); }

 private:
  [[noreturn]] static void FailSize() {
    ThrowLimit(fmt::format("the text of a value needs more than {} bytes", kMaxReprBytes));
  }

  void WriteItems(char open, const Values& items, char close) {
    out_ += open;
    for (const Value& item : items) {
      Write(item);
      out_ += ", ";
    }
    Close(close);
  }

  void WritePair(const Value& key, const Value& value) {
    Write(key);
    out_ += ": ";
    Write(value);
    out_ += ", ";
  }

  // Over the separator that follows the last part.
  void Close(std::string_view close) {
    if (out_.ends_with(", ")) out_.resize(out_.size() - 2);
    out_ += close;
  }
  void Close(char close) { Close(std::string_view(&close, 1)); }

  void WriteView(const View& view) {
    out_ += view.part == View::Part::kKeys     ? "dict_keys(["
            : view.part == View::Part::kValues ? "dict_values(["
                                               : "dict_items([";
    for (const auto& [key, value] : view.dict.As<Dict>().entries()) {
      if (view.part == View::Part::kItems) out_ += '(';
      if (view.part != View::Part::kValues) Write(key);
      if (view.part == View::Part::kItems) out_ += ", ";
      if (view.part != View::Part::kKeys) Write(value);
      if (view.part == View::Part::kItems) out_ += ')';
      out_ += ", ";
    }
    Close("])");
  }

  // The one value that can contain itself.
  void WriteNamespace(const Namespace& value) {
    if (++open_namespaces_ > kMaxOpenNamespaces) {
      throw Fault("RecursionError", "maximum recursion depth exceeded while getting the repr");
    }
    out_ += "<Namespace {";
    for (const auto& [name, attribute] : value.attributes) {
      AppendRepr(name, &out_);
      out_ += ": ";
      Write(attribute);
      out_ += ", ";
    }
    Close("}>");
    --open_namespaces_;
  }

  // Each may hold a value as deep as any.
  static constexpr int kMaxOpenNamespaces = 20;

  std::string out_;
  int open_namespaces_ = 0;
};

}  // namespace

void ThrowUndefined(const Value& undefined) { undefined.As<Undefined>().Throw(); }

bool Truth(const Value& value) {
  switch (value.kind()) {
    case Kind::kMissing:
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
    case Kind::kInt:
      return value.int_value() != 0;
    case Kind::kFloat:
      return value.float_value() != 0;
    default:
      return !HasLength(value) || Length(value) != 0;
  }
}

bool Same(const Value& left, const Value& right) {
  if (left.kind() != right.kind()) return false;
  if (left.object() != nullptr) return left.object() == right.object();
  return Equal(left, right);
}

bool Equal(const Value& left, const Value& right) {
  if (left.IsNumber() && right.IsNumber()) return CompareNumbers(left, right) == 0;
  if (left.kind() != right.kind()) return false;
  if (left.object() == right.object() && left.object() != nullptr) return true;
  switch (left.kind()) {
    case Kind::kMissing:
    case Kind::kUndefined:
    case Kind::kNone:
      return true;
    case Kind::kString:
      return left.text() == right.text();
    case Kind::kList:
    case Kind::kTuple:
      return std::ranges::equal(left.items(), right.items(), Equal);
    case Kind::kDict:
      return EqualDicts(left.As<Dict>(), right.As<Dict>());
    case Kind::kRange:
      return EqualRanges(left.As<Range>(), right.As<Range>());
    default:
      return false;
  }
}

bool Compare(CompareOp op, const Value& left, const Value& right) {
  if (op == CompareOp::kEqual) return Equal(left, right);
  if (op == CompareOp::kNotEqual) return !Equal(left, right);
  if (left.IsUndefined()) ThrowUndefined(left);
  if (right.IsUndefined()) ThrowUndefined(right);
  if (left.IsNumber() && right.IsNumber()) {
    const int order = CompareNumbers(left, right);
    return order != 2 && Holds(op, order);
  }
  if (left.IsString() && right.IsString()) return Holds(op, CompareText(left.text(), right.text()));
  if (left.IsSequence() && left.kind() == right.kind()) {
    const Values &a = left.items(), &b = right.items();
    const auto [at, other] = std::ranges::mismatch(a, b, Equal);
    if (at == a.end() || other == b.end()) {
      return Holds(op, a.size() < b.size() ? -1 : a.size() > b.size() ? 1 : 0);
    }
    return Compare(op, *at, *other);
  }
  ThrowTypeError(fmt::format("'{}' not supported between instances of '{}' and '{}'", Symbol(op),
                             TypeName(left), TypeName(right)));
}

Value Binary(Heap& heap, BinaryOp op, const Value& left, const Value& right) {
  if (op == BinaryOp::kModulo && left.IsString()) return FormatPercent(heap, left, right);
  if (left.IsNumber() && right.IsNumber()) return Arithmetic(op, left, right);
  if (left.IsUndefined()) ThrowUndefined(left);
  if (op == BinaryOp::kAdd && left.IsString() && right.IsString()) {
    return Concatenate(heap, left, right);
  }
  if (right.IsUndefined()) ThrowUndefined(right);
  if (op == BinaryOp::kAdd && IsConcatenable(left)) return Concatenate(heap, left, right);
  if (op == BinaryOp::kMultiply) {
    if (IsConcatenable(left) && right.IsIntegral()) return Repeat(heap, left, right);
    if (IsConcatenable(right) && left.IsIntegral()) return Repeat(heap, right, left);
    if (IsConcatenable(left) || IsConcatenable(right)) {
      ThrowTypeError(fmt::format("can't multiply sequence by non-int of type '{}'",
                                 TypeName(IsConcatenable(left) ? right : left)));
    }
  }
  ThrowTypeError(fmt::format("unsupported operand type(s) for {}: '{}' and '{}'", Symbol(op),
                             TypeName(left), TypeName(right)));
}

Value Negate(const Value& value) {
  if (value.IsIntegral()) return Value::Integer(SubtractInts(0, value.int_value()));
  if (value.Is(Kind::kFloat)) return Value::Float(-value.float_value());
  if (value.IsUndefined()) ThrowUndefined(value);
  ThrowTypeError(fmt::format("bad operand type for unary -: '{}'", TypeName(value)));
}

Value Plus(const Value& value) {
  if (value.IsIntegral()) return Value::Integer(value.int_value());
  if (value.Is(Kind::kFloat)) return value;
  if (value.IsUndefined()) ThrowUndefined(value);
  ThrowTypeError(fmt::format("bad operand type for unary +: '{}'", TypeName(value)));
}

bool HasLength(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kString:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kDict:
    case Kind::kView:
    case Kind::kRange:
      return true;
    default:
      return false;
  }
}

int64_t Length(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return 0;
    case Kind::kString:
      return static_cast<int64_t>(value.As<String>().length);
    case Kind::kList:
    case Kind::kTuple:
      return static_cast<int64_t>(value.items().size());
    case Kind::kDict:
      return static_cast<int64_t>(value.As<Dict>().entries().size());
    case Kind::kView:
      return Length(value.As<View>().dict);
    case Kind::kRange:
      return value.As<Range>().length;
    default:
      ThrowTypeError(fmt::format("object of type '{}' has no len()", TypeName(value)));
  }
}

Value ItemAt(Heap& heap, const Value& value, Int index) {
  const Int length = Length(value);
  if (index < 0) index += length;
  if (index < 0 || index >= length) return Value();
  const auto at = static_cast<size_t>(index);
  if (value.IsSequence()) return value.items()[at];
  if (value.Is(Kind::kRange)) {
    return Value::Integer(value.As<Range>().At(static_cast<int64_t>(at)));
  }
  const String& string = value.As<String>();
  if (!string.ascii()) heap.WorkOnBytes(at);
  const size_t begin = ByteOffset(string.text, at, string.ascii());
  size_t end = begin;
  NextCodePoint(string.text, &end);
  return MakeString(heap, string.text.substr(begin, end - begin), string.markup);
}

Value Slice(Heap& heap, const Value& value, const Value& start, const Value& stop,
            const Value& step) {
  if (value.IsUndefined()) ThrowUndefined(value);
  if (value.IsDict()) ThrowTypeError("unhashable type: 'slice'");
  if (!value.IsString() && !value.IsSequence() && !value.Is(Kind::kRange)) {
    ThrowTypeError(fmt::format("'{}' object is not subscriptable", TypeName(value)));
  }
  const auto bound = [](const Value& given, int64_t otherwise) {
    if (given.IsMissing() || given.IsNone()) return otherwise;
    if (!given.IsIntegral()) {
      ThrowTypeError("slice indices must be integers or None or have an __index__ method");
    }
    return ClampedIndexOf(given);
  };
  const int64_t length = Length(value);
  const int64_t stride = bound(step, 1);
  if (stride == 0) ThrowValueError("slice step cannot be zero");
  // Where a bound that is given stands; before the first is -1 when stepping back.
  const auto place = [&](int64_t index) {
    if (index < 0) index = std::max(index, -length - 1) + length;
    return std::clamp<int64_t>(index, stride > 0 ? 0 : -1, stride > 0 ? length : length - 1);
  };
  const bool has_start = !start.IsMissing() && !start.IsNone();
  const bool has_stop = !stop.IsMissing() && !stop.IsNone();
  const int64_t first = has_start ? place(bound(start, 0)) : stride > 0 ? 0 : length - 1;
  const int64_t last = has_stop ? place(bound(stop, 0)) : stride > 0 ? length : -1;
  const Int distance = stride > 0 ? Int{last} - first : Int{first} - last;
  const Int absolute = stride > 0 ? Int{stride} : -Int{stride};
  const int64_t count =
      distance <= 0 ? 0 : static_cast<int64_t>((distance + absolute - 1) / absolute);

  if (value.Is(Kind::kRange)) {
    const Range& range = value.As<Range>();
    const auto at = [&](int64_t index) { return Int{range.start} + Int{index} * range.step; };
    const Int new_step = Int{range.step} * stride;
    const Int limit = std::numeric_limits<int64_t>::max();
    if (new_step > limit || new_step < -limit) ThrowIntegerTooLarge();
    return Value(Kind::kRange,
                 new Range(&heap, static_cast<int64_t>(at(first)), static_cast<int64_t>(at(last)),
                           static_cast<int64_t>(new_step)));
  }
  if (value.IsSequence()) {
    heap.Reserve(count * sizeof(Value));
    Values items;
    items.reserve(count);
    for (int64_t i = 0; i < count; ++i) items.push_back(value.items()[first + i * stride]);
    return value.Is(Kind::kList) ? MakeList(heap, std::move(items))
                                 : MakeTuple(heap, std::move(items));
  }
  const String& string = value.As<String>();
  heap.WorkOnBytes(string.text.size());
  heap.Reserve(string.text.size());
  std::string out;
  if (stride == 1 && count > 0) {
    const size_t begin = ByteOffset(string.text, first, string.ascii());
    const std::string_view rest = std::string_view(string.text).substr(begin);
    out = rest.substr(0, ByteOffset(rest, count, string.ascii()));
  } else if (count > 0) {
    std::vector<size_t> offsets;  // of code points
    if (!string.ascii()) {
      heap.Reserve(string.length * sizeof(size_t));
      for (size_t at = 0; at < string.text.size(); NextCodePoint(string.text, &at)) {
        offsets.push_back(at);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = first + i * stride;
      size_t end = string.ascii() ? index : offsets[index];
      const size_t begin = end;
      NextCodePoint(string.text, &end);
      out.append(string.text, begin, end - begin);
    }
  }
  return MakeString(heap, std::move(out), string.markup);
}

std::string Repr(const Value& value) {
  ReprWriter writer;
  writer.Write(value);
  return writer.Take();
}

void AppendStr(const Value& value, std::string* out) {
  if (value.IsString()) {
    *out += value.text();
  } else if (!value.IsUndefined()) {
    *out += Repr(value);
  }
}

std::string Str(const Value& value) {
  std::string out;
  AppendStr(value, &out);
  return out;
}

std::string EscapeText(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

Value Escape(Heap& heap, const Value& value) {
  if (value.IsString() && value.As<String>().markup) return value;
  const std::string text = Str(value);
  heap.Reserve(5 * text.size());
  return MakeString(heap, EscapeText(text), true);
}

int64_t ClampedIndexOf(const Value& value) {
  if (value.IsUndefined()) ThrowUndefined(value);
  if (!value.IsIntegral()) {
    ThrowTypeError(fmt::format("'{}' object cannot be interpreted as an integer", TypeName(value)));
  }
  constexpr Int kLeast = std::numeric_limits<int64_t>::min();
  constexpr Int kMost = std::numeric_limits<int64_t>::max();
  return static_cast<int64_t>(std::clamp(value.int_value(), kLeast, kMost));
}

int64_t IndexOf(const Value& value) {
  const int64_t index = ClampedIndexOf(value);
  if (Int{index} != value.int_value()) {
    throw Fault("OverflowError", "cannot fit 'int' into an index-sized integer");
  }
  return index;
}

}  // namespace octavo::jinja
