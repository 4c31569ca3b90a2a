#include "text/jinja/interpreter.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "text/jinja/attributes.h"
#include "text/jinja/builtins.h"
#include "text/jinja/iterators.h"
#include "text/jinja/operators.h"
#include "text/jinja/python_text.h"

namespace octavo::jinja {

Activation::Activation(Heap* heap, const FunctionInfo& function, Activation* parent_in)
    : Object(heap, function.slots * sizeof(Value)), parent(parent_in), slots(function.slots) {}

MacroValue::MacroValue(Heap* heap, const Stmt& statement_in, Activation* defining_in)
    : Object(heap, 0), statement(statement_in), defining(defining_in) {}

void Interpreter::Nesting::Fail() {
  --*depth_;
  ThrowLimit(fmt::format("evaluation nested deeper than {} (maximum recursion depth exceeded)",
                         kMaxEvaluationDepth));
}

Interpreter::Interpreter(const Program& program, Value context, std::tm now, Heap* heap)
    : program_(program), context_(std::move(context)), now_(now), heap_(*heap) {
  OCTAVO_CHECK(context_.IsDict());
}

namespace {

// Variables of a call that nothing can refer to afterwards live on the stack, the others as long as
// the heap.
class NewActivation {
 public:
  NewActivation(Heap* heap, const FunctionInfo& function, Activation* parent) {
    heap->Work(function.slots);
    auto activation = std::make_unique<Activation>(heap, function, parent);
    pointer_ = activation.get();
    if (function.captured) {
      heap->Own(std::move(activation));
    } else {
      local_ = std::move(activation);
    }
  }
  Activation* get() const { return pointer_; }

