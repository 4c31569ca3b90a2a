#include "text/jinja/value.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>

#include "text/jinja/operators.h"

namespace octavo::jinja {
namespace {

size_t CountCodePoints(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

size_t HashText(std::string_view text) { return std::hash<std::string_view>()(text); }

size_t Combine(size_t seed, size_t hash) {
  return seed ^ (hash + 0x9E3779B97F4A7C15u + (seed << 6) + (seed >> 2));
}

size_t HashInt(Int value) {
  return Combine(std::hash<int64_t>()(static_cast<int64_t>(value)),
                 std::hash<int64_t>()(static_cast<int64_t>(value >> 64)));
}

bool SameKey(const Value& entry, const Value& key) { return Equal(entry, key); }

bool SameKey(const Value& entry, std::string_view key) {
  return entry.IsString() && entry.text() == key;
}

// Up to here comparing keys is as quick as hashing one.
constexpr size_t kSmallDict = 8;

}  // namespace

void Object::Nest(const Value& child) {
  depth_ = static_cast<int16_t>(std::max<int>(depth_, child.depth() + 1));
  weight_ += child.weight();
  if (depth_ > kMaxValueDepth) {
    ThrowLimit(fmt::format("values nested deeper than {}", kMaxValueDepth));
  }
  if (weight_ > kMaxWeight) ThrowLimit(fmt::format("a value of more than {} values", kMaxWeight));
}

void Object::Dispose() {
  if (mutable_) {
    heap_->Bury(this);
  } else {
    delete this;
  }
}

Mutable::Mutable(Heap* heap, size_t bytes) : Object(heap, bytes) {
  mutable_ = true;
  heap->Register(this);
}

Mutable::~Mutable() { heap()->Unregister(this); }

String::String(Heap* heap, std::string text_in, bool markup_in)
    : Object(heap, text_in.size()),
      text(std::move(text_in)),
      length(CountCodePoints(text)),
      markup(markup_in) {
  SetWeight(1 + text.size() / 16);
}

Sequence::Sequence(Heap* heap, Values items_in, bool is_group_in)
    : Object(heap, items_in.size() * sizeof(Value)),
      items(std::move(items_in)),
      is_group(is_group_in) {
  for (const Value& item : items) Nest(item);
}

template <typename Key>
size_t Dict::Probe(const Key& key, size_t hash) const {
  const size_t mask = table_.size() - 1;
  size_t at = hash & mask;
  while (table_[at] != 0 && !SameKey(entries_[table_[at] - 1].first, key)) at = (at + 1) & mask;
  return at;
}

Dict::Dict(Heap* heap, std::vector<Entry> entries)
    : Object(heap, entries.size() * (sizeof(Entry) + 2 * sizeof(uint32_t))) {
  const bool indexed = entries.size() > kSmallDict;
  if (indexed) table_.resize(std::bit_ceil(2 * entries.size()));
  entries_.reserve(entries.size());
  for (Entry& entry : entries) {
    const size_t hash = Hash(entry.first);
    Nest(entry.first);
    Nest(entry.second);
    if (indexed) {
      uint32_t& place = table_[Probe(entry.first, hash)];
      if (place != 0) {
        entries_[place - 1].second = std::move(entry.second);
        continue;
      }
      place = static_cast<uint32_t>(entries_.size() + 1);
    } else {
      const auto known = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& earlier) {
        return SameKey(earlier.first, entry.first);
      });
      if (known != entries_.end()) {
        known->second = std::move(entry.second);
        continue;
      }
    }
    entries_.push_back(std::move(entry));
  }
}

const Value* Dict::Find(const Value& key) const {
  if (key.IsString()) return Find(key.text());
  const size_t hash = Hash(key);
  if (!table_.empty()) {
    const uint32_t place = table_[Probe(key, hash)];
    return place == 0 ? nullptr : &entries_[place - 1].second;
  }
  for (const Entry& entry : entries_) {
    if (SameKey(entry.first, key)) return &entry.second;
  }
  return nullptr;
}

