#include "text/jinja/parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <set>

#include "text/jinja/expression_parser.h"

namespace octavo::jinja {
namespace {

class Parser : private ExpressionParser {
 public:
  Parser(std::string_view source, Program* program) : ExpressionParser(source, program) {}

  Block Run() {
    Block body;
    ParseUntil({}, &body);
    return body;
  }

 private:
  using Ends = std::initializer_list<std::string_view>;

  // Up to a tag that begins with one of `ends`, which stays, or to the end of the source if there
  // are none.
  void ParseUntil(Ends ends, Block* body) {
    StmtPtr output;
    const auto print = [&](ExprPtr expr, int line) {
      if (output == nullptr) {
        output = std::make_unique<Stmt>(Stmt{.kind = StmtKind::kOutput, .line = line});
      }
      Grow(&output->height, expr->height, line);
      output->exprs.push_back(std::move(expr));
    };
    const auto flush = [&] {
      if (output != nullptr) body->push_back(std::move(output));
    };
    while (Current().kind != TokenKind::kEnd) {
      const Token& token = Take();
      switch (token.kind) {
        case TokenKind::kData:
          print(MakeText(token.text, token.line), token.line);
          break;
        case TokenKind::kVariableBegin:
          print(ParseTuple(), token.line);
          Expect(TokenKind::kVariableEnd, "end of print statement");
          break;
        default:  // kBlockBegin: the lexer gives no other between tags
          flush();
          if (AtEnd(ends)) return;
          body->push_back(ParseStatement(ends));
          Expect(TokenKind::kBlockEnd, "end of statement block");
      }
    }
    flush();
    if (ends.size() != 0) FailUnclosed("Unexpected end of template.", ends);
  }

  bool AtEnd(Ends ends) const {
    return std::ranges::any_of(ends, [&](std::string_view end) { return AtName(end); });
  }

  [[noreturn]] void FailUnclosed(std::string message, Ends ends) const {
    if (ends.size() != 0) {
      message += " Jinja was looking for the following tags:";
      std::string_view separator = " ";
      for (std::string_view end : ends) {
        message += fmt::format("{}'{}'", separator, end);
        separator = " or ";
      }
      message += '.';
    }
    if (!open_tags_.empty()) {
      message +=
          fmt::format(" The innermost block that needs to be closed is '{}'.", open_tags_.back());
    }
    Fail(std::move(message));
  }

  // The body of a tag, from what ends the tag to one of `ends`, which is taken and returned.
  std::string ParseBody(Stmt* statement, Ends ends, Block* body) {
    Skip(":");
    Expect(TokenKind::kBlockEnd, "end of statement block");
    ParseUntil(ends, body);
    for (const StmtPtr& inner : *body) Grow(&statement->height, inner->height, inner->line);
    return Take().text;
  }
  void ParseBody(Stmt* statement, std::string_view end) {
    ParseBody(statement, {end}, &statement->body);
  }

  void Attach(Stmt* statement, const ExprPtr& expr) const {
    if (expr != nullptr) Grow(&statement->height, expr->height, expr->line);
  }

  StmtPtr ParseStatement(Ends ends) {
    const Nesting nesting(this);
    if (Current().kind != TokenKind::kName) Fail("tag name expected");
    const std::string tag = Current().text;
    using Method = void (Parser::*)(Stmt*);
    struct Tag {
      std::string_view name;
      StmtKind kind;
      Method parse;
    };
    static constexpr Tag kTags[] = {{"for", StmtKind::kFor, &Parser::ParseFor},
                                    {"if", StmtKind::kIf, &Parser::ParseIf},
                                    {"set", StmtKind::kSet, &Parser::ParseSet},
                                    {"macro", StmtKind::kMacro, &Parser::ParseMacro},
                                    {"call", StmtKind::kCallBlock, &Parser::ParseCallBlock},
                                    {"generation", StmtKind::kCallBlock, &Parser::ParseGeneration},
                                    {"filter", StmtKind::kFilterBlock, &Parser::ParseFilterBlock},
                                    {"with", StmtKind::kWith, &Parser::ParseWith},
                                    {"print", StmtKind::kOutput, &Parser::ParsePrint},
                                    {"break", StmtKind::kBreak, &Parser::ParseJump},
                                    {"continue", StmtKind::kContinue, &Parser::ParseJump}};
    const auto found = std::ranges::find(kTags, tag, &Tag::name);
    if (found == std::end(kTags)) {
      for (std::string_view known :
           {"block", "extends", "include", "import", "from", "autoescape"}) {
        if (tag == known) {
          throw SyntaxFault(fmt::format("the tag '{}' is not supported", tag), Current().line,
                            Fault::Kind::kUnsupported);
        }
      }
      FailUnclosed(fmt::format("Encountered unknown tag '{}'.", tag), ends);
    }
    auto statement = std::make_unique<Stmt>(Stmt{.kind = found->kind, .line = Take().line});
    open_tags_.push_back(tag);
    (this->*found->parse)(statement.get());
    open_tags_.pop_back();
    return statement;
  }

