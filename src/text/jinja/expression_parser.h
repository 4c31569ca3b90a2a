// The expressions of the template language: the half of the parser on which the statements build.
// Only parser.cpp includes this.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja/ast.h"
#include "text/jinja/lexer.h"

namespace octavo::jinja {

class ExpressionParser {
 protected:
  ExpressionParser(std::string_view source, Program* program)
      : tokens_(Tokenize(source)), program_(*program) {
    CheckToken();
  }

  // -- Tokens

  const Token& Current() const { return tokens_[at_]; }
  const Token& Look() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  const Token& Take() {
    const Token& token = tokens_[at_];
    if (at_ + 1 < tokens_.size()) ++at_;
    CheckToken();
    return token;
  }
  void CheckToken() const {
    if (Current().kind == TokenKind::kMistake) Fail(Current().text);
  }
  bool At(std::string_view op) const { return Current().IsOperator(op); }
  bool AtName(std::string_view name) const { return Current().IsName(name); }
  bool Skip(std::string_view op) {
    if (!At(op)) return false;
    Take();
    return true;
  }
  bool SkipName(std::string_view name) {
    if (!AtName(name)) return false;
    Take();
    return true;
  }

  [[noreturn]] void Fail(std::string message, int line) const {
    throw SyntaxFault(std::move(message), line);
  }
  [[noreturn]] void Fail(std::string message) const { Fail(std::move(message), Current().line); }
  [[noreturn]] void FailExpected(std::string_view what) const {
    if (Current().kind == TokenKind::kEnd) {
      Fail(fmt::format("unexpected end of template, expected '{}'.", what));
    }
    Fail(fmt::format("expected token '{}', got '{}'", what, Describe(Current())));
  }

  void Expect(std::string_view op) {
    if (!Skip(op)) FailExpected(op);
  }
  void ExpectName(std::string_view name) {
    if (!SkipName(name)) FailExpected(name);
  }
  void Expect(TokenKind kind, std::string_view what) {
    if (Current().kind != kind) FailExpected(what);
    Take();
  }
  const Token& TakeName() {
    if (Current().kind != TokenKind::kName) FailExpected("name");
    return Take();
  }

  // The names that are constants.
  static bool IsReserved(std::string_view name) {
    for (std::string_view reserved : {"true", "false", "none", "True", "False", "None"}) {
      if (name == reserved) return true;
    }
    return false;
  }

  // -- Nodes

  ExprPtr Make(ExprKind kind, int line) {
    return std::make_unique<Expr>(Expr{.kind = kind, .line = line});
  }

  void Grow(int* height, int child, int line) const {
    *height = std::max(*height, child + 1);
    if (*height > kMaxTreeHeight) {
      throw SyntaxFault(fmt::format("nested deeper than {}", kMaxTreeHeight), line,
                        Fault::Kind::kLimit);
    }
  }
  void Adopt(Expr* parent, ExprPtr child) const {
    if (child != nullptr) Grow(&parent->height, child->height, child->line);
    parent->operands.push_back(std::move(child));
  }
  ExprPtr MakeBinary(ExprKind kind, int line, ExprPtr left, ExprPtr right) {
    ExprPtr node = Make(kind, line);
    Adopt(node.get(), std::move(left));
    Adopt(node.get(), std::move(right));
    return node;
  }
  Value Constant(std::string text) {
    return Value::Uncounted(
        Kind::kString, program_.constants.Own(std::make_unique<String>(nullptr, std::move(text))));
  }
  ExprPtr MakeText(std::string text, int line) {
    ExprPtr node = Make(ExprKind::kConstant, line);
    node->value = Constant(std::move(text));
    return node;
  }
  ExprPtr MakeName(const Token& token) {
    ExprPtr node = Make(ExprKind::kName, token.line);
    node->name = token.text;
    node->value =
        Value::Uncounted(Kind::kUndefined, program_.constants.Own(std::make_unique<Undefined>(
                                               nullptr, "", nullptr, Constant(token.text))));
    return node;
  }

  // Source within source: bounds the recursion of this parser.
  class Nesting {
   public:
    explicit Nesting(ExpressionParser* parser) : depth_(&parser->depth_) {
      if (++*depth_ <= kMaxSourceDepth) return;
      --*depth_;
      throw SyntaxFault(fmt::format("nested deeper than {}", kMaxSourceDepth),
                        parser->Current().line, Fault::Kind::kLimit);
    }
    ~Nesting() { --*depth_; }

