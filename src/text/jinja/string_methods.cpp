// The methods of str.
#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "text/jinja/attributes.h"
#include "text/jinja/builtins.h"
#include "text/jinja/format.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/operators.h"
#include "text/jinja/python_text.h"
#include "text/unicode.h"

namespace octavo::jinja {
namespace {

// Arguments of a method that takes none by name.
const Values& Positional(const char* method, const Arguments& arguments, size_t least,
                         size_t most) {
  if (!arguments.named.empty()) {
    ThrowTypeError(fmt::format("str.{}() takes no keyword arguments", method));
  }
  const size_t count = arguments.positional.size();
  if (count < least) {
    ThrowTypeError(fmt::format("{} expected at least {} argument{}, got {}", method, least,
                               least == 1 ? "" : "s", count));
  }
  if (count > most) {
    ThrowTypeError(fmt::format("{} expected at most {} argument{}, got {}", method, most,
                               most == 1 ? "" : "s", count));
  }
  return arguments.positional;
}

// what: which argument it is, if Python says so.
const std::string& TextOf(const char* what, const Value& value) {
  if (!value.IsString()) {
    ThrowTypeError(fmt::format("{}must be str, not {}", what, TypeName(value)));
  }
  return value.text();
}

// A string of the kind of `self`: markup stays markup.
Value Like(Interpreter& interpreter, const Value& self, std::string text) {
  return MakeString(interpreter.heap(), std::move(text), self.As<String>().markup);
}

Value ListLike(Interpreter& interpreter, const Value& self,
               const std::vector<std::string_view>& parts) {
  Heap& heap = interpreter.heap();
  heap.Reserve(parts.size() * (sizeof(String) + sizeof(Value)));
  Values items;
  items.reserve(parts.size());
  for (std::string_view part : parts) {
    items.push_back(CopyString(heap, part, self.As<String>().markup));
  }
  return MakeList(heap, std::move(items));
}

using Mapping = std::string (*)(std::string_view);

template <Mapping map>
Value Map(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  Positional("method", arguments, 0, 0);
  interpreter.heap().Reserve(3 * self.text().size());
  return Like(interpreter, self, map(self.text()));
}

template <TextClass what>
Value Is(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  Positional("method", arguments, 0, 0);
  interpreter.heap().WorkOnBytes(self.text().size());
  return Value::Bool(IsAll(what, self.text()));
}

template <Side side>
Value StripMethod(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Values& given = Positional("strip", arguments, 0, 1);
  interpreter.heap().WorkOnBytes(self.text().size());
  if (given.empty() || given[0].IsNone()) {
    return Like(interpreter, self, std::string(StripSpace(self.text(), side)));
  }
  if (!given[0].IsString()) ThrowTypeError("strip arg must be None or str");
  interpreter.heap().WorkOnBytes(given[0].text().size());
  return Like(interpreter, self, std::string(Strip(self.text(), given[0].text(), side)));
}

// The part of a text that optional bounds leave; false if they cross or lie behind its end.
struct Window {
  std::string_view text;
  int64_t begin = 0;  // in code points
  bool valid = true;
};

Window WindowOf(const Value& self, const Values& arguments, size_t first) {
  const String& string = self.As<String>();
  const auto length = static_cast<int64_t>(string.length);
  const auto bound = [&](size_t at, int64_t otherwise) {
    if (arguments.size() <= at || arguments[at].IsNone()) return otherwise;
    const int64_t index = ClampedIndexOf(arguments[at]);
    return index < 0 ? std::max<int64_t>(0, std::max(index, -length) + length) : index;
  };
  const int64_t begin = bound(first, 0);
  const int64_t end = std::min(bound(first + 1, length), length);
  if (begin > end) return {.valid = false};
  const size_t from = ByteOffset(string.text, begin, string.ascii());
  const std::string_view rest = std::string_view(string.text).substr(from);
  return {rest.substr(0, ByteOffset(rest, end - begin, string.ascii())), begin};
}

int64_t CodePoints(std::string_view text) {
  return std::ranges::count_if(text, [](char c) { return (c & 0xC0) != 0x80; });
}

// The index in code points, or -1.
template <bool from_right>
int64_t FindPart(Interpreter& interpreter, const Value& self, const Arguments& arguments) {
  const char* name = from_right ? "rfind" : "find";
  const Values& given = Positional(name, arguments, 1, 3);
  const std::string& part = TextOf("", given[0]);
  interpreter.heap().WorkOnBytes(self.text().size());
  const Window window = WindowOf(self, given, 1);
  if (!window.valid) return -1;
  const size_t at = from_right ? FindFromRight(window.text, part) : jinja::Find(window.text, part);
  return at == window.text.npos ? -1 : window.begin + CodePoints(window.text.substr(0, at));
}

template <bool from_right>
Value Find(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  return Value::Integer(FindPart<from_right>(interpreter, self, arguments));
}

template <bool from_right>
Value Index(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const int64_t at = FindPart<from_right>(interpreter, self, arguments);
  if (at < 0) ThrowValueError("substring not found");
  return Value::Integer(at);
}

Value CountMethod(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Values& given = Positional("count", arguments, 1, 3);
  const std::string& part = TextOf("", given[0]);
  interpreter.heap().WorkOnBytes(self.text().size());
  const Window window = WindowOf(self, given, 1);
  return Value::Integer(window.valid ? static_cast<Int>(Count(window.text, part)) : 0);
}

template <bool at_end>
Value StartsOrEndsWith(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const char* name = at_end ? "endswith" : "startswith";
  const Values& given = Positional(name, arguments, 1, 3);
  if (!self.As<String>().ascii() && given.size() > 1) {
    interpreter.heap().WorkOnBytes(self.text().size());
  }
  const Window window = WindowOf(self, given, 1);
  const auto matches = [&](const Value& part) {
    if (!part.IsString()) {
      ThrowTypeError(
          fmt::format(given[0].Is(Kind::kTuple)
                          ? fmt::runtime("tuple for {} must only contain str, not {}")
                          : fmt::runtime("{} first arg must be str or a tuple of str, not {}"),
                      name, TypeName(part)));
    }
    interpreter.heap().WorkOnBytes(part.text().size());
    if (!window.valid) return false;
    return at_end ? window.text.ends_with(part.text()) : window.text.starts_with(part.text());
  };
  if (!given[0].Is(Kind::kTuple)) return Value::Bool(matches(given[0]));
  interpreter.heap().Work(given[0].weight());
  return Value::Bool(std::ranges::any_of(given[0].items(), matches));
}

template <bool from_right>
Value SplitMethod(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Bound bound("str.split()", arguments, {"sep", "maxsplit"});
  const int64_t most = bound.Has(1) ? ClampedIndexOf(bound[1]) : -1;
  const std::string& text = self.text();
  interpreter.heap().WorkOnBytes(text.size());
  // Each part costs more than a byte does; none comes without one.
  interpreter.heap().Reserve(text.size());
  if (!bound.HasValue(0)) {
    return ListLike(interpreter, self,
                    from_right ? SplitSpaceFromRight(text, most) : SplitSpace(text, most));
  }
  if (!bound[0].IsString()) {
    ThrowTypeError(fmt::format("must be str or None, not {}", TypeName(bound[0])));
  }
  const std::string& separator = bound[0].text();
  if (separator.empty()) ThrowValueError("empty separator");
  return ListLike(
      interpreter, self,
      from_right ? SplitFromRight(text, separator, most) : Split(text, separator, most));
}

Value SplitLinesMethod(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Bound bound("str.splitlines()", arguments, {"keepends"});
  interpreter.heap().WorkOnBytes(self.text().size());
  return ListLike(interpreter, self, SplitLines(self.text(), bound.Has(0) && Truth(bound[0])));
}

template <bool from_right>
Value Partition(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const char* name = from_right ? "rpartition" : "partition";
  const std::string& separator = TextOf("", Positional(name, arguments, 1, 1)[0]);
  if (separator.empty()) ThrowValueError("empty separator");
  const std::string_view text = self.text();
  const size_t at = from_right ? FindFromRight(text, separator) : jinja::Find(text, separator);
  std::string_view parts[3] = {};
  if (at == text.npos) {
    parts[from_right ? 2 : 0] = text;
  } else {
    parts[0] = text.substr(0, at);
    parts[1] = separator;
    parts[2] = text.substr(at + separator.size());
  }
  Values items;
  for (std::string_view part : parts) {
    items.push_back(CopyString(interpreter.heap(), part, self.As<String>().markup));
  }
  return MakeTuple(interpreter.heap(), std::move(items));
}

Value ReplaceMethod(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Values& given = Positional("replace", arguments, 2, 3);
  const std::string& from = TextOf("replace() argument 1 ", given[0]);
  std::string to = TextOf("replace() argument 2 ", given[1]);
  if (self.As<String>().markup && !given[1].As<String>().markup) to = EscapeText(to);
  const int64_t most = given.size() > 2 ? ClampedIndexOf(given[2]) : -1;
  interpreter.heap().WorkOnBytes(self.text().size());
  interpreter.heap().Reserve(ReplacedSize(self.text(), from, to, most));
  return Like(interpreter, self, Replace(self.text(), from, to, most));
}

Value Join(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Values& given = Positional("join", arguments, 1, 1);
  if (!interpreter.IsIterable(given[0])) ThrowTypeError("can only join an iterable");
  const bool markup = self.As<String>().markup;
  const Values items = interpreter.Collect(given[0]);
  std::string text;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].IsString() && !markup) {
      ThrowTypeError(
          fmt::format("sequence item {}: expected str instance, {} found", i, TypeName(items[i])));
    }
    const Value escaped = markup ? Escape(interpreter.heap(), items[i]) : items[i];
    const std::string& part = escaped.text();
    interpreter.heap().Reserve(text.size() + self.text().size() + part.size());
    if (i > 0) text += self.text();
    text += part;
  }
  return Like(interpreter, self, std::move(text));
}

