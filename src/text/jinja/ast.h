// A parsed template: expressions and statements, as Jinja2's parser makes them, with every name
// resolved to a slot (scope.h).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja/operators.h"
#include "text/jinja/value.h"

namespace octavo::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

// Where a variable lives: in the activation that many functions out, at that index.
struct Slot {
  int up = 0;
  int index = -1;
};

enum class ExprKind : uint8_t {
  kConstant,
  kName,
  kNamespaceRef,  // ns.name as the target of an assignment
  kTuple,
  kList,
  kDict,    // operands: key, value, key, value, ...
  kConcat,  // ~
  kBinary,
  kNegate,
  kPlus,
  kNot,
  kAnd,
  kOr,
  kCompare,      // operands[0] ops[0] operands[1] ops[1] ...
  kConditional,  // operands: test, then, else (or null)
  kAttribute,    // operands[0].value
  kItem,         // operands[0][operands[1]]
  kSlice,        // operands[0][operands[1]:operands[2]:operands[3]], each bound may be null
  kCall,         // operands[0](arguments)
  kFilter,       // operands[0]|name(arguments); null in {% filter %} and {% set x | ... %}
  kTest          // operands[0] is name(arguments)
};

enum class ComparisonKind : uint8_t { kOrder, kIn, kNotIn };
struct Comparison {
  ComparisonKind kind;
  CompareOp op = CompareOp::kEqual;  // of kOrder
};

struct CallArguments {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> named;
  ExprPtr spread, spread_named;  // *x, **x; may be null
};

struct Expr {
  ExprKind kind;
  int line;
  int height = 1;  // of the tree below
  BinaryOp op = BinaryOp::kAdd;
  Slot slot = {};            // kName, kNamespaceRef
  Native builtin = nullptr;  // kFilter, kTest; null if there is none of that name
  std::string name = {};     // kName, kNamespaceRef (of the namespace), kFilter, kTest
  // kConstant; kName: what it is if it has no value; kAttribute, kNamespaceRef: the attribute.
  Value value = {};
  std::vector<ExprPtr> operands = {};
  std::vector<Comparison> comparisons = {};
  std::unique_ptr<CallArguments> arguments = nullptr;  // kCall, kFilter, kTest
};

struct Stmt;
using StmtPtr = std::unique_ptr<Stmt>;
using Block = std::vector<StmtPtr>;

// What an assignment assigns to, after resolution.
struct Target {
  enum class Kind : uint8_t { kName, kAttribute, kTuple };
  Kind kind = Kind::kName;
  Slot slot = {};
  std::string attribute = {};
  std::vector<Target> parts = {};
};

// What happens to variables where a block of their own begins and ends.
struct Frame {
  struct Load {
    enum class Kind : uint8_t { kClear, kAlias, kResolve };
    Kind kind;
    int index;              // the variable
    Slot source = {};       // kAlias: takes that one's value
    std::string name = {};  // kResolve: looks it up in the context
  };
  std::vector<Load> enter;
  std::vector<int> leave;  // variables that lose their values
};

// What has variables of its own: the template, a macro, a recursive loop, a loop's condition.
struct FunctionInfo {
  int slots = 0;
  bool captured = false;  // functions within may outlive a call of it
};

struct LoopScope {
  Frame body, otherwise, test;
  Target target, test_target;
  int loop_slot = -1;  // of the variable `loop`; -1: the body does not use it
  FunctionInfo test_function, recursive_function;
};

struct MacroScope {
  FunctionInfo function;
  Frame frame;
  std::vector<int> parameters;                 // slots
  int caller = -1, kwargs = -1, varargs = -1;  // slots, if the body uses them
  bool explicit_caller = false;
};

enum class StmtKind : uint8_t {
  kOutput,
  kIf,
  kFor,
  kSet,
  kSetBlock,
  kMacro,
  kCallBlock,  // {% call %}, and {% generation %} without a call
  kFilterBlock,
  kWith,
  kBreak,
  kContinue
};

struct Stmt {
  StmtKind kind;
  int line;
  int height = 1;
  // kOutput: what to print. kIf: the tests. kWith: the values. Macros: the defaults of the last
  // parameters.
  std::vector<ExprPtr> exprs = {};
  std::vector<Block> bodies = {};     // kIf: as many as tests, or one more for else
  Block body = {}, otherwise = {};    // kFor: otherwise is its else
  ExprPtr target = nullptr;           // kSet, kSetBlock, kFor
  std::vector<ExprPtr> targets = {};  // kWith
  ExprPtr value = nullptr;  // kSet; kFor: what to loop over; kCallBlock: the call; filters: kFilter
  ExprPtr test = nullptr;   // kFor
  bool recursive = false;
  std::string name = {};                     // kMacro
  std::vector<std::string> parameters = {};  // macros

  // Filled in by resolution.
  Frame frame = {};                   // kSetBlock, kFilterBlock, kWith
  std::vector<Target> resolved = {};  // kSet, kSetBlock, kWith, kMacro (its name)
  std::vector<Slot> namespaces = {};  // kSet: must be namespaces before it assigns
  std::unique_ptr<LoopScope> loop = nullptr;
  std::unique_ptr<MacroScope> macro = nullptr;
};

struct Program {
  Heap constants{Limits{}};  // owns the objects of all constants
  Block body;
  FunctionInfo function;
  Frame frame;
};

}  // namespace octavo::jinja
