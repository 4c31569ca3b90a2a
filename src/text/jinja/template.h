// Jinja templates as Hugging Face transformers renders them: parse once, render often.
//
//   jinja::Template greeting("Hello {{ name }}!", "greeting");
//   std::string text = greeting.Render({{"name", "world"}}, jinja::LocalTime());
//
// The language is that of Python's Jinja2 3.1 in its immutable sandbox, with trim_blocks,
// lstrip_blocks, break and continue, {% generation %}, tojson as json.dumps(ensure_ascii=False),
// raise_exception and strftime_now. Output and errors are Python's, with these exceptions:
//
//   * not there (an error that says so): template inheritance, include and import, autoescape; the
//     filters pprint, random, striptags, urlize and wordwrap; lipsum; str.encode and str.translate;
//   * integers have 128 bits: what leaves them is an error;
//   * Unicode's properties are those of utf8proc;
//   * Limits (heap.h): templates are strangers' code and get no more time, memory or stack than
//     that.
//
// Immutable: Render may be called from any number of threads.
#pragma once

#include <atomic>
#include <ctime>
#include <memory>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "text/jinja/heap.h"

namespace octavo::jinja {

struct Program;

// The time that strftime_now tells.
std::tm LocalTime();

class Template {
 public:
  // `name` begins every error. Throws Error: "<name>:<line>: TemplateSyntaxError: ...".
  Template(std::string_view source, std::string name, const Limits& limits = {});
  Template(Template&&) noexcept;
  Template& operator=(Template&&) noexcept;
  ~Template();

  // `variables`: an object. Throws Error: "<name>:<line>: <what Python raises>: ...".
  // `abandoned`, unless null, ends it early once another thread sets it.
  std::string Render(const nlohmann::ordered_json& variables, const std::tm& now,
                     const std::atomic<bool>* abandoned = nullptr) const;

 private:
  std::string name_;
  Limits limits_;
  std::unique_ptr<const Program> program_;
};

}  // namespace octavo::jinja
