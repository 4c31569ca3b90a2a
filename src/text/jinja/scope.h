// Resolves every name of a Program to a slot.
//
// Jinja2 compiles templates to Python functions and decides, before anything runs, where each name
// lives: loops, macros and blocks have variables of their own; a name that a block assigns is a
// copy of the outer variable there; a name that nobody assigns is looked up in the context when its
// block begins. Templates rely on the details (a name set after a loop hides the context's in the
// loop before it), so this makes the same decisions.
#pragma once

#include "text/jinja/ast.h"

namespace octavo::jinja {

// Also looks up filters and tests. Throws SyntaxFault for what Jinja2 refuses to compile.
void Resolve(Program* program);

}  // namespace octavo::jinja