   private:
    int* depth_;
  };

  // -- Assignment targets

  // `end`: a name that ends a tuple.
  ExprPtr ParseTarget(bool with_namespace, std::string_view end) {
    const int line = Current().line;
    std::vector<ExprPtr> parts;
    bool tuple = false;
    while (true) {
      if (!parts.empty()) Expect(",");
      if (AtTupleEnd(end)) break;
      parts.push_back(ParsePrimary(with_namespace));
      if (!At(",")) break;
      tuple = true;
    }
    ExprPtr target;
    if (tuple) {
      target = Make(ExprKind::kTuple, line);
      for (ExprPtr& part : parts) Adopt(target.get(), std::move(part));
    } else if (parts.empty()) {
      Fail(fmt::format("Expected an expression, got '{}'", Describe(Current())));
    } else {
      target = std::move(parts[0]);
    }
    CheckTarget(*target);
    return target;
  }

  void CheckTarget(const Expr& target) const {
    switch (target.kind) {
      case ExprKind::kName:
      case ExprKind::kNamespaceRef:
        return;
      case ExprKind::kTuple:
        for (const ExprPtr& part : target.operands) CheckTarget(*part);
        return;
      default:
        Fail("can't assign to what is no name", target.line);
    }
  }

  // -- Expressions, from the loosest to the tightest

  ExprPtr ParseExpression(bool with_conditional = true) {
    const Nesting nesting(this);
    return with_conditional ? ParseConditional() : ParseOr();
  }

  ExprPtr ParseConditional() {
    int line = Current().line;
    ExprPtr expr = ParseOr();
    while (SkipName("if")) {
      ExprPtr test = ParseOr();
      ExprPtr otherwise;
      if (SkipName("else")) otherwise = ParseExpression();
      ExprPtr node = MakeBinary(ExprKind::kConditional, line, std::move(test), std::move(expr));
      Adopt(node.get(), std::move(otherwise));
      node->value = Value::Uncounted(
          Kind::kUndefined,
          program_.constants.Own(std::make_unique<Undefined>(
              nullptr,
              fmt::format("the inline if-expression on line {} evaluated to false and no else "
                          "section was defined.",
                          line),
              nullptr, Value::None())));
      expr = std::move(node);
      line = Current().line;
    }
    return expr;
  }

  ExprPtr ParseOr() {
    int line = Current().line;
    ExprPtr left = ParseAnd();
    while (SkipName("or")) {
      left = MakeBinary(ExprKind::kOr, line, std::move(left), ParseAnd());
      line = Current().line;
    }
    return left;
  }

  ExprPtr ParseAnd() {
    int line = Current().line;
    ExprPtr left = ParseNot();
    while (SkipName("and")) {
      left = MakeBinary(ExprKind::kAnd, line, std::move(left), ParseNot());
      line = Current().line;
    }
    return left;
  }

  ExprPtr ParseNot() {
    if (!AtName("not")) return ParseCompare();
    const Nesting nesting(this);
    ExprPtr node = Make(ExprKind::kNot, Take().line);
    Adopt(node.get(), ParseNot());
    return node;
  }

  ExprPtr ParseCompare() {
    static constexpr std::pair<std::string_view, CompareOp> kOps[] = {
        {"==", CompareOp::kEqual},  {"!=", CompareOp::kNotEqual},
        {"<", CompareOp::kLess},    {"<=", CompareOp::kLessEqual},
        {">", CompareOp::kGreater}, {">=", CompareOp::kGreaterEqual}};
    const int line = Current().line;
    ExprPtr first = ParseSum();
    ExprPtr node;
    while (true) {
      Comparison comparison;
      const auto op = std::ranges::find_if(kOps, [&](const auto& pair) { return At(pair.first); });
      if (op != std::end(kOps)) {
        comparison = {ComparisonKind::kOrder, op->second};
        Take();
      } else if (SkipName("in")) {
        comparison = {ComparisonKind::kIn};
      } else if (AtName("not") && Look().IsName("in")) {
        comparison = {ComparisonKind::kNotIn};
        Take();
        Take();
      } else {
        break;
      }
      if (node == nullptr) {
        node = Make(ExprKind::kCompare, line);
        Adopt(node.get(), std::move(first));
      }
      node->comparisons.push_back(comparison);
      Adopt(node.get(), ParseSum());
    }
    return node == nullptr ? std::move(first) : std::move(node);
  }

