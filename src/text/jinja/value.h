// The values of the template language: Python's, as far as templates can reach them.
//
// A Value is a number, a constant or a reference to an Object. Strings, lists, tuples and dicts
// never change once made. Objects are counted without atomics: those of one rendering stay in its
// thread, and constants of a parsed template, which threads share, are not counted at all. An
// object knows how deeply it nests, and none nests deeper than kMaxValueDepth, so that recursion
// over values is safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja/heap.h"

namespace octavo::jinja {

using Int = __int128;  // Python's are unbounded: what leaves 128 bits is an error

enum class Kind : uint8_t {
  kMissing,    // no value at all: a variable not set, an argument not given
  kUndefined,  // the language's undefined
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kList,
  kTuple,
  kDict,
  kView,  // keys(), values(), items() of a dict
  kRange,
  kIterator,
  kNamespace,
  kFunction,
  kMacro,
  kLoop,
  kCycler,
  kJoiner,
};

class Value;

class Object {
 public:
  virtual ~Object() {
    if (heap_ != nullptr) heap_->Release(claimed_);
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  int depth() const { return depth_; }
  // How many values there are in it, each counted as often as it is reached: what comparing or
  // hashing it may cost.
  uint64_t weight() const { return weight_; }

 protected:
  // heap: what counts this object; null for constants. bytes: what it holds besides itself.
  Object(Heap* heap, size_t bytes) : heap_(heap), claimed_(bytes + kOverhead) {
    if (heap_ != nullptr) heap_->Claim(claimed_);
  }
  // Call for each value it holds. Throws what is too deep or too much.
  void Nest(const Value& child);
  void ClaimMore(size_t bytes) {
    if (heap_ == nullptr) return;
    heap_->Claim(bytes);
    claimed_ += bytes;
  }
  void SetWeight(uint64_t weight) { weight_ = weight; }
  Heap* heap() const { return heap_; }

 private:
  friend class Value;
  friend class Mutable;
  friend class Heap;
  static constexpr size_t kOverhead = 64;
  static constexpr int32_t kUncounted = -1;

  void Dispose();  // at the last reference

  int32_t references_ = 0;
  int16_t depth_ = 0;
  bool mutable_ = false;
  uint64_t weight_ = 1;
  Heap* heap_;
  size_t claimed_;
};

// An object into which values can be put after it was made, so that it may come to hold itself. The
// heap deletes these one after the other, never within each other, and empties those that are left
// when it dies.
class Mutable : public Object {
 public:
  ~Mutable() override;

 protected:
  explicit Mutable(Heap* heap, size_t bytes = 0);

 private:
  friend class Heap;
  virtual void Clear() = 0;  // drops all values it holds

  static constexpr size_t kNowhere = ~size_t{0};

  size_t place_;  // among the heap's
};

class Value {
 public:
  Value() : kind_(Kind::kMissing) {}
  // Counts one reference; `object` may be new.
  Value(Kind kind, Object* object) : kind_(kind), is_object_(true), object_(object) { Retain(); }
  // Of an object that something else owns.
  static Value Uncounted(Kind kind, Object* object) {
    object->references_ = Object::kUncounted;
    return Value(kind, object);
  }
  static Value None() { return Value(Kind::kNone); }
  static Value Bool(bool value) {
    Value out(Kind::kBool);
    out.bool_ = value;
    return out;
  }
  static Value Integer(Int value) {
    Value out(Kind::kInt);
    out.int_ = value;
    return out;
  }
  static Value Float(double value) {
    Value out(Kind::kFloat);
    out.float_ = value;
    return out;
  }

  Value(const Value& other) { CopyFrom(other); }
  Value(Value&& other) noexcept { MoveFrom(&other); }
  Value& operator=(const Value& other) {
    if (this != &other) {
      Value copy(other);  // first, since what is released may own `other`
      Drop();
      MoveFrom(&copy);
    }
    return *this;
  }
  Value& operator=(Value&& other) noexcept {
    if (this != &other) {
      Value taken(std::move(other));
      Drop();
      MoveFrom(&taken);
    }
    return *this;
  }
  ~Value() { Drop(); }

  Kind kind() const { return kind_; }
  bool Is(Kind kind) const { return kind_ == kind; }
  bool IsMissing() const { return kind_ == Kind::kMissing; }
  bool IsUndefined() const { return kind_ == Kind::kUndefined; }
  bool IsNone() const { return kind_ == Kind::kNone; }
  bool IsString() const { return kind_ == Kind::kString; }
  bool IsDict() const { return kind_ == Kind::kDict; }
  bool IsSequence() const { return kind_ == Kind::kList || kind_ == Kind::kTuple; }
  // Python's bool is an int.
  bool IsIntegral() const { return kind_ == Kind::kInt || kind_ == Kind::kBool; }
  bool IsNumber() const { return IsIntegral() || kind_ == Kind::kFloat; }

  bool bool_value() const { return bool_; }
  Int int_value() const { return kind_ == Kind::kBool ? Int{bool_} : int_; }
  double float_value() const {
    return kind_ == Kind::kFloat ? float_ : static_cast<double>(int_value());
  }

  // The object, as what its kind says it is.
  template <typename T>
  T& As() const {
    return static_cast<T&>(*object_);
  }
  Object* object() const { return is_object_ ? object_ : nullptr; }
  const std::string& text() const;          // of a string
  const std::vector<Value>& items() const;  // of a list or tuple
  int depth() const { return is_object_ ? object_->depth() : 0; }
  uint64_t weight() const { return is_object_ ? object_->weight() : 1; }

