#include "text/pattern.h"

#include <fmt/format.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/error.h"
#include "text/unicode.h"

namespace octavo {
namespace {

template <auto kFree>
struct FreeWith {
  template <typename T>
  void operator()(T* pointer) const {
    kFree(pointer);
  }
};
using Code = std::unique_ptr<pcre2_code, FreeWith<pcre2_code_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, FreeWith<pcre2_match_data_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, FreeWith<pcre2_match_context_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, FreeWith<pcre2_compile_context_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, FreeWith<pcre2_jit_stack_free>>;

constexpr size_t kJitStackBytes = 1 << 20;
constexpr size_t kJitStackFirstBytes = 32 << 10;
// A backtracking step costs a few nanoseconds, so one search gives up after about a second.
constexpr uint32_t kMatchLimit = 200'000'000;
constexpr uint32_t kHeapLimitKib = 64 << 10;
constexpr uint32_t kGroupNestLimit = 100;

std::string MessageOf(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

// What one search needs besides the compiled pattern; made per call, so that a pattern can be
// shared.
class Searcher {
 public:
  explicit Searcher(const pcre2_code* code)
      : code_(code),
        data_(pcre2_match_data_create_from_pattern(code, nullptr)),
        context_(pcre2_match_context_create(nullptr)) {
    if (!data_ || !context_) throw std::bad_alloc();
    pcre2_set_match_limit(context_.get(), kMatchLimit);
    pcre2_set_heap_limit(context_.get(), kHeapLimitKib);
  }

  bool Next(std::string_view text, size_t from, Match* match) {
    int count = Search(text, from);
    if (count == PCRE2_ERROR_JIT_STACKLIMIT && !stack_) {
      // The 32 KiB that JIT takes from the thread's stack are nearly always enough.
      stack_.reset(pcre2_jit_stack_create(kJitStackFirstBytes, kJitStackBytes, nullptr));
      if (!stack_) throw std::bad_alloc();
      pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
      count = Search(text, from);
    }
    if (count == PCRE2_ERROR_NOMATCH) return false;
    if (count < 0) {
      throw Error(ErrorCode::kResourceExhausted,
                  fmt::format("text: expected one that the tokenizer's regular expression can "
                              "split, found {} bytes "
                              "on which it gave up ({})",
                              text.size(), MessageOf(count)));
    }
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data_.get());
    *match = {bounds[0], bounds[1]};
    return true;
  }

 private:
  int Search(std::string_view text, size_t from) {
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                       PCRE2_NO_UTF_CHECK, data_.get(), context_.get());
  }

  const pcre2_code* code_;
  MatchData data_;
  MatchContext context_;
  JitStack stack_;
};

}  // namespace

struct Pattern::Compiled {
  Code code;
};

Pattern Pattern::Literal(std::string text, const std::string& where) {
  if (text.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected a pattern, found an empty string", where));
  }
  Pattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

Pattern Pattern::Regex(std::string_view oniguruma, const std::string& where) {
  const std::string translated = TranslateOniguruma(oniguruma, where);
  const CompileContext context(pcre2_compile_context_create(nullptr));
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), kGroupNestLimit);
  int code = 0;
  PCRE2_SIZE offset = 0;
  // MULTILINE: in Oniguruma ^ and $ always mean lines.
  auto compiled = std::make_shared<Compiled>();
  compiled->code.reset(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &code,
                    &offset, context.get()));
  if (!compiled->code) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected a regular expression, found {} at byte {} of {}", where,
                            MessageOf(code), offset, translated.substr(0, 200)));
  }
  // Without JIT (a platform that has none) the same code is interpreted.
  const int jit = pcre2_jit_compile(compiled->code.get(), PCRE2_JIT_COMPLETE);
  if (jit != 0 && jit != PCRE2_ERROR_JIT_BADOPTION) {
    throw Error(ErrorCode::kResourceExhausted,
                fmt::format("{}: expected a regular expression that compiles, found {}", where,
                            MessageOf(jit)));
  }
  Pattern pattern;
  pattern.regex_ = std::move(compiled);
  return pattern;
}

void Pattern::FindAll(std::string_view text, std::vector<Match>* matches) const {
  if (!regex_) {
    for (size_t at = text.find(literal_); at != text.npos;
         at = text.find(literal_, at + literal_.size())) {
      matches->push_back({at, at + literal_.size()});
    }
    return;
  }
  Searcher searcher(regex_->code.get());
  size_t from = 0;
  size_t last_end = text.npos;
  Match match;
  while (from <= text.size() && searcher.Next(text, from, &match)) {
    if (match.end > match.begin) {
      matches->push_back(match);
      from = last_end = match.end;
      continue;
    }
    if (match.begin != last_end) matches->push_back(match);
    if (match.begin >= text.size()) break;
    from = match.begin;
    NextCodePoint(text, &from);
  }
}

}  // namespace octavo
