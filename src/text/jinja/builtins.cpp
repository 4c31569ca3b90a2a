#include "text/jinja/builtins.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/numbers.h"
#include "text/jinja/operators.h"
#include "text/jinja/python_text.h"

namespace octavo::jinja {

Bound::Bound(std::string_view function, const Arguments& arguments,
             std::initializer_list<std::string_view> parameters, size_t required)
    : values_(parameters.size()) {
  if (arguments.positional.size() > parameters.size()) {
    ThrowTypeError(fmt::format("{} takes at most {} argument{} ({} given)", function,
                               parameters.size(), parameters.size() == 1 ? "" : "s",
                               arguments.positional.size()));
  }
  std::ranges::copy(arguments.positional, values_.begin());
  for (const auto& [name, value] : arguments.named) {
    const auto at = std::ranges::find(parameters, name);
    if (at == parameters.end()) {
      ThrowTypeError(fmt::format("{} got an unexpected keyword argument '{}'", function, name));
    }
    Value& slot = values_[at - parameters.begin()];
    if (!slot.IsMissing()) {
      ThrowTypeError(fmt::format("{} got multiple values for argument '{}'", function, name));
    }
    slot = value;
  }
  for (size_t i = 0; i < required; ++i) {
    if (values_[i].IsMissing()) {
      ThrowTypeError(
          fmt::format("{} missing a required argument: '{}'", function, *(parameters.begin() + i)));
    }
  }
}

namespace {

template <size_t n>
Native FindBuiltin(const Builtin (&table)[n], std::string_view name) {
  const auto found = std::ranges::find(table, name, &Builtin::name);
  return found == std::end(table) ? nullptr : found->function;
}

Value UnsupportedFilter(Interpreter&, const Value&, Arguments&) {
  ThrowUnsupported("a filter of Jinja2 that Octavo does not have");
}

// -- Tests

using Predicate = bool (*)(const Value&);

template <Predicate predicate>
Value Test(Interpreter&, const Value& value, Arguments& arguments) {
  const Bound bound("the test", arguments, {});
  return Value::Bool(predicate(value));
}

template <CompareOp op>
Value TestCompare(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("the test", arguments, {"other"}, 1);
  interpreter.heap().Work(std::min(value.weight(), bound[0].weight()));
  return Value::Bool(Compare(op, value, bound[0]));
}

template <int rest>
Value TestParity(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("the test", arguments, {});
  const Value two = Value::Integer(2);
  return Value::Bool(
      Equal(Binary(interpreter.heap(), BinaryOp::kModulo, value, two), Value::Integer(rest)));
}

Value TestDivisibleBy(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("test_divisibleby()", arguments, {"num"}, 1);
  return Value::Bool(
      Equal(Binary(interpreter.heap(), BinaryOp::kModulo, value, bound[0]), Value::Integer(0)));
}

template <TextClass what>
Value TestText(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("the test", arguments, {});
  const Value text = interpreter.ToString(value);
  interpreter.heap().WorkOnBytes(text.text().size());
  return Value::Bool(IsAll(what, text.text()));
}

Value TestIn(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("test_in()", arguments, {"seq"}, 1);
  return Value::Bool(interpreter.Contains(bound[0], value));
}

Value TestSameAs(Interpreter&, const Value& value, Arguments& arguments) {
  const Bound bound("test_sameas()", arguments, {"other"}, 1);
  return Value::Bool(Same(value, bound[0]));
}

Value TestIterable(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("test_iterable()", arguments, {});
  return Value::Bool(interpreter.IsIterable(value) || value.Is(Kind::kLoop));
}

Value TestFilterExists(Interpreter&, const Value& value, Arguments& arguments) {
  const Bound bound("test_filter()", arguments, {});
  Hash(value);  // throws for what cannot be a name
  return Value::Bool(value.IsString() && FindFilter(value.text()) != nullptr);
}

Value TestTestExists(Interpreter&, const Value& value, Arguments& arguments) {
  const Bound bound("test_test()", arguments, {});
  Hash(value);
  return Value::Bool(value.IsString() && FindTest(value.text()) != nullptr);
}

bool IsSequenceLike(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kString:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kDict:
    case Kind::kRange:
      return true;
    default:
      return false;
  }
}

bool IsCallable(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kFunction:
    case Kind::kMacro:
    case Kind::kLoop:
    case Kind::kJoiner:
      return true;
    default:
      return false;
  }
}