template <bool suffix>
Value RemoveAffix(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const char* name = suffix ? "removesuffix" : "removeprefix";
  const std::string& affix = TextOf("", Positional(name, arguments, 1, 1)[0]);
  std::string_view text = self.text();
  if (suffix && text.ends_with(affix)) text.remove_suffix(affix.size());
  if (!suffix && text.starts_with(affix)) text.remove_prefix(affix.size());
  return Like(interpreter, self, std::string(text));
}

enum class Place { kLeft, kCenter, kRight };

template <Place place>
Value Justify(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Values& given = Positional("justify", arguments, 1, 2);
  const int64_t width = IndexOf(given[0]);
  std::string fill = " ";
  if (given.size() > 1) {
    if (!given[1].IsString() || given[1].As<String>().length != 1) {
      ThrowTypeError("The fill character must be exactly one character long");
    }
    fill = given[1].text();
  }
  const auto length = static_cast<int64_t>(self.As<String>().length);
  if (width <= length) return self;
  const int64_t missing = width - length;
  if (missing > std::numeric_limits<int64_t>::max() / 4) {
    interpreter.heap().Reserve(std::numeric_limits<size_t>::max());
  }
  interpreter.heap().Reserve(self.text().size() + missing * fill.size());
  const int64_t left = place == Place::kLeft    ? 0
                       : place == Place::kRight ? missing
                                                : missing / 2 + (missing & width & 1);
  std::string text;
  for (int64_t i = 0; i < left; ++i) text += fill;
  text += self.text();
  for (int64_t i = left; i < missing; ++i) text += fill;
  return Like(interpreter, self, std::move(text));
}

