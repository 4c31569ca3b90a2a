#include "text/jinja/scope.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <string_view>

#include "base/error.h"
#include "text/jinja/builtins.h"
#include "text/jinja/lexer.h"

namespace octavo::jinja {
namespace {

// -- Walking over names

enum class Use { kLoad, kStore, kParameter };

template <typename Visit>
void VisitExpr(const ExprPtr& expr, const Visit& visit) {
  if (expr == nullptr) return;
  if (expr->kind == ExprKind::kName || expr->kind == ExprKind::kNamespaceRef) {
    visit(expr->name, Use::kLoad);
  }
  for (const ExprPtr& operand : expr->operands) VisitExpr(operand, visit);
  if (expr->arguments == nullptr) return;
  for (const ExprPtr& argument : expr->arguments->positional) VisitExpr(argument, visit);
  for (const auto& [name, argument] : expr->arguments->named) VisitExpr(argument, visit);
  VisitExpr(expr->arguments->spread, visit);
  VisitExpr(expr->arguments->spread_named, visit);
}

template <typename Visit>
void VisitTarget(const ExprPtr& target, Use use, const Visit& visit) {
  if (target == nullptr) return;
  if (target->kind == ExprKind::kName) visit(target->name, use);
  if (target->kind == ExprKind::kNamespaceRef) visit(target->name, Use::kLoad);
  for (const ExprPtr& part : target->operands) VisitTarget(part, use, visit);
}

// Every name below, in the order in which Jinja2's visitors meet them.
template <typename Visit>
void VisitBlock(const Block& block, const Visit& visit) {
  for (const StmtPtr& statement : block) {
    const bool is_macro =
        statement->kind == StmtKind::kMacro || statement->kind == StmtKind::kCallBlock;
    const Use use = statement->kind == StmtKind::kWith ? Use::kParameter : Use::kStore;
    if (statement->kind == StmtKind::kSet) VisitTarget(statement->target, use, visit);
    if (statement->kind == StmtKind::kSetBlock) VisitTarget(statement->target, use, visit);
    if (statement->kind == StmtKind::kFor) VisitTarget(statement->target, use, visit);
    for (const ExprPtr& target : statement->targets) VisitTarget(target, use, visit);
    VisitExpr(statement->value, visit);
    if (is_macro) {
      for (const std::string& parameter : statement->parameters) visit(parameter, Use::kParameter);
    }
    for (const ExprPtr& expr : statement->exprs) VisitExpr(expr, visit);
    for (const Block& body : statement->bodies) VisitBlock(body, visit);
    VisitBlock(statement->body, visit);
    VisitBlock(statement->otherwise, visit);
    VisitExpr(statement->test, visit);
  }
}

// Which of `names` are read before anything of that name is assigned.
std::set<std::string_view> Undeclared(const Block& block, std::set<std::string_view> names) {
  std::set<std::string_view> found;
  VisitBlock(block, [&](std::string_view name, Use use) {
    if (use == Use::kLoad && names.contains(name)) {
      found.insert(name);
    } else if (use != Use::kLoad) {
      names.erase(name);
    }
  });
  return found;
}

bool Assigns(const Stmt& loop, std::string_view wanted) {
  bool assigned = false;
  const auto visit = [&](std::string_view name, Use use) {
    assigned = assigned || (use == Use::kStore && name == wanted);
  };
  VisitTarget(loop.target, Use::kStore, visit);
  VisitBlock(loop.body, visit);
  VisitBlock(loop.otherwise, visit);
  return assigned;
}

// -- Variables

// A function of the compiled template. Blocks of one depth share the variable of a name.
struct CompiledFunction {
  const CompiledFunction* parent = nullptr;
  FunctionInfo* info = nullptr;
  std::map<std::pair<int, std::string>, int> slots = {};
};

struct Variable {
  CompiledFunction* function = nullptr;
  int index = -1;
  auto operator<=>(const Variable&) const = default;
};

// The names that a block knows.
class Symbols {
 public:
  Symbols(const Symbols* parent, CompiledFunction* function)
      : parent_(parent), function_(function), level_(parent == nullptr ? 0 : parent->level_ + 1) {}

