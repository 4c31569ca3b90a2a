// What `value.name` and `value[key]` reach: data, and the methods of Python's types that read.
//
// As in Jinja2's sandbox, what starts with an underscore and what would change a value is refused
// when it is used; nothing else of the process can be reached.
#pragma once

#include <string_view>

#include "text/jinja/value.h"

namespace octavo::jinja {

// `name` is a string.
Value GetAttribute(Interpreter& interpreter, const Value& object, const Value& name);
Value GetItem(Interpreter& interpreter, const Value& object, const Value& key);

// A method that can be called without making a value of it first; null if attribute `name` is none.
Native FindMethod(const Value& object, std::string_view name);

struct Method {
  std::string_view name;
  Native function;
};
// The methods of str; null if it has none of that name.
const Method* FindStringMethod(std::string_view name);

}  // namespace octavo::jinja
