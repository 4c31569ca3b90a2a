// Template source to a Program, with the grammar of Jinja2's parser.
#pragma once

#include <memory>
#include <string_view>

#include "text/jinja/ast.h"

namespace octavo::jinja {

// Throws SyntaxFault. Names are not yet resolved.
std::unique_ptr<Program> Parse(std::string_view source);

}  // namespace octavo::jinja