  using Operators = std::initializer_list<std::pair<std::string_view, BinaryOp>>;
  ExprPtr ParseLeft(Operators operators, ExprPtr (ExpressionParser::*operand)()) {
    int line = Current().line;
    ExprPtr left = (this->*operand)();
    while (true) {
      const auto op = std::ranges::find_if(operators, [&](auto& pair) { return At(pair.first); });
      if (op == operators.end()) return left;
      Take();
      left = MakeBinary(ExprKind::kBinary, line, std::move(left), (this->*operand)());
      left->op = op->second;
      line = Current().line;
    }
  }

  ExprPtr ParseSum() {
    return ParseLeft({{"+", BinaryOp::kAdd}, {"-", BinaryOp::kSubtract}},
                     &ExpressionParser::ParseConcat);
  }

  ExprPtr ParseConcat() {
    const int line = Current().line;
    ExprPtr first = ParseProduct();
    if (!At("~")) return first;
    ExprPtr node = Make(ExprKind::kConcat, line);
    Adopt(node.get(), std::move(first));
    while (Skip("~")) Adopt(node.get(), ParseProduct());
    return node;
  }

  ExprPtr ParseProduct() {
    return ParseLeft({{"*", BinaryOp::kMultiply},
                      {"/", BinaryOp::kDivide},
                      {"//", BinaryOp::kFloorDivide},
                      {"%", BinaryOp::kModulo}},
                     &ExpressionParser::ParsePower);
  }

  ExprPtr ParsePower() {
    return ParseLeft({{"**", BinaryOp::kPower}}, &ExpressionParser::ParseFiltered);
  }

  ExprPtr ParseFiltered() { return ParseUnary(true); }

  ExprPtr ParseUnary(bool with_filter) {
    ExprPtr node;
    if (At("-") || At("+")) {
      const Nesting nesting(this);
      node = Make(At("-") ? ExprKind::kNegate : ExprKind::kPlus, Current().line);
      Take();
      Adopt(node.get(), ParseUnary(false));
    } else {
      node = ParsePrimary(false);
    }
    node = ParsePostfix(std::move(node));
    return with_filter ? ParseFilterOrTest(std::move(node)) : std::move(node);
  }

  ExprPtr ParsePrimary(bool with_namespace) {
    const Token& token = Current();
    switch (token.kind) {
      case TokenKind::kName:
        Take();
        if (IsReserved(token.text)) {
          ExprPtr node = Make(ExprKind::kConstant, token.line);
          const char initial = static_cast<char>(token.text[0] | 0x20);
          node->value = initial == 'n' ? Value::None() : Value::Bool(initial == 't');
          return node;
        }
        if (with_namespace && Skip(".")) {
          ExprPtr node = Make(ExprKind::kNamespaceRef, token.line);
          node->name = token.text;
          node->value = Constant(TakeName().text);
          return node;
        }
        return MakeName(token);
      case TokenKind::kString: {
        std::string text;
        while (Current().kind == TokenKind::kString) text += Take().text;
        return MakeText(std::move(text), token.line);
      }
      case TokenKind::kInteger:
      case TokenKind::kFloat: {
        ExprPtr node = Make(ExprKind::kConstant, Take().line);
        node->value = token.kind == TokenKind::kInteger ? Value::Integer(token.integer)
                                                        : Value::Float(token.real);
        return node;
      }
      default:
        break;
    }
    if (Skip("(")) {
      const Nesting nesting(this);
      ExprPtr node = ParseTuple(true, "", true);
      Expect(")");
      return node;
    }
    if (At("[")) return ParseList();
    if (At("{")) return ParseDict();
    Fail(fmt::format("unexpected '{}'", Describe(token)));
  }

  bool AtTupleEnd(std::string_view end) const {
    return Current().kind == TokenKind::kVariableEnd || Current().kind == TokenKind::kBlockEnd ||
           At(")") || (!end.empty() && AtName(end));
  }

