#include "text/jinja/iterators.h"

#include <fmt/format.h>

#include <algorithm>

#include "text/jinja/operators.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

// By index, forwards or backwards.
struct IndexIterator : Iterator {
  IndexIterator(Heap* heap, Value source_in, bool backwards_in)
      : Iterator(heap, std::move(source_in)), backwards(backwards_in), length(LengthOf(source)) {}

  bool Next(Interpreter& interpreter, Value* out) override {
    if (at == length) return false;
    const int64_t index = backwards ? length - 1 - at : at;
    ++at;
    switch (source.kind()) {
      case Kind::kRange:
        *out = Value::Integer(source.As<Range>().At(index));
        break;
      case Kind::kDict:
        *out = source.As<Dict>().entries()[index].first;
        break;
      case Kind::kView: {
        const View& view = source.As<View>();
        const auto& [key, value] = view.dict.As<Dict>().entries()[index];
        *out = view.part == View::Part::kKeys     ? key
               : view.part == View::Part::kValues ? value
                                                  : MakeTuple(interpreter.heap(), {key, value});
        break;
      }
      default:
        *out = source.items()[index];
    }
    return true;
  }

  void Clear() override {
    Iterator::Clear();
    at = length;
  }

  static int64_t LengthOf(const Value& value) { return value.IsUndefined() ? 0 : Length(value); }

  const bool backwards;
  const int64_t length;
  int64_t at = 0;
};

struct StringIterator : Iterator {
  StringIterator(Heap* heap, Value source_in) : Iterator(heap, std::move(source_in)) {}

  bool Next(Interpreter& interpreter, Value* out) override {
    if (!source.IsString()) return false;
    const std::string& text = source.text();
    if (at == text.size()) return false;
    const size_t begin = at;
    NextCodePoint(text, &at);
    *out = MakeString(interpreter.heap(), text.substr(begin, at - begin));
    return true;
  }

  size_t at = 0;
};

struct FilteredIterator : Iterator {
  FilteredIterator(Heap* heap, Value source_in, const Stmt& loop_in, Activation* defining)
      : Iterator(heap, std::move(source_in)),
        loop(loop_in),
        activation(heap, loop_in.loop->test_function, defining) {}

  bool Next(Interpreter& interpreter, Value* out) override {
    if (running) ThrowValueError("generator already executing");
    running = true;
    if (!std::exchange(started, true)) interpreter.EnterTest(loop, &activation);
    bool found = false;
    while (!found && source.Is(Kind::kIterator) && source.As<Iterator>().Next(interpreter, out)) {
      found = interpreter.Admits(loop, &activation, out);
    }
    running = false;
    return found;
  }

  void Clear() override {
    Iterator::Clear();
    activation.slots.clear();
  }

  const Stmt& loop;
  Activation activation;
  bool started = false, running = false;
};

struct StepIterator : Iterator {
  StepIterator(Heap* heap, Value source_in, Step step_in)
      : Iterator(heap, std::move(source_in)), step(std::move(step_in)) {}

  bool Next(Interpreter& interpreter, Value* out) override {
    const Interpreter::Nesting nesting(&interpreter);
    if (running) ThrowValueError("generator already executing");
    running = true;
    bool found = false;
    while (!found && source.Is(Kind::kIterator) && source.As<Iterator>().Next(interpreter, out)) {
      interpreter.heap().Work(1);
      found = step(interpreter, out);
    }
    running = false;
    return found;
  }

  void Clear() override {
    Iterator::Clear();
    step = nullptr;
  }

  Step step;
  bool running = false;
};

struct DeferredIterator : Iterator {
  DeferredIterator(Heap* heap, Value source_in, MakeAll make_in)
      : Iterator(heap, std::move(source_in)), make(std::move(make_in)) {}

  bool Next(Interpreter& interpreter, Value* out) override {
    if (make != nullptr) {
      const Interpreter::Nesting nesting(&interpreter);
      const MakeAll once = std::exchange(make, nullptr);
      items = once(interpreter, source);
      ClaimMore(items.size() * sizeof(Value));
      source = Value();
    }
    if (at == items.size()) return false;
    *out = items[at++];
    return true;
  }

  void Clear() override {
    Iterator::Clear();
    make = nullptr;
    items.clear();
    at = 0;
  }

  MakeAll make;
  Values items;
  size_t at = 0;
};

}  // namespace

Value MakeFilteredIterator(Heap& heap, Value iterator, const Stmt& loop, Activation* defining) {
  return Value(Kind::kIterator, new FilteredIterator(&heap, std::move(iterator), loop, defining));
}

Value MakeStepIterator(Heap& heap, Value iterator, Step step) {
  return Value(Kind::kIterator, new StepIterator(&heap, std::move(iterator), std::move(step)));
}

Value MakeDeferredIterator(Heap& heap, Value source, MakeAll make) {
  return Value(Kind::kIterator, new DeferredIterator(&heap, std::move(source), std::move(make)));
}

Value MakeReverseIterator(Heap& heap, const Value& value) {
  return Value(Kind::kIterator, new IndexIterator(&heap, value, true));
}

bool Interpreter::IsIterable(const Value& value) const {
  return HasLength(value) || value.Is(Kind::kIterator);
}

Value Interpreter::Iterate(const Value& value) {
  if (value.Is(Kind::kIterator)) return value;
  if (value.IsString()) return Value(Kind::kIterator, new StringIterator(&heap_, value));
  if (HasLength(value)) return Value(Kind::kIterator, new IndexIterator(&heap_, value, false));
  ThrowTypeError(fmt::format("'{}' object is not iterable", TypeName(value)));
}

// -- Loops

Loop::Loop(Heap* heap, Value iterable_in, Value iterator_in)
    : Mutable(heap), iterable(std::move(iterable_in)), iterator(std::move(iterator_in)) {
  Nest(iterable);
  Nest(iterator);
}

void Loop::Clear() {
  iterable = iterator = before = current = after = last_changed = Value();
  ended = true;
}

const Value& Loop::PeekNext(Interpreter& interpreter) {
  if (after.IsMissing() && !ended) {
    ended = !iterator.As<Iterator>().Next(interpreter, &after);
    if (ended) after = Value();
  }
  return after;
}

bool Loop::Next(Interpreter& interpreter, Value* out) {
  if (PeekNext(interpreter).IsMissing()) return false;
  *out = std::move(after);
  after = Value();
  ++index0;
  before = std::move(current);
  current = *out;
  return true;
}

int64_t Loop::Length(Interpreter& interpreter) {
  if (length >= 0) return length;
  if (HasLength(iterable)) {
    length = jinja::Length(iterable);
    return length;
  }
  // The rest of an iterator has to be taken to be counted.
  Values rest;
  if (!ended) rest = interpreter.Collect(iterator);
  length = static_cast<int64_t>(rest.size()) + index0 + 1 + (after.IsMissing() ? 0 : 1);
  const Value list = MakeList(interpreter.heap(), std::move(rest));
  iterator = interpreter.Iterate(list);
  ended = false;
  return length;
}

}  // namespace octavo::jinja