Value ZeroFill(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const int64_t width = IndexOf(Positional("zfill", arguments, 1, 1)[0]);
  const auto length = static_cast<int64_t>(self.As<String>().length);
  if (width <= length) return self;
  interpreter.heap().Reserve(width);
  const bool has_sign = self.text().starts_with('-') || self.text().starts_with('+');
  std::string text = self.text();
  text.insert(has_sign, width - length, '0');
  return Like(interpreter, self, std::move(text));
}

Value ExpandTabs(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Bound bound("str.expandtabs()", arguments, {"tabsize"});
  const int64_t size = bound.Has(0) ? IndexOf(bound[0]) : 8;
  constexpr int64_t kMost = 1 << 20;
  if (size > kMost) ThrowLimit(fmt::format("a tab of more than {} spaces", kMost));
  std::string text;
  int64_t column = 0;
  for (char c : self.text()) {
    if (c == '\t') {
      const int64_t spaces = size > 0 ? size - column % size : 0;
      interpreter.heap().Reserve(text.size() + spaces);
      text.append(spaces, ' ');
      column += spaces;
    } else {
      text += c;
      if ((c & 0xC0) != 0x80) ++column;
      if (c == '\n' || c == '\r') column = 0;
    }
  }
  return Like(interpreter, self, std::move(text));
}