const Value* Dict::Find(std::string_view key) const {
  if (!table_.empty()) {
    const uint32_t place = table_[Probe(key, HashText(key))];
    return place == 0 ? nullptr : &entries_[place - 1].second;
  }
  for (const Entry& entry : entries_) {
    if (SameKey(entry.first, key)) return &entry.second;
  }
  return nullptr;
}

View::View(Heap* heap, Value dict_in, Part part_in)
    : Object(heap, 0), dict(std::move(dict_in)), part(part_in) {
  Nest(dict);
}

Range::Range(Heap* heap, int64_t start_in, int64_t stop_in, int64_t step_in)
    : Object(heap, 0), start(start_in), stop(stop_in), step(step_in), length([&] {
        const Int distance = step > 0 ? Int{stop} - start : Int{start} - stop;
        const Int stride = step > 0 ? Int{step} : -Int{step};
        return distance <= 0 ? 0 : static_cast<int64_t>((distance + stride - 1) / stride);
      }()) {}

Undefined::Undefined(Heap* heap, std::string hint_in, const char* in_type_in, Value name_in,
                     bool unsafe_in)
    : Object(heap, hint_in.size()),
      hint(std::move(hint_in)),
      in_type(in_type_in),
      name(std::move(name_in)),
      unsafe(unsafe_in) {
  Nest(name);
}

void Undefined::Throw() const {
  std::string message = hint;
  if (message.empty()) {
    if (in_type == nullptr) {
      message = fmt::format("{} is undefined", Repr(name));
    } else if (name.IsString()) {
      message = fmt::format("'{}' has no attribute {}", in_type, Repr(name));
    } else {
      message = fmt::format("{} has no element {}", in_type, Repr(name));
    }
  }
  throw Fault(unsafe ? "SecurityError" : "UndefinedError", std::move(message));
}

Value* Namespace::Find(std::string_view name) {
  for (auto& [key, value] : attributes) {
    if (key == name) return &value;
  }
  return nullptr;
}

void Namespace::Set(std::string_view name, Value value) {
  if (Value* known = Find(name)) {
    *known = std::move(value);
    return;
  }
  ClaimMore(sizeof(attributes[0]) + name.size());
  attributes.emplace_back(name, std::move(value));
}

Cycler::Cycler(Heap* heap, Values items_in)
    : Object(heap, items_in.size() * sizeof(Value)), items(std::move(items_in)) {
  for (const Value& item : items) Nest(item);
}

Joiner::Joiner(Heap* heap, Value separator_in)
    : Object(heap, 0), separator(std::move(separator_in)) {
  Nest(separator);
}

Function::Function(Heap* heap, const char* name_in, Native native_in, Value self_in)
    : Object(heap, 0), name(name_in), native(native_in), self(std::move(self_in)) {
  Nest(self);
}

Value MakeString(Heap& heap, std::string text, bool markup) {
  heap.WorkOnBytes(text.size());
  return Value(Kind::kString, new String(&heap, std::move(text), markup));
}

Value CopyString(Heap& heap, std::string_view text, bool markup) {
  heap.Reserve(text.size());
  return MakeString(heap, std::string(text), markup);
}

Value MakeList(Heap& heap, Values items) {
  heap.Work(1 + items.size());
  return Value(Kind::kList, new Sequence(&heap, std::move(items)));
}

Value MakeTuple(Heap& heap, Values items) {
  heap.Work(1 + items.size());
  return Value(Kind::kTuple, new Sequence(&heap, std::move(items)));
}

Value MakeDict(Heap& heap, std::vector<Dict::Entry> entries) {
  heap.Work(1 + entries.size());
  return Value(Kind::kDict, new Dict(&heap, std::move(entries)));
}

