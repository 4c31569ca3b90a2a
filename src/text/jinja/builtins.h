// The filters, tests and global functions of templates: Jinja2's, and those that transformers adds.
#pragma once

#include <initializer_list>
#include <string_view>

#include "text/jinja/value.h"

namespace octavo::jinja {

// Null if there is none of that name. A filter or test of Jinja2 that Octavo lacks is a function
// that throws.
Native FindFilter(std::string_view name);
Native FindTest(std::string_view name);

// range, dict, namespace, ...: missing if there is none of that name.
Value FindGlobal(Heap& heap, std::string_view name);

// Parts of these tables, one per file.
struct Builtin {
  std::string_view name;
  Native function;
};
Native FindTextFilter(std::string_view name);
Native FindSequenceFilter(std::string_view name);

// Arguments matched to parameters, as Python does it.
class Bound {
 public:
  // The first `required` must be given. Throws TypeError.
  Bound(std::string_view function, const Arguments& arguments,
        std::initializer_list<std::string_view> parameters, size_t required = 0);

  // Missing if it was not given.
  const Value& operator[](size_t index) const { return values_[index]; }
  bool Has(size_t index) const { return !values_[index].IsMissing(); }
  bool HasValue(size_t index) const { return Has(index) && !values_[index].IsNone(); }

 private:
  Values values_;
};

}  // namespace octavo::jinja