  struct Load {
    enum class Kind { kParameter, kResolve, kAlias, kUndefined };
    Kind kind = Kind::kUndefined;
    std::string name = {};  // kResolve
    Variable outer = {};    // kAlias
  };

  // What a branch of a condition adds to these, which must outlive it.
  Symbols Branch() const {
    Symbols branch(parent_, function_);
    branch.base_ = this;
    branch.level_ = level_;
    return branch;
  }

  const Variable* Find(const std::string& name) const {
    const Variable* here = FindHere(name);
    return here != nullptr ? here : FindOutside(name);
  }

  void DeclareLoad(const std::string& name) {
    if (Find(name) == nullptr) Define(name, {.kind = Load::Kind::kResolve, .name = name});
  }

  void DeclareStore(const std::string& name) {
    stores_.insert(name);
    if (FindHere(name) != nullptr) return;
    const Variable* outer = FindOutside(name);
    if (outer != nullptr) {
      Define(name, {.kind = Load::Kind::kAlias, .outer = *outer});
    } else {
      Define(name, {.kind = Load::Kind::kUndefined});
    }
  }

  int DeclareParameter(const std::string& name) {
    stores_.insert(name);
    return Define(name, {.kind = Load::Kind::kParameter});
  }

  void Declare(const std::string& name, Use use) {
    switch (use) {
      case Use::kLoad:
        DeclareLoad(name);
        break;
      case Use::kStore:
        DeclareStore(name);
        break;
      case Use::kParameter:
        DeclareParameter(name);
        break;
    }
  }

  // After a condition: what only some branch may have assigned has its outer value before.
  void Merge(std::initializer_list<const Symbols*> branches) {
    std::set<std::string> assigned;
    for (const Symbols* branch : branches) {
      for (const std::string& name : branch->stores_) {
        if (!IsStored(name)) assigned.insert(name);
      }
    }
    for (const Symbols* branch : branches) {
      for (const auto& [name, variable] : branch->known_) known_[name] = variable;
      for (const auto& [variable, load] : branch->loads_) loads_[variable] = load;
      stores_.insert(branch->stores_.begin(), branch->stores_.end());
    }
    for (const std::string& name : assigned) {
      const Variable variable = *Find(name);
      const Variable* outer = FindOutside(name);
      if (outer != nullptr) {
        loads_[variable] = {.kind = Load::Kind::kAlias, .outer = *outer};
      } else {
        loads_[variable] = {.kind = Load::Kind::kResolve, .name = name};
      }
    }
  }

  // The slot of `name`, seen from `from`.
  static Slot SlotOf(const Variable& variable, const CompiledFunction* from) {
    Slot slot = {.up = 0, .index = variable.index};
    for (; from != variable.function; from = from->parent) ++slot.up;
    return slot;
  }

  Frame MakeFrame() const {
    Frame frame;
    for (const auto& [variable, load] : loads_) {
      switch (load.kind) {
        case Load::Kind::kParameter:
          break;
        case Load::Kind::kResolve:
          frame.enter.push_back(
              {.kind = Frame::Load::Kind::kResolve, .index = variable.index, .name = load.name});
          break;
        case Load::Kind::kAlias:
          frame.enter.push_back({.kind = Frame::Load::Kind::kAlias,
                                 .index = variable.index,
                                 .source = SlotOf(load.outer, function_)});
          break;
        case Load::Kind::kUndefined:
          frame.enter.push_back({.kind = Frame::Load::Kind::kClear, .index = variable.index});
          break;
      }
      frame.leave.push_back(variable.index);
    }
    return frame;
  }

  CompiledFunction* function() const { return function_; }

 private:
  const Variable* FindHere(const std::string& name) const {
    const auto found = known_.find(name);
    if (found != known_.end()) return &found->second;
    return base_ == nullptr ? nullptr : base_->FindHere(name);
  }

  const Variable* FindOutside(const std::string& name) const {
    return parent_ == nullptr ? nullptr : parent_->Find(name);
  }

  bool IsStored(const std::string& name) const {
    return stores_.contains(name) || (base_ != nullptr && base_->IsStored(name));
  }

  int Define(const std::string& name, Load load) {
    const auto [slot, is_new] =
        function_->slots.try_emplace({level_, name}, function_->info->slots);
    if (is_new) ++function_->info->slots;
    const Variable variable = {function_, slot->second};
    known_[name] = variable;
    loads_[variable] = std::move(load);
    return variable.index;
  }