constexpr Builtin kTests[] = {
    {"!=", TestCompare<CompareOp::kNotEqual>},
    {"<", TestCompare<CompareOp::kLess>},
    {"<=", TestCompare<CompareOp::kLessEqual>},
    {"==", TestCompare<CompareOp::kEqual>},
    {">", TestCompare<CompareOp::kGreater>},
    {">=", TestCompare<CompareOp::kGreaterEqual>},
    {"boolean", Test<[](const Value& v) { return v.Is(Kind::kBool); }>},
    {"callable", Test<IsCallable>},
    {"defined", Test<[](const Value& v) { return !v.IsUndefined(); }>},
    {"divisibleby", TestDivisibleBy},
    {"eq", TestCompare<CompareOp::kEqual>},
    {"equalto", TestCompare<CompareOp::kEqual>},
    {"escaped", Test<[](const Value& v) { return v.IsString() && v.As<String>().markup; }>},
    {"even", TestParity<0>},
    {"false", Test<[](const Value& v) { return v.Is(Kind::kBool) && !v.bool_value(); }>},
    {"filter", TestFilterExists},
    {"float", Test<[](const Value& v) { return v.Is(Kind::kFloat); }>},
    {"ge", TestCompare<CompareOp::kGreaterEqual>},
    {"greaterthan", TestCompare<CompareOp::kGreater>},
    {"gt", TestCompare<CompareOp::kGreater>},
    {"in", TestIn},
    {"integer", Test<[](const Value& v) { return v.Is(Kind::kInt); }>},
    {"iterable", TestIterable},
    {"le", TestCompare<CompareOp::kLessEqual>},
    {"lessthan", TestCompare<CompareOp::kLess>},
    {"lower", TestText<TextClass::kLower>},
    {"lt", TestCompare<CompareOp::kLess>},
    {"mapping", Test<[](const Value& v) { return v.IsDict(); }>},
    {"ne", TestCompare<CompareOp::kNotEqual>},
    {"none", Test<[](const Value& v) { return v.IsNone(); }>},
    {"number", Test<[](const Value& v) { return v.IsNumber(); }>},
    {"odd", TestParity<1>},
    {"sameas", TestSameAs},
    {"sequence", Test<IsSequenceLike>},
    {"string", Test<[](const Value& v) { return v.IsString(); }>},
    {"test", TestTestExists},
    {"true", Test<[](const Value& v) { return v.Is(Kind::kBool) && v.bool_value(); }>},
    {"undefined", Test<[](const Value& v) { return v.IsUndefined(); }>},
    {"upper", TestText<TextClass::kUpper>}};

// -- Global functions

Value RangeFunction(Interpreter& interpreter, const Value&, Arguments& arguments) {
  constexpr int64_t kMost = 100000;  // the sandbox's own limit
  if (!arguments.named.empty()) ThrowTypeError("range() takes no keyword arguments");
  const Bound bound("range", arguments, {"start", "stop", "step"}, 1);
  const int64_t first = ClampedIndexOf(bound[0]);
  const int64_t start = bound.Has(1) ? first : 0;
  const int64_t stop = bound.Has(1) ? ClampedIndexOf(bound[1]) : first;
  const int64_t step = bound.Has(2) ? ClampedIndexOf(bound[2]) : 1;
  if (step == 0) ThrowValueError("range() arg 3 must not be zero");
  const Value range(Kind::kRange, new Range(&interpreter.heap(), start, stop, step));
  if (range.As<Range>().length > kMost) {
    throw Fault(
        "OverflowError",
        fmt::format("Range too big. The sandbox blocks ranges larger than MAX_RANGE ({}).", kMost));
  }
  return range;
}

// What dict(...) and namespace(...) are made of.
std::vector<Dict::Entry> EntriesOf(Interpreter& interpreter, const Arguments& arguments) {
  Heap& heap = interpreter.heap();
  std::vector<Dict::Entry> entries;
  if (arguments.positional.size() > 1) {
    ThrowTypeError(
        fmt::format("dict expected at most 1 argument, got {}", arguments.positional.size()));
  }
  for (const Value& from : arguments.positional) {
    if (from.IsDict()) {
      entries = from.As<Dict>().entries();
      continue;
    }
    if (from.IsUndefined()) ThrowUndefined(from);
    size_t index = 0;
    for (const Value& item : interpreter.Collect(from)) {
      if (!interpreter.IsIterable(item)) {
        ThrowTypeError(fmt::format(
            "cannot convert dictionary update sequence element #{} to a sequence", index));
      }
      Values pair = interpreter.Collect(item);
      if (pair.size() != 2) {
        ThrowValueError(
            fmt::format("dictionary update sequence element #{} has length {}; 2 is required",
                        index, pair.size()));
      }
      entries.emplace_back(std::move(pair[0]), std::move(pair[1]));
      ++index;
    }
  }
  for (const auto& [name, value] : arguments.named) {
    entries.emplace_back(CopyString(heap, name), value);
  }
  return entries;
}