  // One expression, or several with commas: a tuple.
  ExprPtr ParseTuple(bool with_conditional = true, std::string_view end = "",
                     bool in_parentheses = false) {
    const int line = Current().line;
    std::vector<ExprPtr> items;
    bool tuple = false;
    while (true) {
      if (!items.empty()) Expect(",");
      if (AtTupleEnd(end)) break;
      items.push_back(ParseExpression(with_conditional));
      if (!At(",")) break;
      tuple = true;
    }
    if (!tuple && !items.empty()) return std::move(items[0]);
    if (!tuple && !in_parentheses) {
      Fail(fmt::format("Expected an expression, got '{}'", Describe(Current())));
    }
    ExprPtr node = Make(ExprKind::kTuple, line);
    for (ExprPtr& item : items) Adopt(node.get(), std::move(item));
    return node;
  }

  ExprPtr ParseList() {
    ExprPtr node = Make(ExprKind::kList, Take().line);
    while (!At("]")) {
      if (!node->operands.empty()) Expect(",");
      if (At("]")) break;
      Adopt(node.get(), ParseExpression());
    }
    Expect("]");
    return node;
  }

  ExprPtr ParseDict() {
    ExprPtr node = Make(ExprKind::kDict, Take().line);
    while (!At("}")) {
      if (!node->operands.empty()) Expect(",");
      if (At("}")) break;
      Adopt(node.get(), ParseExpression());
      Expect(":");
      Adopt(node.get(), ParseExpression());
    }
    Expect("}");
    return node;
  }

  ExprPtr ParsePostfix(ExprPtr node) {
    while (true) {
      if (At(".")) {
        node = ParseAttribute(std::move(node));
      } else if (At("[")) {
        node = ParseItem(std::move(node));
      } else if (At("(")) {
        node = ParseCall(std::move(node));
      } else {
        return node;
      }
    }
  }

  ExprPtr ParseFilterOrTest(ExprPtr node) {
    while (true) {
      if (At("|")) {
        Take();
        node = ParseFilter(std::move(node));
      } else if (AtName("is")) {
        node = ParseTest(std::move(node));
      } else if (At("(")) {
        node = ParseCall(std::move(node));
      } else {
        return node;
      }
    }
  }

  ExprPtr ParseAttribute(ExprPtr object) {
    const int line = Take().line;
    const Token& name = Take();
    if (name.kind == TokenKind::kName) {
      ExprPtr node = Make(ExprKind::kAttribute, line);
      Adopt(node.get(), std::move(object));
      node->value = Constant(name.text);
      return node;
    }
    if (name.kind != TokenKind::kInteger) Fail("expected name or number", name.line);
    ExprPtr index = Make(ExprKind::kConstant, name.line);
    index->value = Value::Integer(name.integer);
    return MakeBinary(ExprKind::kItem, line, std::move(object), std::move(index));
  }

  ExprPtr ParseItem(ExprPtr object) {
    const int line = Take().line;
    std::vector<ExprPtr> keys;
    while (!At("]")) {
      if (!keys.empty()) Expect(",");
      keys.push_back(ParseSubscript());
    }
    Expect("]");
    const auto is_slice = [](const ExprPtr& key) {
      return key->kind == ExprKind::kSlice && key->operands[0] == nullptr;
    };
    if (keys.size() == 1 && is_slice(keys[0])) {
      ExprPtr slice = std::move(keys[0]);
      Grow(&slice->height, object->height, line);
      slice->operands[0] = std::move(object);
      return slice;
    }
    if (std::ranges::any_of(keys, is_slice)) Fail("a slice within a tuple", line);
    if (keys.size() == 1) {
      return MakeBinary(ExprKind::kItem, line, std::move(object), std::move(keys[0]));
    }
    ExprPtr tuple = Make(ExprKind::kTuple, line);
    for (ExprPtr& key : keys) Adopt(tuple.get(), std::move(key));
    return MakeBinary(ExprKind::kItem, line, std::move(object), std::move(tuple));
  }

