// Renders a Program: one Interpreter per rendering.
#pragma once

#include <chrono>
#include <ctime>
#include <string>

#include "text/jinja/ast.h"

namespace octavo::jinja {

// The variables of one call of a function.
struct Activation : Object {
  Activation(Heap* heap, const FunctionInfo& function, Activation* parent_in);
  Activation* const parent;  // of the function around
  Values slots;
};

struct MacroValue : Object {
  MacroValue(Heap* heap, const Stmt& statement, Activation* defining);
  const Stmt& statement;
  Activation* const defining;
};

// The variable `loop`, which also drives the loop.
struct Loop : Mutable {
  Loop(Heap* heap, Value iterable, Value iterator);
  bool Next(Interpreter& interpreter, Value* out);
  int64_t Length(Interpreter& interpreter);
  const Value& PeekNext(Interpreter& interpreter);  // missing at the end

  Value iterable, iterator;
  int64_t index0 = -1;
  int64_t length = -1;  // not yet known
  Value before, current, after, last_changed;
  bool ended = false;
  // Of a recursive loop.
  const Stmt* statement = nullptr;
  Activation* defining = nullptr;
  int64_t depth0 = 0;

 private:
  void Clear() override;
};

class Interpreter {
 public:
  // `context` must be a dict; `now` is local time.
  Interpreter(const Program& program, Value context, std::tm now, Heap* heap);

  std::string Run();

  Heap& heap() { return heap_; }
  const std::tm& now() const { return now_; }
  // Of what was evaluated last.
  int line() const { return line_; }

  Value Call(const Value& callee, Arguments& arguments);
  // What iterating over `value` gives, as an Iterator; TypeError if it cannot be iterated over.
  Value Iterate(const Value& value);
  bool IsIterable(const Value& value) const;
  // All of what iterating gives.
  Values Collect(const Value& value);
  bool Contains(const Value& container, const Value& item);
  bool TruthOf(const Value& value);
  int64_t LengthOf(const Value& value);
  // str(), charged to the heap.
  Value ToString(const Value& value);

  // Runs filters and tests by name, as map() and select() do.
  Value CallFilter(std::string_view name, const Value& value, const Arguments& arguments);
  bool CallTest(std::string_view name, const Value& value, const Arguments& arguments);

  // Of a loop with a condition: whether an item is one of its; puts it into the shape of the
  // loop's target.
  bool Admits(const Stmt& loop, Activation* activation, Value* item);
  void EnterTest(const Stmt& loop, Activation* activation);

  // Counts what is being evaluated within each other.
  class Nesting {
   public:
    explicit Nesting(Interpreter* interpreter) : depth_(&interpreter->depth_) {
      if (++*depth_ > kMaxEvaluationDepth) Fail();
    }
    ~Nesting() { --*depth_; }
    Nesting(const Nesting&) = delete;
    Nesting& operator=(const Nesting&) = delete;

   private:
    [[noreturn]] void Fail();
    int* depth_;
  };

 private:
  enum class Flow { kNormal, kBreak, kContinue };

  Flow Exec(const Block& block, Activation* activation);
  Flow Exec(const Stmt& statement, Activation* activation);
  void ExecOutput(const Stmt& statement, Activation* activation);
  Flow ExecIf(const Stmt& statement, Activation* activation);
  Flow ExecFor(const Stmt& statement, Activation* activation);
  void ExecSet(const Stmt& statement, Activation* activation);
  Flow ExecCapture(const Stmt& statement, Activation* activation);
  void ExecCallBlock(const Stmt& statement, Activation* activation);
  Flow ExecWith(const Stmt& statement, Activation* activation);

  // The loop over `iterable`, with its variables in `activation`.
  Flow RunLoop(const Stmt& statement, const Value& iterable, Activation* activation,
               Activation* defining, int64_t depth);
  Value RunRecursiveLoop(const Stmt& statement, const Value& iterable, Activation* defining,
                         int64_t depth);

  Value Eval(const Expr& expr, Activation* activation);
  Value EvalItems(const Expr& expr, Activation* activation);
  Value EvalDict(const Expr& expr, Activation* activation);
  Value EvalConcat(const Expr& expr, Activation* activation);
  Value EvalBinary(const Expr& expr, Activation* activation);
  Value EvalCompare(const Expr& expr, Activation* activation);
  Value EvalSubscript(const Expr& expr, Activation* activation);
  Value EvalCall(const Expr& expr, Activation* activation, const Value* caller);
  Value EvalFilter(const Expr& expr, Activation* activation, const Value* input);
  bool HoldsComparison(const Comparison& comparison, const Value& left, const Value& right);
  void EvalArguments(const CallArguments& from, Activation* activation, Arguments* arguments);

  Value CallMacro(const MacroValue& macro, Arguments& arguments);
  void Assign(const Target& target, const Value& value, Activation* activation);
  void Enter(const Frame& frame, Activation* activation);
  void Leave(const Frame& frame, Activation* activation);
  Value Lookup(const std::string& name);
  static Value& At(const Slot& slot, Activation* activation);

  void Write(const Value& value);
  // Puts what is written while `action` runs into `text`, which is empty.
  template <typename Action>
  Flow Capture(Action action, std::string* text);

  const Program& program_;
  const Value context_;
  const std::tm now_;
  Heap& heap_;
  std::string* out_ = nullptr;
  int depth_ = 0;
  int line_ = 1;
};

}  // namespace octavo::jinja
