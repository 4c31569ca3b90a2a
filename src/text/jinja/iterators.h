// Iterators over values, and the lazy ones that filters and loops return.
#pragma once

#include <functional>

#include "text/jinja/interpreter.h"
#include "text/jinja/value.h"

namespace octavo::jinja {

// The items of a loop that its condition admits. `defining`: the activation around the loop.
Value MakeFilteredIterator(Heap& heap, Value iterator, const Stmt& loop, Activation* defining);

// Values of `iterator`, each replaced by what `step` puts in its place, or left out if it returns
// false.
using Step = std::function<bool(Interpreter& interpreter, Value* item)>;
Value MakeStepIterator(Heap& heap, Value iterator, Step step);

// All that `make` returns, which runs when the first is asked for.
using MakeAll = std::function<Values(Interpreter& interpreter, const Value& source)>;
Value MakeDeferredIterator(Heap& heap, Value source, MakeAll make);

// From the last to the first of a list, tuple, dict, view or range.
Value MakeReverseIterator(Heap& heap, const Value& value);

}  // namespace octavo::jinja