const char* TypeName(const Value& value) {
  switch (value.kind()) {
    case Kind::kMissing:
      return "missing";
    case Kind::kUndefined:
      return "Undefined";
    case Kind::kNone:
      return "NoneType";
    case Kind::kBool:
      return "bool";
    case Kind::kInt:
      return "int";
    case Kind::kFloat:
      return "float";
    case Kind::kString:
      return value.As<String>().markup ? "Markup" : "str";
    case Kind::kList:
      return "list";
    case Kind::kTuple:
      return "tuple";
    case Kind::kDict:
      return "dict";
    case Kind::kView:
      switch (value.As<View>().part) {
        case View::Part::kKeys:
          return "dict_keys";
        case View::Part::kValues:
          return "dict_values";
        case View::Part::kItems:
          return "dict_items";
      }
      break;
    case Kind::kRange:
      return "range";
    case Kind::kIterator:
      return "generator";
    case Kind::kNamespace:
      return "Namespace";
    case Kind::kFunction:
      return value.As<Function>().self.IsMissing() ? "function" : "builtin_function_or_method";
    case Kind::kMacro:
      return "Macro";
    case Kind::kLoop:
      return "LoopContext";
    case Kind::kCycler:
      return "Cycler";
    case Kind::kJoiner:
      return "Joiner";
  }
  return "object";
}

const char* TypeRepr(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return "jinja2.runtime.Undefined object";
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "bool object";
    case Kind::kInt:
      return "int object";
    case Kind::kFloat:
      return "float object";
    case Kind::kString:
      return value.As<String>().markup ? "markupsafe.Markup object" : "str object";
    case Kind::kList:
      return "list object";
    case Kind::kTuple:
      return "tuple object";
    case Kind::kDict:
      return "dict object";
    case Kind::kView:
      switch (value.As<View>().part) {
        case View::Part::kKeys:
          return "dict_keys object";
        case View::Part::kValues:
          return "dict_values object";
        case View::Part::kItems:
          return "dict_items object";
      }
      break;
    case Kind::kRange:
      return "range object";
    case Kind::kIterator:
      return "generator object";
    case Kind::kNamespace:
      return "jinja2.utils.Namespace object";
    case Kind::kFunction:
      return value.As<Function>().self.IsMissing() ? "function object"
                                                   : "builtin_function_or_method object";
    case Kind::kMacro:
      return "jinja2.runtime.Macro object";
    case Kind::kLoop:
      return "jinja2.runtime.LoopContext object";
    case Kind::kCycler:
      return "jinja2.utils.Cycler object";
    case Kind::kJoiner:
      return "jinja2.utils.Joiner object";
    case Kind::kMissing:
      break;
  }
  return "object";
}

size_t Hash(const Value& value) {
  switch (value.kind()) {
    case Kind::kBool:
    case Kind::kInt:
      return HashInt(value.int_value());
    case Kind::kFloat: {
      const double number = value.float_value();
      if (std::trunc(number) == number && std::fabs(number) < 0x1p126) {
        return HashInt(static_cast<Int>(number));  // equal to that integer
      }
      return std::hash<double>()(number);
    }
    case Kind::kString:
      return HashText(value.text());
    case Kind::kTuple: {
      size_t hash = 7;
      for (const Value& item : value.items()) hash = Combine(hash, Hash(item));
      return hash;
    }
    case Kind::kList:
    case Kind::kDict:
      ThrowTypeError(fmt::format("unhashable type: '{}'", TypeName(value)));
    case Kind::kView:
      if (value.As<View>().part != View::Part::kValues) {
        ThrowTypeError(fmt::format("unhashable type: '{}'", TypeName(value)));
      }
      return std::hash<Object*>()(value.object());
    case Kind::kRange:
      return HashInt(value.As<Range>().length);
    case Kind::kMissing:
    case Kind::kUndefined:
    case Kind::kNone:
      return static_cast<size_t>(value.kind());
    default:
      return std::hash<Object*>()(value.object());
  }
}

}  // namespace octavo::jinja