 private:
  explicit Value(Kind kind) : kind_(kind) {}

  void Retain() {
    if (object_->references_ != Object::kUncounted) ++object_->references_;
  }
  void Drop() {
    if (is_object_ && object_->references_ != Object::kUncounted && --object_->references_ == 0) {
      object_->Dispose();
    }
  }
  void CopyFrom(const Value& other) {
    kind_ = other.kind_;
    is_object_ = other.is_object_;
    if (is_object_) {
      object_ = other.object_;
      Retain();
    } else {
      int_ = other.int_;
    }
  }
  void MoveFrom(Value* other) {
    kind_ = other->kind_;
    is_object_ = other->is_object_;
    if (is_object_) {
      object_ = other->object_;
      other->kind_ = Kind::kMissing;
      other->is_object_ = false;
    } else {
      int_ = other->int_;
    }
  }

  Kind kind_;
  bool is_object_ = false;
  union {
    Int int_ = 0;
    bool bool_;
    double float_;
    Object* object_;
  };
};

using Values = std::vector<Value>;

struct String : Object {
  String(Heap* heap, std::string text, bool markup = false);

  const std::string text;  // UTF-8
  const size_t length;     // in code points
  const bool markup;       // markupsafe.Markup: text that needs no more escaping

  bool ascii() const { return length == text.size(); }
};

struct Sequence : Object {
  Sequence(Heap* heap, Values items, bool is_group = false);
  const Values items;
  const bool is_group;  // one of groupby's, whose items have names too: grouper, list
};

// In the order of insertion. Keys are equal as Python's are: 1, 1.0 and True are one key.
struct Dict : Object {
  using Entry = std::pair<Value, Value>;

  // Of equal keys the first stays with the value of the last. Throws TypeError for a key without
  // hash.
  Dict(Heap* heap, std::vector<Entry> entries);

  // Null if there is no such key. Throws TypeError if `key` has no hash.
  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;

  const std::vector<Entry>& entries() const { return entries_; }

 private:
  template <typename Key>
  size_t Probe(const Key& key, size_t hash) const;

  std::vector<Entry> entries_;
  std::vector<uint32_t> table_;  // open addressing: 1 + index of the entry, or 0; empty if small
};

struct View : Object {
  enum class Part { kKeys, kValues, kItems };
  View(Heap* heap, Value dict, Part part);
  const Value dict;
  const Part part;
};

struct Range : Object {
  Range(Heap* heap, int64_t start, int64_t stop, int64_t step);
  int64_t At(int64_t index) const { return start + index * step; }
  const int64_t start, stop, step;
  const int64_t length;
};

// What an operation on it says. Either a hint, or a name, or a name and the type it was looked for
// in.
struct Undefined : Object {
  Undefined(Heap* heap, std::string hint, const char* in_type, Value name, bool unsafe = false);
  [[noreturn]] void Throw() const;

  const std::string hint;
  const char* const in_type;  // null, or as Jinja names it: "list object"
  const Value name;
  const bool unsafe;  // a SecurityError instead of an UndefinedError
};

struct Namespace : Mutable {
  explicit Namespace(Heap* heap) : Mutable(heap) {}
  // Null if there is none of that name.
  Value* Find(std::string_view name);
  void Set(std::string_view name, Value value);

  std::vector<std::pair<std::string, Value>> attributes;

 private:
  void Clear() override { attributes.clear(); }
};

struct Cycler : Object {
  Cycler(Heap* heap, Values items);
  const Values items;
  size_t position = 0;
};

struct Joiner : Object {
  Joiner(Heap* heap, Value separator);
  const Value separator;
  bool used = false;
};

class Interpreter;

// Values one after the other, once.
struct Iterator : Mutable {
  Iterator(Heap* heap, Value source_in) : Mutable(heap), source(std::move(source_in)) {
    Nest(source);
  }
  // False at the end, and from then on.
  virtual bool Next(Interpreter& interpreter, Value* out) = 0;

 protected:
  void Clear() override { source = Value(); }

  Value source;  // what it draws from
};

struct Arguments {
  Values positional;
  std::vector<std::pair<std::string, Value>> named;
};

using Native = Value (*)(Interpreter& interpreter, const Value& self, Arguments& arguments);

// A built-in function, or a method bound to `self`.
struct Function : Object {
  Function(Heap* heap, const char* name, Native native, Value self);
  const char* const name;
  const Native native;
  const Value self;
};

Value MakeString(Heap& heap, std::string text, bool markup = false);
Value MakeList(Heap& heap, Values items);
Value MakeTuple(Heap& heap, Values items);
Value MakeDict(Heap& heap, std::vector<Dict::Entry> entries);
// Reserves before the string is copied.
Value CopyString(Heap& heap, std::string_view text, bool markup = false);

// type(value).__name__: "str", "NoneType".
const char* TypeName(const Value& value);
// As messages about undefined things name a value: "dict object", "None".
const char* TypeRepr(const Value& value);

// Throws TypeError where Python has no hash.
size_t Hash(const Value& value);

inline const std::string& Value::text() const { return As<String>().text; }
inline const Values& Value::items() const { return As<Sequence>().items; }

}  // namespace octavo::jinja
