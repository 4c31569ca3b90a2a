// Python's ways to format text: the % operator, str.format and the format specifications of both.
#pragma once

#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace octavo::jinja {

// text % arguments.
Value FormatPercent(Heap& heap, const Value& text, const Value& arguments);

// text.format(*positional, **named). Fields reach attributes and items as expressions do.
Value FormatBraces(Interpreter& interpreter, const Value& text, const Arguments& arguments);

}  // namespace octavo::jinja