Value DictFunction(Interpreter& interpreter, const Value&, Arguments& arguments) {
  return MakeDict(interpreter.heap(), EntriesOf(interpreter, arguments));
}

Value NamespaceFunction(Interpreter& interpreter, const Value&, Arguments& arguments) {
  Heap& heap = interpreter.heap();
  const Value dict = MakeDict(heap, EntriesOf(interpreter, arguments));
  const Value space(Kind::kNamespace, new Namespace(&heap));
  Namespace& attributes = space.As<Namespace>();
  for (const auto& [key, value] : dict.As<Dict>().entries()) {
    heap.Work(1 + attributes.attributes.size() / 8);
    if (!key.IsString()) ThrowTypeError("the names in a namespace must be strings");
    attributes.Set(key.text(), value);
  }
  return space;
}

Value CyclerFunction(Interpreter& interpreter, const Value&, Arguments& arguments) {
  if (!arguments.named.empty()) ThrowTypeError("cycler() takes no keyword arguments");
  if (arguments.positional.empty()) {
    throw Fault("RuntimeError", "at least one item has to be provided");
  }
  return Value(Kind::kCycler, new Cycler(&interpreter.heap(), std::move(arguments.positional)));
}

Value JoinerFunction(Interpreter& interpreter, const Value&, Arguments& arguments) {
  const Bound bound("joiner()", arguments, {"sep"});
  return Value(Kind::kJoiner,
               new Joiner(&interpreter.heap(),
                          bound.Has(0) ? bound[0] : CopyString(interpreter.heap(), ", ")));
}

Value RaiseException(Interpreter&, const Value&, Arguments& arguments) {
  const Bound bound("raise_exception()", arguments, {"message"}, 1);
  throw Fault("TemplateError", Str(bound[0]));
}

Value StrftimeNow(Interpreter& interpreter, const Value&, Arguments& arguments) {
  const Bound bound("strftime_now()", arguments, {"format"}, 1);
  if (!bound[0].IsString()) ThrowTypeError("strftime() argument 1 must be str");
  const std::string& format = bound[0].text();
  constexpr size_t kMost = 256;
  if (format.size() > kMost) ThrowLimit(fmt::format("a date format of more than {} bytes", kMost));
  // A character more, so that an empty result differs from one that does not fit.
  std::array<char, 32 * kMost> text;
  const std::string extended = format + '.';
  const size_t size = std::strftime(text.data(), text.size(), extended.c_str(), &interpreter.now());
  if (size == 0) ThrowValueError("a date format that gives too long a text");
  return CopyString(interpreter.heap(), std::string_view(text.data(), size - 1));
}

Value Lipsum(Interpreter&, const Value&, Arguments&) {
  ThrowUnsupported("the function lipsum is not supported");
}

constexpr Builtin kGlobals[] = {
    {"cycler", CyclerFunction},       {"dict", DictFunction},
    {"joiner", JoinerFunction},       {"lipsum", Lipsum},
    {"namespace", NamespaceFunction}, {"raise_exception", RaiseException},
    {"range", RangeFunction},         {"strftime_now", StrftimeNow}};

}  // namespace

Native FindFilter(std::string_view name) {
  if (const Native filter = FindTextFilter(name)) return filter;
  if (const Native filter = FindSequenceFilter(name)) return filter;
  for (std::string_view known : {"pprint", "random", "striptags", "urlize", "wordwrap"}) {
    if (name == known) return UnsupportedFilter;
  }
  return nullptr;
}

Native FindTest(std::string_view name) { return FindBuiltin(kTests, name); }

Value FindGlobal(Heap& heap, std::string_view name) {
  const auto found = std::ranges::find(kGlobals, name, &Builtin::name);
  if (found == std::end(kGlobals)) return Value();
  return Value(Kind::kFunction, new Function(&heap, found->name.data(), found->function, Value()));
}

}  // namespace octavo::jinja