Value FormatMethod(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  return FormatBraces(interpreter, self, arguments);
}

Value FormatMap(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Values& given = Positional("format_map", arguments, 1, 1);
  Arguments named;
  if (!given[0].IsDict()) ThrowTypeError("format_map() needs a mapping");
  for (const auto& [key, value] : given[0].As<Dict>().entries()) {
    if (key.IsString()) named.named.emplace_back(key.text(), value);
  }
  return FormatBraces(interpreter, self, named);
}

Value Unsupported(Interpreter&, const Value&, Arguments&) {
  ThrowUnsupported("str.encode, str.translate and str.maketrans are not supported");
}

// By name.
constexpr Method kMethods[] = {{"capitalize", Map<Capitalize>},
                               {"casefold", Map<CaseFold>},
                               {"center", Justify<Place::kCenter>},
                               {"count", CountMethod},
                               {"encode", Unsupported},
                               {"endswith", StartsOrEndsWith<true>},
                               {"expandtabs", ExpandTabs},
                               {"find", Find<false>},
                               {"format", FormatMethod},
                               {"format_map", FormatMap},
                               {"index", Index<false>},
                               {"isalnum", Is<TextClass::kAlnum>},
                               {"isalpha", Is<TextClass::kAlpha>},
                               {"isascii", Is<TextClass::kAscii>},
                               {"isdecimal", Is<TextClass::kDecimal>},
                               {"isdigit", Is<TextClass::kDigit>},
                               {"isidentifier", Is<TextClass::kIdentifier>},
                               {"islower", Is<TextClass::kLower>},
                               {"isnumeric", Is<TextClass::kNumeric>},
                               {"isprintable", Is<TextClass::kPrintable>},
                               {"isspace", Is<TextClass::kSpace>},
                               {"istitle", Is<TextClass::kTitle>},
                               {"isupper", Is<TextClass::kUpper>},
                               {"join", Join},
                               {"ljust", Justify<Place::kLeft>},
                               {"lower", Map<Lower>},
                               {"lstrip", StripMethod<Side::kLeft>},
                               {"maketrans", Unsupported},
                               {"partition", Partition<false>},
                               {"removeprefix", RemoveAffix<false>},
                               {"removesuffix", RemoveAffix<true>},
                               {"replace", ReplaceMethod},
                               {"rfind", Find<true>},
                               {"rindex", Index<true>},
                               {"rjust", Justify<Place::kRight>},
                               {"rpartition", Partition<true>},
                               {"rsplit", SplitMethod<true>},
                               {"rstrip", StripMethod<Side::kRight>},
                               {"split", SplitMethod<false>},
                               {"splitlines", SplitLinesMethod},
                               {"startswith", StartsOrEndsWith<false>},
                               {"strip", StripMethod<Side::kBoth>},
                               {"swapcase", Map<SwapCase>},
                               {"title", Map<Title>},
                               {"translate", Unsupported},
                               {"upper", Map<Upper>},
                               {"zfill", ZeroFill}};

}  // namespace

const Method* FindStringMethod(std::string_view name) {
  const auto found = std::ranges::lower_bound(kMethods, name, {}, &Method::name);
  return found != std::end(kMethods) && found->name == name ? &*found : nullptr;
}

}  // namespace octavo::jinja