 private:
  std::unique_ptr<Activation> local_;
  Activation* pointer_;
};

}  // namespace

std::string Interpreter::Run() {
  const NewActivation activation(&heap_, program_.function, nullptr);
  std::string out;
  out_ = &out;
  Enter(program_.frame, activation.get());
  Exec(program_.body, activation.get());
  return out;
}

// -- Variables

Value& Interpreter::At(const Slot& slot, Activation* activation) {
  for (int i = 0; i < slot.up; ++i) activation = activation->parent;
  return activation->slots[slot.index];
}

Value Interpreter::Lookup(const std::string& name) {
  if (const Value* found = context_.As<Dict>().Find(name)) return *found;
  return FindGlobal(heap_, name);
}

void Interpreter::Enter(const Frame& frame, Activation* activation) {
  heap_.Work(frame.enter.size());
  for (const Frame::Load& load : frame.enter) {
    Value& variable = activation->slots[load.index];
    switch (load.kind) {
      case Frame::Load::Kind::kClear:
        variable = Value();
        break;
      case Frame::Load::Kind::kAlias:
        variable = At(load.source, activation);
        break;
      case Frame::Load::Kind::kResolve:
        variable = Lookup(load.name);
        break;
    }
  }
}

void Interpreter::Leave(const Frame& frame, Activation* activation) {
  for (int index : frame.leave) activation->slots[index] = Value();
}

void Interpreter::Assign(const Target& target, const Value& value, Activation* activation) {
  switch (target.kind) {
    case Target::Kind::kName:
      At(target.slot, activation) = value;
      return;
    case Target::Kind::kAttribute: {
      Namespace& space = At(target.slot, activation).As<Namespace>();
      heap_.Work(1 + space.attributes.size() / 8);
      space.Set(target.attribute, value);
      return;
    }
    case Target::Kind::kTuple:
      break;
  }
  if (!IsIterable(value)) {
    ThrowTypeError(fmt::format("cannot unpack non-iterable {} object", TypeName(value)));
  }
  const Values items = Collect(value);
  if (items.size() < target.parts.size()) {
    ThrowValueError(fmt::format("not enough values to unpack (expected {}, got {})",
                                target.parts.size(), items.size()));
  }
  if (items.size() > target.parts.size()) {
    ThrowValueError(fmt::format("too many values to unpack (expected {})", target.parts.size()));
  }
  for (size_t i = 0; i < items.size(); ++i) Assign(target.parts[i], items[i], activation);
}

// -- Statements

Interpreter::Flow Interpreter::Exec(const Block& block, Activation* activation) {
  for (const StmtPtr& statement : block) {
    const Flow flow = Exec(*statement, activation);
    if (flow != Flow::kNormal) return flow;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::Exec(const Stmt& statement, Activation* activation) {
  const Nesting nesting(this);
  heap_.Work(1);
  line_ = statement.line;
  switch (statement.kind) {
    case StmtKind::kOutput:
      ExecOutput(statement, activation);
      return Flow::kNormal;
    case StmtKind::kIf:
      return ExecIf(statement, activation);
    case StmtKind::kFor:
      return ExecFor(statement, activation);
    case StmtKind::kSet:
      ExecSet(statement, activation);
      return Flow::kNormal;
    case StmtKind::kSetBlock:
    case StmtKind::kFilterBlock:
      return ExecCapture(statement, activation);
    case StmtKind::kMacro:
      At(statement.resolved[0].slot, activation) =
          Value(Kind::kMacro, new MacroValue(&heap_, statement, activation));
      return Flow::kNormal;
    case StmtKind::kCallBlock:
      ExecCallBlock(statement, activation);
      return Flow::kNormal;
    case StmtKind::kWith:
      return ExecWith(statement, activation);
    case StmtKind::kBreak:
      return Flow::kBreak;
    case StmtKind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNormal;
}

void Interpreter::Write(const Value& value) {
  const size_t before = out_->size();
  if (value.IsString() && value.text().size() > heap_.limits().max_output_bytes - before) {
    ThrowLimit(fmt::format("the output needs more than {} bytes", heap_.limits().max_output_bytes));
  }
  AppendStr(value, out_);
  heap_.WorkOnBytes(out_->size() - before);
  heap_.Claim(out_->size() - before);
  if (out_->size() > heap_.limits().max_output_bytes) {
    ThrowLimit(fmt::format("the output needs more than {} bytes", heap_.limits().max_output_bytes));
  }
}

template <typename Action>
Interpreter::Flow Interpreter::Capture(Action action, std::string* text) {
  std::string* const outer = out_;
  out_ = text;
  try {
    const Flow flow = action();
    out_ = outer;
    heap_.Release(text->size());
    return flow;
  } catch (...) {
    out_ = outer;
    throw;
  }
}

void Interpreter::ExecOutput(const Stmt& statement, Activation* activation) {
  for (const ExprPtr& expr : statement.exprs) Write(Eval(*expr, activation));
}

Interpreter::Flow Interpreter::ExecIf(const Stmt& statement, Activation* activation) {
  for (size_t i = 0; i < statement.exprs.size(); ++i) {
    if (TruthOf(Eval(*statement.exprs[i], activation))) {
      return Exec(statement.bodies[i], activation);
    }
  }
  if (statement.bodies.size() == statement.exprs.size()) return Flow::kNormal;
  return Exec(statement.bodies.back(), activation);
}

Interpreter::Flow Interpreter::ExecFor(const Stmt& statement, Activation* activation) {
  const Value iterable = Eval(*statement.value, activation);
  if (!statement.recursive) return RunLoop(statement, iterable, activation, activation, 0);
  Write(RunRecursiveLoop(statement, iterable, activation, 0));
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::RunLoop(const Stmt& statement, const Value& iterable,
                                       Activation* activation, Activation* defining,
                                       int64_t depth) {
  const LoopScope& scope = *statement.loop;
  Value source = iterable;
  Value iterator = Iterate(iterable);
  if (statement.test != nullptr) {
    source = iterator = MakeFilteredIterator(heap_, std::move(iterator), statement, defining);
  }
  const bool extended = scope.loop_slot >= 0;
  Value loop;
  if (extended) {
    loop = Value(Kind::kLoop, new Loop(&heap_, std::move(source), iterator));
    if (statement.recursive) {
      loop.As<Loop>().statement = &statement;
      loop.As<Loop>().defining = defining;
      loop.As<Loop>().depth0 = depth;
    }
  }
  const auto next = [&](Value* item) {
    return extended ? loop.As<Loop>().Next(*this, item) : iterator.As<Iterator>().Next(*this, item);
  };
  bool any = false;
  for (Value item; next(&item);) {
    heap_.Work(1);
    Assign(scope.target, item, activation);
    if (extended) activation->slots[scope.loop_slot] = loop;
    Enter(scope.body, activation);
    const Flow flow = Exec(statement.body, activation);
    if (flow == Flow::kBreak) break;
    // As in Jinja2, what a body left early has not run: the else is for loops without a whole one.
    any = any || flow == Flow::kNormal;
  }
  Leave(scope.body, activation);
  if (any || statement.otherwise.empty()) return Flow::kNormal;
  Enter(scope.otherwise, activation);
  const Flow flow = Exec(statement.otherwise, activation);
  Leave(scope.otherwise, activation);
  return flow;
}

Value Interpreter::RunRecursiveLoop(const Stmt& statement, const Value& iterable,
                                    Activation* defining, int64_t depth) {
  const NewActivation activation(&heap_, statement.loop->recursive_function, defining);
  std::string text;
  Capture([&] { return RunLoop(statement, iterable, activation.get(), defining, depth); }, &text);
  return MakeString(heap_, std::move(text));
}

void Interpreter::EnterTest(const Stmt& loop, Activation* activation) {
  Enter(loop.loop->test, activation);
}

namespace {

Value Gather(Heap& heap, const Target& target, const Values& slots) {
  if (target.kind == Target::Kind::kName) return slots[target.slot.index];
  Values parts;
  for (const Target& part : target.parts) parts.push_back(Gather(heap, part, slots));
  return MakeTuple(heap, std::move(parts));
}

}  // namespace

bool Interpreter::Admits(const Stmt& loop, Activation* activation, Value* item) {
  const Nesting nesting(this);
  heap_.Work(1);
  Assign(loop.loop->test_target, *item, activation);
  *item = Gather(heap_, loop.loop->test_target, activation->slots);
  return TruthOf(Eval(*loop.test, activation));
}

void Interpreter::ExecSet(const Stmt& statement, Activation* activation) {
  for (const Slot& slot : statement.namespaces) {
    if (!At(slot, activation).Is(Kind::kNamespace)) {
      throw Fault("TemplateRuntimeError", "cannot assign attribute on non-namespace object");
    }
  }
  Assign(statement.resolved[0], Eval(*statement.value, activation), activation);
}

// {% set x %} and {% filter %}: both do something with the text of their body.
Interpreter::Flow Interpreter::ExecCapture(const Stmt& statement, Activation* activation) {
  Enter(statement.frame, activation);
  std::string text;
  const Flow flow = Capture([&] { return Exec(statement.body, activation); }, &text);
  if (flow != Flow::kNormal) return flow;
  Value value = MakeString(heap_, std::move(text));
  if (statement.value != nullptr) value = EvalFilter(*statement.value, activation, &value);
  if (statement.kind == StmtKind::kFilterBlock) {
    Write(value);
  } else {
    const Target& target = statement.resolved[0];
    if (target.kind == Target::Kind::kAttribute &&
        !At(target.slot, activation).Is(Kind::kNamespace)) {
      ThrowTypeError("cannot assign attribute on non-namespace object");
    }
    Assign(target, value, activation);
  }
  Leave(statement.frame, activation);
  return Flow::kNormal;
}

void Interpreter::ExecCallBlock(const Stmt& statement, Activation* activation) {
  const Value caller(Kind::kMacro, new MacroValue(&heap_, statement, activation));
  if (statement.value != nullptr) {
    Write(EvalCall(*statement.value, activation, &caller));
  } else {
    Arguments none;
    Write(Call(caller, none));
  }
}

Interpreter::Flow Interpreter::ExecWith(const Stmt& statement, Activation* activation) {
  Enter(statement.frame, activation);
  for (size_t i = 0; i < statement.exprs.size(); ++i) {
    Assign(statement.resolved[i], Eval(*statement.exprs[i], activation), activation);
  }
  const Flow flow = Exec(statement.body, activation);
  Leave(statement.frame, activation);
  return flow;
}

// -- Calls

namespace {

std::string MacroName(const Stmt& statement) {
  if (statement.kind != StmtKind::kMacro) return "None";
  return "'" + statement.name + "'";
}

// Removes and returns the argument of that name; missing if there is none.
Value TakeNamed(Arguments* arguments, std::string_view name) {
  const auto found =
      std::ranges::find(arguments->named, name, &std::pair<std::string, Value>::first);
  if (found == arguments->named.end()) return Value();
  Value value = std::move(found->second);
  arguments->named.erase(found);
  return value;
}

}  // namespace

Value Interpreter::CallMacro(const MacroValue& macro, Arguments& arguments) {
  const Stmt& statement = macro.statement;
  const MacroScope& scope = *statement.macro;
  const NewActivation activation(&heap_, scope.function, macro.defining);
  Values& slots = activation.get()->slots;

  const size_t count = scope.parameters.size();
  const size_t given = std::min(arguments.positional.size(), count);
  bool found_caller = given == count && scope.explicit_caller;
  for (size_t i = 0; i < count; ++i) {
    Value& slot = slots[scope.parameters[i]];
    if (i < given) {
      slot = arguments.positional[i];
    } else {
      heap_.Work(arguments.named.size());
      slot = TakeNamed(&arguments, statement.parameters[i]);
      if (statement.parameters[i] == "caller") found_caller = true;
    }
  }
  if (scope.caller >= 0 && !found_caller) {
    Value caller = TakeNamed(&arguments, "caller");
    if (caller.IsMissing() || caller.IsNone()) {
      caller = Value(Kind::kUndefined, new Undefined(&heap_, "No caller defined", nullptr,
                                                     CopyString(heap_, "caller")));
    }
    slots[scope.caller] = std::move(caller);
  }
  if (scope.kwargs >= 0) {
    std::vector<Dict::Entry> entries;
    for (auto& [name, value] : arguments.named) {
      entries.emplace_back(CopyString(heap_, name), std::move(value));
    }
    slots[scope.kwargs] = MakeDict(heap_, std::move(entries));
  } else if (!arguments.named.empty()) {
    for (const auto& [name, value] : arguments.named) {
      if (name == "caller") {
        ThrowTypeError(fmt::format(
            "macro {} was invoked with two values for the special caller argument. This is most "
            "likely a bug.",
            MacroName(statement)));
      }
    }
    ThrowTypeError(fmt::format("macro {} takes no keyword argument '{}'", MacroName(statement),
                               arguments.named[0].first));
  }
  if (scope.varargs >= 0) {
    slots[scope.varargs] =
        MakeTuple(heap_, Values(arguments.positional.begin() + static_cast<ptrdiff_t>(given),
                                arguments.positional.end()));
  } else if (arguments.positional.size() > count) {
    ThrowTypeError(
        fmt::format("macro {} takes not more than {} argument(s)", MacroName(statement), count));
  }

  Enter(scope.frame, activation.get());
  const size_t without_default = count - statement.exprs.size();
  for (size_t i = 0; i < count; ++i) {
    Value& slot = slots[scope.parameters[i]];
    if (!slot.IsMissing()) continue;
    if (i >= without_default) {
      slot = Eval(*statement.exprs[i - without_default], activation.get());
    } else {
      const std::string& name = statement.parameters[i];
      slot = Value(Kind::kUndefined,
                   new Undefined(&heap_, fmt::format("parameter '{}' was not provided", name),
                                 nullptr, CopyString(heap_, name)));
    }
  }
  std::string text;
  Capture([&] { return Exec(statement.body, activation.get()); }, &text);
  return MakeString(heap_, std::move(text));
}

Value Interpreter::Call(const Value& callee, Arguments& arguments) {
  const Nesting nesting(this);
  heap_.Work(1);
  switch (callee.kind()) {
    case Kind::kFunction: {
      const Function& function = callee.As<Function>();
      return function.native(*this, function.self, arguments);
    }
    case Kind::kMacro:
      return CallMacro(callee.As<MacroValue>(), arguments);
    case Kind::kJoiner: {
      Joiner& joiner = callee.As<Joiner>();
      if (std::exchange(joiner.used, true)) return joiner.separator;
      return CopyString(heap_, "");
    }
    case Kind::kLoop: {
      const Loop& loop = callee.As<Loop>();
      if (loop.statement == nullptr) {
        ThrowTypeError("The loop must have the 'recursive' marker to be called recursively.");
      }
      const Bound bound("LoopContext.__call__()", arguments, {"iterable"}, 1);
      return RunRecursiveLoop(*loop.statement, bound[0], loop.defining, loop.depth0 + 1);
    }
    case Kind::kUndefined:
      ThrowUndefined(callee);
    default:
      ThrowTypeError(fmt::format("'{}' object is not callable", TypeName(callee)));
  }
}

Value Interpreter::CallFilter(std::string_view name, const Value& value,
                              const Arguments& arguments) {
  const Nesting nesting(this);
  heap_.Work(1);
  const Native filter = FindFilter(name);
  if (filter == nullptr) {
    throw Fault("TemplateRuntimeError", fmt::format("No filter named '{}'.", name));
  }
  heap_.Work(arguments.positional.size() + arguments.named.size());
  Arguments copy = arguments;
  return filter(*this, value, copy);
}

bool Interpreter::CallTest(std::string_view name, const Value& value, const Arguments& arguments) {
  const Nesting nesting(this);
  heap_.Work(1);
  const Native test = FindTest(name);
  if (test == nullptr) {
    throw Fault("TemplateRuntimeError", fmt::format("No test named '{}'.", name));
  }
  heap_.Work(arguments.positional.size() + arguments.named.size());
  Arguments copy = arguments;
  return TruthOf(test(*this, value, copy));
}

// -- Values

bool Interpreter::TruthOf(const Value& value) {
  if (value.Is(Kind::kLoop)) return LengthOf(value) != 0;
  return Truth(value);
}

int64_t Interpreter::LengthOf(const Value& value) {
  if (value.Is(Kind::kLoop)) return value.As<Loop>().Length(*this);
  return Length(value);
}

Value Interpreter::ToString(const Value& value) {
  if (value.IsString() && !value.As<String>().markup) return value;
  return MakeString(heap_, Str(value));
}

bool Interpreter::Contains(const Value& container, const Value& item) {
  heap_.Work(1);
  switch (container.kind()) {
    case Kind::kString:
      if (!item.IsString()) {
        ThrowTypeError(
            fmt::format("'in <string>' requires string as left operand, not {}", TypeName(item)));
      }
      heap_.WorkOnBytes(container.text().size());
      return jinja::Find(container.text(), item.text()) != std::string::npos;
    case Kind::kDict:
      heap_.Work(item.weight());
      return container.As<Dict>().Find(item) != nullptr;
    case Kind::kView:
      if (container.As<View>().part == View::Part::kKeys) {
        return Contains(container.As<View>().dict, item);
      }
      break;
    case Kind::kList:
    case Kind::kTuple:
      heap_.Work(std::min(container.weight(), item.weight() * container.items().size()));
      return std::ranges::any_of(container.items(),
                                 [&](const Value& other) { return Equal(other, item); });
    case Kind::kUndefined:
      return false;
    default:
      break;
  }
  if (!IsIterable(container)) {
    ThrowTypeError(fmt::format("argument of type '{}' is not iterable", TypeName(container)));
  }
  const Value iterator = Iterate(container);
  for (Value other; iterator.As<Iterator>().Next(*this, &other);) {
    heap_.Work(std::min(other.weight(), item.weight()));
    if (Equal(other, item)) return true;
  }
  return false;
}

Values Interpreter::Collect(const Value& value) {
  if (value.IsSequence()) {
    heap_.Work(value.items().size());
    return value.items();
  }
  Values items;
  const Value iterator = Iterate(value);
  for (Value item; iterator.As<Iterator>().Next(*this, &item);) {
    heap_.Work(1);
    if (items.size() == items.capacity()) heap_.Reserve(2 * items.size() * sizeof(Value));
    items.push_back(std::move(item));
  }
  return items;
}

}  // namespace octavo::jinja
