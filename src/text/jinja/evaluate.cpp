// Interpreter's expressions.
#include <fmt/format.h>

#include <algorithm>

#include "text/jinja/attributes.h"
#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/operators.h"

namespace octavo::jinja {

Value Interpreter::Eval(const Expr& expr, Activation* activation) {
  heap_.Work(1);
  switch (expr.kind) {
    case ExprKind::kConstant:
      return expr.value;
    case ExprKind::kName: {
      const Value& value = At(expr.slot, activation);
      return value.IsMissing() ? expr.value : value;
    }
    default:
      break;
  }
  const Nesting nesting(this);
  line_ = expr.line;
  switch (expr.kind) {
    case ExprKind::kTuple:
    case ExprKind::kList:
      return EvalItems(expr, activation);
    case ExprKind::kDict:
      return EvalDict(expr, activation);
    case ExprKind::kConcat:
      return EvalConcat(expr, activation);
    case ExprKind::kBinary:
      return EvalBinary(expr, activation);
    case ExprKind::kNegate:
      return Negate(Eval(*expr.operands[0], activation));
    case ExprKind::kPlus:
      return Plus(Eval(*expr.operands[0], activation));
    case ExprKind::kNot:
      return Value::Bool(!TruthOf(Eval(*expr.operands[0], activation)));
    case ExprKind::kAnd: {
      Value left = Eval(*expr.operands[0], activation);
      return TruthOf(left) ? Eval(*expr.operands[1], activation) : left;
    }
    case ExprKind::kOr: {
      Value left = Eval(*expr.operands[0], activation);
      return TruthOf(left) ? left : Eval(*expr.operands[1], activation);
    }
    case ExprKind::kCompare:
      return EvalCompare(expr, activation);
    case ExprKind::kConditional:
      if (TruthOf(Eval(*expr.operands[0], activation))) return Eval(*expr.operands[1], activation);
      return expr.operands[2] == nullptr ? expr.value : Eval(*expr.operands[2], activation);
    case ExprKind::kAttribute: {
      const Value object = Eval(*expr.operands[0], activation);
      line_ = expr.line;
      return GetAttribute(*this, object, expr.value);
    }
    case ExprKind::kItem:
    case ExprKind::kSlice:
      return EvalSubscript(expr, activation);
    case ExprKind::kCall:
      return EvalCall(expr, activation, nullptr);
    case ExprKind::kFilter:
    case ExprKind::kTest:
      return EvalFilter(expr, activation, nullptr);
    default:
      return Value::None();  // names and constants are above
  }
}

Value Interpreter::EvalItems(const Expr& expr, Activation* activation) {
  Values items;
  items.reserve(expr.operands.size());
  for (const ExprPtr& operand : expr.operands) items.push_back(Eval(*operand, activation));
  return expr.kind == ExprKind::kTuple ? MakeTuple(heap_, std::move(items))
                                       : MakeList(heap_, std::move(items));
}

Value Interpreter::EvalDict(const Expr& expr, Activation* activation) {
  std::vector<Dict::Entry> entries;
  for (size_t i = 0; i < expr.operands.size(); i += 2) {
    Value key = Eval(*expr.operands[i], activation);
    heap_.Work(key.weight());
    entries.emplace_back(std::move(key), Eval(*expr.operands[i + 1], activation));
  }
  return MakeDict(heap_, std::move(entries));
}

Value Interpreter::EvalConcat(const Expr& expr, Activation* activation) {
  std::string text;
  Values parts;
  for (const ExprPtr& operand : expr.operands) parts.push_back(Eval(*operand, activation));
  for (const Value& part : parts) {
    if (part.IsString()) heap_.Reserve(text.size() + part.text().size());
    AppendStr(part, &text);
  }
  return MakeString(heap_, std::move(text));
}

Value Interpreter::EvalBinary(const Expr& expr, Activation* activation) {
  const Value left = Eval(*expr.operands[0], activation);
  const Value right = Eval(*expr.operands[1], activation);
  line_ = expr.line;
  return Binary(heap_, expr.op, left, right);
}

bool Interpreter::HoldsComparison(const Comparison& comparison, const Value& left,
                                  const Value& right) {
  switch (comparison.kind) {
    case ComparisonKind::kIn:
      return Contains(right, left);
    case ComparisonKind::kNotIn:
      return !Contains(right, left);
    case ComparisonKind::kOrder:
      break;
  }
  heap_.Work(std::min(left.weight(), right.weight()));
  return Compare(comparison.op, left, right);
}

Value Interpreter::EvalCompare(const Expr& expr, Activation* activation) {
  Value left = Eval(*expr.operands[0], activation);
  for (size_t i = 0; i < expr.comparisons.size(); ++i) {
    Value right = Eval(*expr.operands[i + 1], activation);
    line_ = expr.line;
    if (!HoldsComparison(expr.comparisons[i], left, right)) return Value::Bool(false);
    left = std::move(right);
  }
  return Value::Bool(true);
}

Value Interpreter::EvalSubscript(const Expr& expr, Activation* activation) {
  const Value object = Eval(*expr.operands[0], activation);
  if (expr.kind == ExprKind::kItem) {
    const Value key = Eval(*expr.operands[1], activation);
    line_ = expr.line;
    return GetItem(*this, object, key);
  }
  Value bounds[3];
  for (size_t i = 0; i < 3; ++i) {
    if (expr.operands[i + 1] != nullptr) bounds[i] = Eval(*expr.operands[i + 1], activation);
  }
  line_ = expr.line;
  return Slice(heap_, object, bounds[0], bounds[1], bounds[2]);
}

void Interpreter::EvalArguments(const CallArguments& from, Activation* activation,
                                Arguments* arguments) {
  for (const ExprPtr& expr : from.positional) {
    arguments->positional.push_back(Eval(*expr, activation));
  }
  for (const auto& [name, expr] : from.named) {
    arguments->named.emplace_back(name, Eval(*expr, activation));
  }
  if (from.spread != nullptr) {
    const Value items = Eval(*from.spread, activation);
    if (!IsIterable(items)) {
      ThrowTypeError(fmt::format("Value after * must be an iterable, not {}", TypeName(items)));
    }
    for (Value& item : Collect(items)) arguments->positional.push_back(std::move(item));
  }
  if (from.spread_named == nullptr) return;
  const Value dict = Eval(*from.spread_named, activation);
  if (dict.IsUndefined()) ThrowUndefined(dict);
  if (!dict.IsDict()) {
    ThrowTypeError(fmt::format("argument after ** must be a mapping, not {}", TypeName(dict)));
  }
  for (const auto& [key, value] : dict.As<Dict>().entries()) {
    if (!key.IsString()) ThrowTypeError("keywords must be strings");
    heap_.Work(1 + arguments->named.size() / 8);
    for (const auto& [name, earlier] : arguments->named) {
      if (name == key.text()) {
        ThrowTypeError(fmt::format("got multiple values for keyword argument '{}'", name));
      }
    }
    arguments->named.emplace_back(key.text(), value);
  }
}

Value Interpreter::EvalCall(const Expr& expr, Activation* activation, const Value* caller) {
  const Expr& callee = *expr.operands[0];
  Value function, self;
  Native method = nullptr;
  if (callee.kind == ExprKind::kAttribute) {
    self = Eval(*callee.operands[0], activation);
    line_ = callee.line;
    method = FindMethod(self, callee.value.text());
    if (method == nullptr) function = GetAttribute(*this, self, callee.value);
  } else {
    function = Eval(callee, activation);
  }
  Arguments arguments;
  EvalArguments(*expr.arguments, activation, &arguments);
  if (caller != nullptr) arguments.named.emplace_back("caller", *caller);
  line_ = expr.line;
  return method != nullptr ? method(*this, self, arguments) : Call(function, arguments);
}

// A filter or a test. input: what the innermost filter of a block is applied to.
Value Interpreter::EvalFilter(const Expr& expr, Activation* activation, const Value* input) {
  const Nesting nesting(this);
  const ExprPtr& operand = expr.operands[0];
  Value value;
  if (operand == nullptr) {
    value = *input;
  } else if (input != nullptr && operand->kind == ExprKind::kFilter) {
    value = EvalFilter(*operand, activation, input);
  } else {
    value = Eval(*operand, activation);
  }
  if (expr.builtin == nullptr) {
    throw Fault("TemplateRuntimeError",
                fmt::format("No {} named '{}' found.",
                            expr.kind == ExprKind::kFilter ? "filter" : "test", expr.name));
  }
  Arguments arguments;
  EvalArguments(*expr.arguments, activation, &arguments);
  line_ = expr.line;
  return expr.builtin(*this, value, arguments);
}

}  // namespace octavo::jinja