  const Symbols* parent_;
  const Symbols* base_ = nullptr;  // of a branch: the block it stands in
  CompiledFunction* function_;
  int level_;
  std::map<std::string, Variable> known_;
  std::map<Variable, Load> loads_;
  std::set<std::string> stores_;
};

// -- What a block does to names, without the blocks within that have their own

void AnalyzeBlock(const Block& block, Symbols* symbols);

void AnalyzeExpr(const ExprPtr& expr, Symbols* symbols) {
  VisitExpr(expr, [&](const std::string& name, Use use) { symbols->Declare(name, use); });
}

void AnalyzeTarget(const ExprPtr& target, Use use, Symbols* symbols) {
  VisitTarget(target, use, [&](const std::string& name, Use as) { symbols->Declare(name, as); });
}

// Conditions from `index` on; "elif" is a condition of its own within a branch.
void AnalyzeIf(const Stmt& statement, Symbols* symbols) {
  AnalyzeExpr(statement.exprs[0], symbols);
  Symbols body = symbols->Branch(), elifs = symbols->Branch(), otherwise = symbols->Branch();
  AnalyzeBlock(statement.bodies[0], &body);
  for (size_t i = 1; i < statement.exprs.size(); ++i) {
    AnalyzeExpr(statement.exprs[i], &elifs);
    Symbols branch = elifs.Branch();
    AnalyzeBlock(statement.bodies[i], &branch);
    elifs.Merge({&branch});
  }
  if (statement.bodies.size() > statement.exprs.size()) {
    AnalyzeBlock(statement.bodies.back(), &otherwise);
  }
  symbols->Merge({&body, &elifs, &otherwise});
}

void AnalyzeBlock(const Block& block, Symbols* symbols) {
  for (const StmtPtr& statement : block) {
    switch (statement->kind) {
      case StmtKind::kOutput:
      case StmtKind::kWith:
        for (const ExprPtr& expr : statement->exprs) AnalyzeExpr(expr, symbols);
        break;
      case StmtKind::kIf:
        AnalyzeIf(*statement, symbols);
        break;
      case StmtKind::kFor:
      case StmtKind::kCallBlock:
      case StmtKind::kFilterBlock:
        AnalyzeExpr(statement->value, symbols);
        break;
      case StmtKind::kSet:
        AnalyzeExpr(statement->value, symbols);
        AnalyzeTarget(statement->target, Use::kStore, symbols);
        break;
      case StmtKind::kSetBlock:
        AnalyzeTarget(statement->target, Use::kStore, symbols);
        break;
      case StmtKind::kMacro:
        symbols->DeclareStore(statement->name);
        break;
      case StmtKind::kBreak:
      case StmtKind::kContinue:
        break;
    }
  }
}

// -- Resolution

class Resolver {
 public:
  // `soft`: within a condition, where an unknown filter is an error only if it is reached.
  void ResolveBlock(const Block& block, Symbols* symbols, bool soft) {
    for (const StmtPtr& statement : block) ResolveStatement(statement.get(), symbols, soft);
  }

 private:
  static Slot SlotOf(const std::string& name, const Symbols& symbols) {
    const Variable* variable = symbols.Find(name);
    OCTAVO_CHECK(variable != nullptr, name);
    return Symbols::SlotOf(*variable, symbols.function());
  }

  void ResolveExpr(const ExprPtr& expr, const Symbols& symbols, bool soft) {
    if (expr == nullptr) return;
    switch (expr->kind) {
      case ExprKind::kName:
        expr->slot = SlotOf(expr->name, symbols);
        break;
      case ExprKind::kConditional:
        soft = true;
        break;
      case ExprKind::kFilter:
      case ExprKind::kTest: {
        const bool is_filter = expr->kind == ExprKind::kFilter;
        expr->builtin = is_filter ? FindFilter(expr->name) : FindTest(expr->name);
        if (expr->builtin == nullptr && !soft) {
          throw SyntaxFault(
              fmt::format("No {} named '{}'.", is_filter ? "filter" : "test", expr->name),
              expr->line, Fault::Kind::kError, "TemplateAssertionError");
        }
        break;
      }
      default:
        break;
    }
    for (const ExprPtr& operand : expr->operands) ResolveExpr(operand, symbols, soft);
    if (expr->arguments == nullptr) return;
    for (const ExprPtr& value : expr->arguments->positional) ResolveExpr(value, symbols, soft);
    for (const auto& [name, value] : expr->arguments->named) ResolveExpr(value, symbols, soft);
    ResolveExpr(expr->arguments->spread, symbols, soft);
    ResolveExpr(expr->arguments->spread_named, symbols, soft);
  }