  // One subscript; a slice has no object yet.
  ExprPtr ParseSubscript() {
    const int line = Current().line;
    ExprPtr start;
    if (!At(":")) {
      start = ParseExpression();
      if (!At(":")) return start;
    }
    Take();
    const auto at_bound = [&] { return !At(":") && !At("]") && !At(","); };
    ExprPtr stop = at_bound() ? ParseExpression() : nullptr;
    ExprPtr step;
    if (Skip(":") && at_bound()) step = ParseExpression();
    ExprPtr slice = Make(ExprKind::kSlice, line);
    slice->operands.emplace_back();
    for (ExprPtr* bound : {&start, &stop, &step}) Adopt(slice.get(), std::move(*bound));
    return slice;
  }

  ExprPtr ParseCall(ExprPtr callee) {
    ExprPtr node = Make(ExprKind::kCall, Current().line);
    Adopt(node.get(), std::move(callee));
    ParseArguments(node.get());
    return node;
  }

  void ParseArguments(Expr* node) {
    node->arguments = std::make_unique<CallArguments>();
    CallArguments& arguments = *node->arguments;
    const int line = Current().line;
    const auto ensure = [&](bool valid) {
      if (!valid) Fail("invalid syntax for function call expression", line);
    };
    const auto parse = [&] {
      ExprPtr value = ParseExpression();
      Grow(&node->height, value->height, value->line);
      return value;
    };
    std::set<std::string> names;
    Expect("(");
    for (bool first = true; !At(")"); first = false) {
      if (!first) {
        Expect(",");
        if (At(")")) break;
      }
      if (At("*")) {
        ensure(arguments.spread == nullptr && arguments.spread_named == nullptr);
        Take();
        arguments.spread = parse();
      } else if (At("**")) {
        ensure(arguments.spread_named == nullptr);
        Take();
        arguments.spread_named = parse();
      } else if (Current().kind == TokenKind::kName && Look().IsOperator("=")) {
        ensure(arguments.spread_named == nullptr);
        std::string name = Take().text;
        Take();
        if (!names.insert(name).second) {
          Fail(fmt::format("keyword argument repeated: {}", name));
        }
        arguments.named.emplace_back(std::move(name), parse());
      } else {
        ensure(arguments.spread == nullptr && arguments.spread_named == nullptr &&
               arguments.named.empty());
        arguments.positional.push_back(parse());
      }
    }
    Expect(")");
  }

  std::string TakeDottedName() {
    std::string name = TakeName().text;
    while (Skip(".")) name += '.' + TakeName().text;
    return name;
  }

  // After "|".
  ExprPtr ParseFilter(ExprPtr input) {
    ExprPtr node = Make(ExprKind::kFilter, Current().line);
    node->name = TakeDottedName();
    Adopt(node.get(), std::move(input));
    if (At("(")) {
      ParseArguments(node.get());
    } else {
      node->arguments = std::make_unique<CallArguments>();
    }
    return node;
  }

  ExprPtr ParseFilters(ExprPtr input) {
    while (Skip("|")) input = ParseFilter(std::move(input));
    return input;
  }

  ExprPtr ParseTest(ExprPtr subject) {
    ExprPtr node = Make(ExprKind::kTest, Take().line);
    const bool negated = SkipName("not");
    node->name = TakeDottedName();
    Adopt(node.get(), std::move(subject));
    if (At("(")) {
      ParseArguments(node.get());
    } else {
      node->arguments = std::make_unique<CallArguments>();
      if (AtTestArgument()) {
        if (AtName("is")) Fail("You cannot chain multiple tests with is");
        const Nesting nesting(this);
        ExprPtr argument = ParsePostfix(ParsePrimary(false));
        Grow(&node->height, argument->height, argument->line);
        node->arguments->positional.push_back(std::move(argument));
      }
    }
    if (!negated) return node;
    ExprPtr negation = Make(ExprKind::kNot, node->line);
    Adopt(negation.get(), std::move(node));
    return negation;
  }

  bool AtTestArgument() const {
    switch (Current().kind) {
      case TokenKind::kName:
        return !AtName("else") && !AtName("or") && !AtName("and");
      case TokenKind::kString:
      case TokenKind::kInteger:
      case TokenKind::kFloat:
        return true;
      default:
        return At("[") || At("{");
    }
  }

 private:
  const std::vector<Token> tokens_;
  Program& program_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace octavo::jinja