  void ParseSet(Stmt* statement) {
    statement->target = ParseTarget(true, "");
    if (Skip("=")) {
      statement->value = ParseTuple();
      Attach(statement, statement->value);
      return;
    }
    statement->kind = StmtKind::kSetBlock;
    statement->value = ParseFilters(nullptr);
    Attach(statement, statement->value);
    ParseBody(statement, "endset");
  }

  void ParseFor(Stmt* statement) {
    statement->target = ParseTarget(false, "in");
    ExpectName("in");
    statement->value = ParseTuple(false, "recursive");
    Attach(statement, statement->value);
    if (SkipName("if")) {
      statement->test = ParseExpression();
      Attach(statement, statement->test);
    }
    statement->recursive = SkipName("recursive");
    const int loops = loops_;
    if (statement->recursive) loops_ = 0;  // a function of its own
    ++loops_;
    const std::string end = ParseBody(statement, {"endfor", "else"}, &statement->body);
    --loops_;
    if (end == "else") ParseBody(statement, {"endfor"}, &statement->otherwise);
    loops_ = loops;
  }

  void ParseIf(Stmt* statement) {
    for (std::string end = "elif"; end == "elif";) {
      ExprPtr test = ParseTuple(false);
      Attach(statement, test);
      statement->exprs.push_back(std::move(test));
      Block body;
      end = ParseBody(statement, {"elif", "else", "endif"}, &body);
      statement->bodies.push_back(std::move(body));
      if (end != "else") continue;
      Block otherwise;
      ParseBody(statement, {"endif"}, &otherwise);
      statement->bodies.push_back(std::move(otherwise));
    }
  }

  void ParseWith(Stmt* statement) {
    while (Current().kind != TokenKind::kBlockEnd) {
      if (!statement->targets.empty()) Expect(",");
      statement->targets.push_back(ParseTarget(false, ""));
      Expect("=");
      statement->exprs.push_back(ParseExpression());
      Attach(statement, statement->exprs.back());
    }
    ParseBody(statement, "endwith");
  }

  void ParseSignature(Stmt* statement) {
    Expect("(");
    std::set<std::string> names;
    while (!At(")")) {
      if (!statement->parameters.empty()) Expect(",");
      std::string name = TakeVariableName();
      if (!names.insert(name).second) {
        Fail(fmt::format("duplicate argument '{}' in function definition", name));
      }
      if (Skip("=")) {
        statement->exprs.push_back(ParseExpression());
        Attach(statement, statement->exprs.back());
      } else if (!statement->exprs.empty()) {
        Fail("non-default argument follows default argument");
      }
      statement->parameters.push_back(std::move(name));
    }
    Expect(")");
  }

  std::string TakeVariableName() {
    const Token& token = TakeName();
    if (IsReserved(token.text)) Fail("can't assign to 'name'", token.line);
    return token.text;
  }

  // The body of a function of its own: no loop outside can be left from it.
  void ParseFunctionBody(Stmt* statement, std::string_view end) {
    const int loops = loops_;
    loops_ = 0;
    ParseBody(statement, end);
    loops_ = loops;
  }

  void ParseMacro(Stmt* statement) {
    statement->name = TakeVariableName();
    ParseSignature(statement);
    ParseFunctionBody(statement, "endmacro");
  }

  void ParseCallBlock(Stmt* statement) {
    if (At("(")) ParseSignature(statement);
    statement->value = ParseExpression();
    if (statement->value->kind != ExprKind::kCall) Fail("expected call", statement->line);
    Attach(statement, statement->value);
    ParseFunctionBody(statement, "endcall");
  }

  void ParseGeneration(Stmt* statement) { ParseFunctionBody(statement, "endgeneration"); }

  void ParseFilterBlock(Stmt* statement) {
    statement->value = ParseFilters(ParseFilter(nullptr));
    Attach(statement, statement->value);
    ParseBody(statement, "endfilter");
  }

  void ParsePrint(Stmt* statement) {
    while (Current().kind != TokenKind::kBlockEnd) {
      if (!statement->exprs.empty()) Expect(",");
      statement->exprs.push_back(ParseExpression());
      Attach(statement, statement->exprs.back());
    }
  }

  void ParseJump(Stmt* statement) {
    if (loops_ > 0) return;
    Fail(statement->kind == StmtKind::kBreak ? "'break' outside loop"
                                             : "'continue' not properly in loop",
         statement->line);
  }

  int loops_ = 0;  // around, within the same function
  std::vector<std::string> open_tags_;
};

}  // namespace

std::unique_ptr<Program> Parse(std::string_view source) {
  auto program = std::make_unique<Program>();
  program->body = Parser(source, program.get()).Run();
  return program;
}

}  // namespace octavo::jinja