  Target ResolveTarget(const Expr& expr, const Symbols& symbols) {
    Target target;
    switch (expr.kind) {
      case ExprKind::kNamespaceRef:
        target.kind = Target::Kind::kAttribute;
        target.slot = SlotOf(expr.name, symbols);
        target.attribute = expr.value.text();
        break;
      case ExprKind::kTuple:
        target.kind = Target::Kind::kTuple;
        for (const ExprPtr& part : expr.operands) {
          target.parts.push_back(ResolveTarget(*part, symbols));
        }
        break;
      default:
        target.slot = SlotOf(expr.name, symbols);
    }
    return target;
  }

  static void CollectNamespaces(const Target& target, std::vector<Slot>* slots) {
    if (target.kind == Target::Kind::kAttribute) slots->push_back(target.slot);
    for (const Target& part : target.parts) CollectNamespaces(part, slots);
  }

  void ResolveStatement(Stmt* statement, Symbols* symbols, bool soft) {
    switch (statement->kind) {
      case StmtKind::kOutput:
        for (const ExprPtr& expr : statement->exprs) ResolveExpr(expr, *symbols, soft);
        break;
      case StmtKind::kIf:
        for (const ExprPtr& test : statement->exprs) ResolveExpr(test, *symbols, true);
        for (const Block& body : statement->bodies) ResolveBlock(body, symbols, true);
        break;
      case StmtKind::kFor:
        ResolveFor(statement, symbols, soft);
        break;
      case StmtKind::kSet:
        ResolveExpr(statement->value, *symbols, soft);
        statement->resolved.push_back(ResolveTarget(*statement->target, *symbols));
        CollectNamespaces(statement->resolved[0], &statement->namespaces);
        break;
      case StmtKind::kSetBlock: {
        Symbols inner(symbols, symbols->function());
        AnalyzeBlock(statement->body, &inner);
        AnalyzeExpr(statement->value, &inner);
        ResolveBlock(statement->body, &inner, false);
        ResolveExpr(statement->value, inner, false);
        statement->frame = inner.MakeFrame();
        statement->resolved.push_back(ResolveTarget(*statement->target, *symbols));
        break;
      }
      case StmtKind::kFilterBlock: {
        Symbols inner(symbols, symbols->function());
        AnalyzeBlock(statement->body, &inner);
        AnalyzeExpr(statement->value, &inner);
        ResolveBlock(statement->body, &inner, false);
        ResolveExpr(statement->value, inner, false);
        statement->frame = inner.MakeFrame();
        break;
      }
      case StmtKind::kWith: {
        Symbols inner(symbols, symbols->function());
        for (const ExprPtr& target : statement->targets) {
          AnalyzeTarget(target, Use::kParameter, &inner);
        }
        AnalyzeBlock(statement->body, &inner);
        for (const ExprPtr& value : statement->exprs) ResolveExpr(value, *symbols, soft);
        for (const ExprPtr& target : statement->targets) {
          statement->resolved.push_back(ResolveTarget(*target, inner));
        }
        ResolveBlock(statement->body, &inner, false);
        statement->frame = inner.MakeFrame();
        break;
      }
      case StmtKind::kMacro:
        ResolveMacro(statement, symbols);
        statement->resolved.push_back({.slot = SlotOf(statement->name, *symbols)});
        break;
      case StmtKind::kCallBlock:
        ResolveMacro(statement, symbols);
        ResolveExpr(statement->value, *symbols, soft);
        break;
      case StmtKind::kBreak:
      case StmtKind::kContinue:
        break;
    }
  }

