#include "text/jinja/attributes.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/numbers.h"
#include "text/jinja/operators.h"
#include "text/jinja/python_text.h"

namespace octavo::jinja {
namespace {

Value DictGet(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Bound bound("dict.get()", arguments, {"key", "default"}, 1);
  interpreter.heap().Work(bound[0].weight());
  if (const Value* found = self.As<Dict>().Find(bound[0])) return *found;
  return bound.Has(1) ? bound[1] : Value::None();
}

template <View::Part part>
Value DictView(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Bound bound("dict view", arguments, {});
  return Value(Kind::kView, new View(&interpreter.heap(), self, part));
}

Value CopySelf(Interpreter&, const Value& self, Arguments& arguments) {
  const Bound bound("copy()", arguments, {});
  return self;  // values do not change, so no one can tell
}

Value CountItems(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Bound bound("count()", arguments, {"value"}, 1);
  interpreter.heap().Work(self.weight());
  return Value::Integer(std::ranges::count_if(
      self.items(), [&](const Value& item) { return Equal(item, bound[0]); }));
}

Value IndexOfItem(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Bound bound("index()", arguments, {"value", "start", "stop"}, 1);
  interpreter.heap().Work(self.weight());
  const auto length = static_cast<int64_t>(self.items().size());
  const auto place = [&](size_t parameter, int64_t otherwise) {
    if (!bound.Has(parameter)) return otherwise;
    const int64_t index = ClampedIndexOf(bound[parameter]);
    return std::clamp<int64_t>(index < 0 ? std::max(index, -length) + length : index, 0, length);
  };
  const int64_t stop = place(2, length);
  for (int64_t i = place(1, 0); i < stop; ++i) {
    if (Equal(self.items()[i], bound[0])) return Value::Integer(i);
  }
  ThrowValueError(fmt::format("{} is not in list", Repr(bound[0])));
}

Value BitLength(Interpreter&, const Value& self, Arguments& arguments) {
  const Bound bound("int.bit_length()", arguments, {});
  std::string bits = IntText(self.int_value(), 2);
  if (bits.starts_with('-')) bits.erase(0, 1);
  return Value::Integer(bits == "0" ? 0 : static_cast<Int>(bits.size()));
}

Value IsInteger(Interpreter&, const Value& self, Arguments& arguments) {
  const Bound bound("float.is_integer()", arguments, {});
  return Value::Bool(std::floor(self.float_value()) == self.float_value());
}

Value LoopCycle(Interpreter&, const Value& self, Arguments& arguments) {
  if (arguments.positional.empty()) ThrowTypeError("no items for cycling given");
  return arguments.positional[self.As<Loop>().index0 % arguments.positional.size()];
}

Value LoopChanged(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  Loop& loop = self.As<Loop>();
  Value now = MakeTuple(interpreter.heap(), arguments.positional);
  interpreter.heap().Work(now.weight());
  if (Equal(loop.last_changed, now)) return Value::Bool(false);
  loop.last_changed = std::move(now);
  return Value::Bool(true);
}

Value CyclerNext(Interpreter&, const Value& self, Arguments& arguments) {
  const Bound bound("Cycler.next()", arguments, {});
  Cycler& cycler = self.As<Cycler>();
  Value value = cycler.items[cycler.position];
  cycler.position = (cycler.position + 1) % cycler.items.size();
  return value;
}

Value CyclerReset(Interpreter&, const Value& self, Arguments& arguments) {
  const Bound bound("Cycler.reset()", arguments, {});
  self.As<Cycler>().position = 0;
  return Value::None();
}

constexpr Method kDictMethods[] = {{"copy", CopySelf},
                                   {"get", DictGet},
                                   {"items", DictView<View::Part::kItems>},
                                   {"keys", DictView<View::Part::kKeys>},
                                   {"values", DictView<View::Part::kValues>}};
constexpr Method kListMethods[] = {
    {"copy", CopySelf}, {"count", CountItems}, {"index", IndexOfItem}};
constexpr Method kTupleMethods[] = {{"count", CountItems}, {"index", IndexOfItem}};
constexpr Method kIntMethods[] = {{"bit_length", BitLength}};
constexpr Method kFloatMethods[] = {{"is_integer", IsInteger}};
constexpr Method kLoopMethods[] = {{"changed", LoopChanged}, {"cycle", LoopCycle}};
constexpr Method kCyclerMethods[] = {{"next", CyclerNext}, {"reset", CyclerReset}};

template <size_t n>
const Method* FindIn(const Method (&methods)[n], std::string_view name) {
  const auto found = std::ranges::find(methods, name, &Method::name);
  return found == std::end(methods) ? nullptr : &*found;
}

const Method* FindMethodEntry(const Value& object, std::string_view name) {
  switch (object.kind()) {
    case Kind::kString:
      return FindStringMethod(name);
    case Kind::kDict:
      return FindIn(kDictMethods, name);
    case Kind::kList:
      return FindIn(kListMethods, name);
    case Kind::kTuple:
      return FindIn(kTupleMethods, name);
    case Kind::kInt:
    case Kind::kBool:
      return FindIn(kIntMethods, name);
    case Kind::kFloat:
      return FindIn(kFloatMethods, name);
    case Kind::kLoop:
      return FindIn(kLoopMethods, name);
    case Kind::kCycler:
      return FindIn(kCyclerMethods, name);
    default:
      return nullptr;
  }
}

// Methods that change a list or a dict.
bool WouldChange(const Value& object, std::string_view name) {
  const auto any_of = [&](std::initializer_list<std::string_view> names) {
    return std::ranges::find(names, name) != names.end();
  };
  if (object.Is(Kind::kList)) {
    return any_of({"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"});
  }
  return object.IsDict() && any_of({"clear", "pop", "popitem", "setdefault", "update"});
}

// What every Python object has.
bool IsPrivateOfAll(std::string_view name) {
  for (std::string_view known :
       {"__class__",  "__delattr__",   "__dir__",         "__doc__",
        "__eq__",     "__format__",    "__ge__",          "__getattribute__",
        "__gt__",     "__hash__",      "__init__",        "__init_subclass__",
        "__le__",     "__lt__",        "__ne__",          "__new__",
        "__reduce__", "__reduce_ex__", "__repr__",        "__setattr__",
        "__sizeof__", "__str__",       "__subclasshook__"}) {
    if (name == known) return true;
  }
  return false;
}

Value Unsafe(Heap& heap, const Value& object, const Value& name) {
  return Value(Kind::kUndefined,
               new Undefined(&heap,
                             fmt::format("access to attribute {} of '{}' object is unsafe.",
                                         Repr(name), TypeName(object)),
                             TypeRepr(object), name, true));
}

Value MakeHintedUndefined(Heap& heap, const char* hint) {
  return Value(Kind::kUndefined, new Undefined(&heap, hint, nullptr, Value::None()));
}

Value LoopProperty(Interpreter& interpreter, Loop& loop, std::string_view name) {
  Heap& heap = interpreter.heap();
  if (name == "index0") return Value::Integer(loop.index0);
  if (name == "index") return Value::Integer(loop.index0 + 1);
  if (name == "first") return Value::Bool(loop.index0 == 0);
  if (name == "last") return Value::Bool(loop.PeekNext(interpreter).IsMissing());
  if (name == "length") return Value::Integer(loop.Length(interpreter));
  if (name == "revindex0") return Value::Integer(loop.Length(interpreter) - loop.index0 - 1);
  if (name == "revindex") return Value::Integer(loop.Length(interpreter) - loop.index0);
  if (name == "depth0") return Value::Integer(loop.depth0);
  if (name == "depth") return Value::Integer(loop.depth0 + 1);
  if (name == "previtem") {
    return loop.index0 == 0 || loop.before.IsMissing()
               ? MakeHintedUndefined(heap, "there is no previous item")
               : loop.before;
  }
  if (name == "nextitem") {
    const Value& next = loop.PeekNext(interpreter);
    return next.IsMissing() ? MakeHintedUndefined(heap, "there is no next item") : next;
  }
  return Value();
}

Value MacroProperty(Heap& heap, const MacroValue& macro, std::string_view name) {
  const MacroScope& scope = *macro.statement.macro;
  if (name == "name") {
    return macro.statement.name.empty() ? Value::None() : CopyString(heap, macro.statement.name);
  }
  if (name == "arguments") {
    Values names;
    for (const std::string& parameter : macro.statement.parameters) {
      names.push_back(CopyString(heap, parameter));
    }
    return MakeTuple(heap, std::move(names));
  }
  if (name == "catch_kwargs") return Value::Bool(scope.kwargs >= 0);
  if (name == "catch_varargs") return Value::Bool(scope.varargs >= 0);
  if (name == "caller") return Value::Bool(scope.caller >= 0);
  return Value();
}

// getattr(object, name); missing where Python raises AttributeError.
Value FindAttribute(Interpreter& interpreter, const Value& object, const Value& name_value) {
  const std::string& name = name_value.text();
  Heap& heap = interpreter.heap();
  if (object.Is(Kind::kNamespace)) {
    Namespace& space = object.As<Namespace>();
    heap.Work(1 + space.attributes.size() / 8);
    const Value* found = space.Find(name);
    if (found != nullptr) return *found;
    return name == "__class__" ? Unsafe(heap, object, name_value) : Value();
  }
  if (IsPrivateOfAll(name)) return Unsafe(heap, object, name_value);
  if (object.IsUndefined()) ThrowUndefined(object);
  if (const Method* method = FindMethodEntry(object, name)) {
    return Value(Kind::kFunction,
                 new Function(&heap, method->name.data(), method->function, object));
  }
  if (WouldChange(object, name)) return Unsafe(heap, object, name_value);
  switch (object.kind()) {
    case Kind::kLoop:
      return LoopProperty(interpreter, object.As<Loop>(), name);
    case Kind::kMacro:
      return MacroProperty(heap, object.As<MacroValue>(), name);
    case Kind::kTuple:
      if (!object.As<Sequence>().is_group) return Value();
      return name == "grouper" ? object.items()[0] : name == "list" ? object.items()[1] : Value();
    case Kind::kCycler: {
      const Cycler& cycler = object.As<Cycler>();
      return name == "current" ? cycler.items[cycler.position] : Value();
    }
    default:
      return Value();
  }
}

bool IsHashable(const Value& value) {
  if (value.Is(Kind::kTuple)) return std::ranges::all_of(value.items(), IsHashable);
  return !value.Is(Kind::kList) && !value.IsDict() && !value.Is(Kind::kView);
}

// object[key]; missing where Python raises TypeError or LookupError.
Value FindItem(Heap& heap, const Value& object, const Value& key) {
  switch (object.kind()) {
    case Kind::kDict: {
      heap.Work(key.weight());
      if (!IsHashable(key)) return Value();
      const Value* found = object.As<Dict>().Find(key);
      return found == nullptr ? Value() : *found;
    }
    case Kind::kString:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
      return key.IsIntegral() ? ItemAt(heap, object, key.int_value()) : Value();
    case Kind::kUndefined:
      ThrowUndefined(object);
    default:
      return Value();
  }
}

Value MakeUndefined(Heap& heap, const Value& object, const Value& key) {
  return Value(Kind::kUndefined, new Undefined(&heap, "", TypeRepr(object), key));
}

}  // namespace

Native FindMethod(const Value& object, std::string_view name) {
  const Method* method = FindMethodEntry(object, name);
  return method == nullptr ? nullptr : method->function;
}

Value GetAttribute(Interpreter& interpreter, const Value& object, const Value& name) {
  Value found = FindAttribute(interpreter, object, name);
  if (found.IsMissing()) found = FindItem(interpreter.heap(), object, name);
  return found.IsMissing() ? MakeUndefined(interpreter.heap(), object, name) : found;
}

Value GetItem(Interpreter& interpreter, const Value& object, const Value& key) {
  Value found = FindItem(interpreter.heap(), object, key);
  if (found.IsMissing() && key.IsString()) found = FindAttribute(interpreter, object, key);
  return found.IsMissing() ? MakeUndefined(interpreter.heap(), object, key) : found;
}

}  // namespace octavo::jinja