  void ResolveFor(Stmt* statement, Symbols* symbols, bool soft) {
    statement->loop = std::make_unique<LoopScope>();
    LoopScope& loop = *statement->loop;
    CompiledFunction* outer = symbols->function();
    CompiledFunction recursive = {.parent = outer, .info = &loop.recursive_function};
    CompiledFunction* function = statement->recursive ? &recursive : outer;
    if (statement->recursive) outer->info->captured = function->info->captured = true;

    Symbols body(symbols, function), otherwise(symbols, function);
    if (statement->recursive || Undeclared(statement->body, {"loop"}).contains("loop")) {
      loop.loop_slot = body.DeclareParameter("loop");
    }
    if (Assigns(*statement, "loop")) {
      throw SyntaxFault("Can't assign to special loop variable in for-loop target", statement->line,
                        Fault::Kind::kError, "TemplateAssertionError");
    }
    AnalyzeTarget(statement->target, Use::kParameter, &body);
    AnalyzeBlock(statement->body, &body);
    AnalyzeBlock(statement->otherwise, &otherwise);

    if (statement->test != nullptr) {
      outer->info->captured = true;
      CompiledFunction filter = {.parent = outer, .info = &loop.test_function};
      Symbols test(symbols, &filter);
      AnalyzeTarget(statement->target, Use::kParameter, &test);
      AnalyzeExpr(statement->test, &test);
      loop.test_target = ResolveTarget(*statement->target, test);
      ResolveExpr(statement->test, test, false);
      loop.test = test.MakeFrame();
    }
    ResolveExpr(statement->value, *symbols, soft);
    loop.target = ResolveTarget(*statement->target, body);
    ResolveBlock(statement->body, &body, false);
    ResolveBlock(statement->otherwise, &otherwise, false);
    loop.body = body.MakeFrame();
    loop.otherwise = otherwise.MakeFrame();
  }

  void ResolveMacro(Stmt* statement, Symbols* symbols) {
    statement->macro = std::make_unique<MacroScope>();
    MacroScope& macro = *statement->macro;
    symbols->function()->info->captured = true;
    CompiledFunction function = {.parent = symbols->function(), .info = &macro.function};
    Symbols inner(symbols, &function);
    const auto analyze = [&] {
      for (const std::string& parameter : statement->parameters) {
        inner.DeclareParameter(parameter);
      }
      for (const ExprPtr& value : statement->exprs) AnalyzeExpr(value, &inner);
      AnalyzeBlock(statement->body, &inner);
    };
    analyze();
    const std::set<std::string_view> special =
        Undeclared(statement->body, {"caller", "kwargs", "varargs"});
    const auto is_parameter = [&](std::string_view name) {
      return std::ranges::find(statement->parameters, name) != statement->parameters.end();
    };
    macro.explicit_caller = is_parameter("caller");
    if (special.contains("caller")) {
      if (!macro.explicit_caller) {
        macro.caller = inner.DeclareParameter("caller");
      } else if (!HasDefault(*statement, "caller")) {
        throw SyntaxFault(
            "When defining macros or call blocks the special \"caller\" argument must be omitted "
            "or be given a default.",
            statement->line);
      }
    }
    if (special.contains("kwargs") && !is_parameter("kwargs")) {
      macro.kwargs = inner.DeclareParameter("kwargs");
    }
    if (special.contains("varargs") && !is_parameter("varargs")) {
      macro.varargs = inner.DeclareParameter("varargs");
    }
    analyze();
    for (const std::string& parameter : statement->parameters) {
      macro.parameters.push_back(inner.Find(parameter)->index);
    }
    for (const ExprPtr& value : statement->exprs) ResolveExpr(value, inner, false);
    ResolveBlock(statement->body, &inner, false);
    macro.frame = inner.MakeFrame();
  }

  static bool HasDefault(const Stmt& macro, std::string_view parameter) {
    const auto found = std::ranges::find(macro.parameters, parameter);
    const auto from_end = static_cast<size_t>(macro.parameters.end() - found);
    return from_end <= macro.exprs.size();
  }
};

}  // namespace

void Resolve(Program* program) {
  CompiledFunction root = {.info = &program->function};
  Symbols symbols(nullptr, &root);
  AnalyzeBlock(program->body, &symbols);
  Resolver().ResolveBlock(program->body, &symbols, false);
  program->frame = symbols.MakeFrame();
}

}  // namespace octavo::jinja
