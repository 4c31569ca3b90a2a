#include "text/jinja/template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <sstream>
#include <thread>

#include "base/error.h"
#include "text/jinja/python_text.h"

namespace octavo::jinja {
namespace {

using Json = nlohmann::ordered_json;
using testing::HasSubstr;

std::tm Noon() {
  std::tm time = {};
  time.tm_year = 2024 - 1900;
  time.tm_mon = 7 - 1;
  time.tm_mday = 26;
  time.tm_hour = 12;
  time.tm_wday = 5;
  time.tm_yday = 207;
  return time;
}

std::string Render(std::string_view source, const Json& variables = Json::object(),
                   const Limits& limits = {}) {
  return Template(source, "test", limits).Render(variables, Noon());
}

std::string ErrorOf(std::string_view source, const Json& variables = Json::object(),
                    const Limits& limits = {}) {
  try {
    return "no error but " + Render(source, variables, limits);
  } catch (const Error& error) {
    return error.message();
  }
}

// What a template must give. Each was rendered by Python's Jinja2 3.1.6 as transformers sets it up.
struct Case {
  const char* source;
  const char* expected;
};

void CheckAll(std::initializer_list<Case> cases, const Json& variables = Json::object()) {
  for (const Case& item : cases) {
    try {
      EXPECT_EQ(Render(item.source, variables), item.expected) << item.source;
    } catch (const Error& error) {
      ADD_FAILURE() << item.source << ": " << error.message();
    }
  }
}

TEST(TemplateTest, WhiteSpaceAroundTags) {
  CheckAll({{"a\n", "a"},
            {"a\n\n", "a\n"},
            {"a\r\nb\rc", "a\nb\nc"},
            {"  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"},
            {"  {{ 1 }}\n", "  1"},
            {"a {%- if true -%} b {%- endif %} c", "ab c"},
            {"  {%+ if true +%}\nx{% endif %}", "  \nx"},
            {"x {# c #}\ny", "x y"},
            {"x {#- c -#} \n y", "xy"},
            {"{% raw %}{{ a }}{% endraw %}", "{{ a }}"},
            {"{%- raw -%}  {% x %} {%- endraw -%}  z", "{% x %}z"},
            {"{{ '}}' }}{{ {'a': {'b': 1}} }}", "}}{'a': {'b': 1}}"},
            {"{ {# #} } {", "{  } {"}});
}

TEST(TemplateTest, Expressions) {
  CheckAll({{"{{ 1 + 2 * 3 ** 2 }}|{{ -2 ** 2 }}|{{ 7 // -2 }}|{{ -7 % 3 }}|{{ 7 / 2 }}",
             "19|4|-4|2|3.5"},
            {"{{ 2 ** 100 }}", "1267650600228229401496703205376"},
            {"{{ 1e16 }}|{{ 123456789.0 }}|{{ 1e-5 }}|{{ 0.1 + 0.2 }}|{{ -0.0 }}",
             "1e+16|123456789.0|1e-05|0.30000000000000004|-0.0"},
            {"{{ 1 < 2 < 3 }}{{ 3 > 2 > 2 }}{{ 1 == 1.0 == true }}", "TrueFalseTrue"},
            {"{{ 'a' 'b' ~ 1 ~ none }}", "ab1None"},
            {"{{ [1, 'a', none, 2.0, (1,), {'k': 'it\\'s'}] }}",
             "[1, 'a', None, 2.0, (1,), {'k': \"it's\"}]"},
            {"{{ 'x' if false }}|{{ 1 if [] else 2 if 0 else 3 }}", "|3"},
            {"{{ 'abc'[::-1] }}{{ [1, 2, 3][-2:] }}{{ (1, 2)[0] }}{{ 'abc'[5] }}", "cba[2, 3]1"},
            {"{{ 1 in [1, 2] and 'a' not in 'bcd' and 'k' in {'k': 1} }}", "True"},
            {"{{ {1: 'a', true: 'b', 1.0: 'c'} }}", "{1: 'c'}"},
            {"{{ '%s is %05.1f and %x' % ('pi', 3.14159, 255) }}", "pi is 003.1 and ff"},
            {"{{ '{0}-{a:>4}-{1!r}'.format(1, 'x', a=2) }}", "1-   2-'x'"},
            {"{{ '\\u00e9\\x41\\n'|length }}", "3"}});
}

TEST(TemplateTest, TextCountsCodePoints) {
  CheckAll({{"{{ s|length }}|{{ s[1] }}|{{ s[-2:] }}|{{ s|reverse }}|{{ s.find('😀') }}",
             "6|ß|😀Σ|Σ😀本日ßé|4"},
            {"{{ s.upper() }}|{{ s.lower() }}|{{ 'ΑΣ'.lower() }}|{{ 'ǆ'.title() }}",
             "ÉSS日本😀Σ|éß日本😀σ|ας|ǅ"},
            {"{{ s|list }}", "['é', 'ß', '日', '本', '😀', 'Σ']"},
            {"{{ '\\u2003x\\u00a0'.strip() }}|{{ ['\\u200b'] }}", "x|['\\u200b']"}},
           {{"s", "éß日本😀Σ"}});
}

TEST(TemplateTest, Scopes) {
  CheckAll(
      {{"{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = 9 %}{{ x }}{% endfor %}{{ x }}",
        "19191"},
       {"{% if true %}{% set x = 1 %}{% endif %}{{ x }}", "1"},
       {"{% if false %}{% set c = 1 %}{% endif %}{{ c }}", "context"},
       // A name that is set anywhere in a block hides the context's from the loops before it.
       {"{% for i in [1] %}[{{ c }}]{% endfor %}{% set c = 2 %}{{ c }}", "[]2"},
       {"{% macro m() %}{{ c }}{{ d }}{% endmacro %}{% set d = 5 %}{{ m() }}", "context5"},
       {"{% macro m(a, b=a) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}"
        "{{ m(1) }}|{{ m(1, 2, 3, k=4) }}",
        "11(){}|12(3,){'k': 4}"},
       {"{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}"
        "{% endfor %}{{ ns.n }}",
        "6"},
       {"{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}", "3"},
       {"{% set x %}a{{ 1 }}{% endset %}{{ x }}{% set y | upper %}b{% endset %}{{ y }}", "a1B"},
       {"{% filter upper | replace('A', 'x') %}abc{% endfilter %}", "xBC"},
       {"{% macro m(x) %}<{{ caller(x) }}>{% endmacro %}{% call(v) m(3) %}{{ v }}{% endcall %}",
        "<3>"},
       {"{% for i in [1] %}{% generation %}{% set i = 2 %}{{ i }}{% endgeneration %}{{ i }}"
        "{% endfor %}",
        "21"}},
      {{"c", "context"}});
}

TEST(TemplateTest, Loops) {
  CheckAll(
      {{"{% for x in 'ab' %}{{ loop.index }}/{{ loop.length }}{{ x }}{{ loop.last }} {% endfor %}",
        "1/2aFalse 2/2bTrue "},
       {"{% for x in [] %}{% else %}none{% endfor %}", "none"},
       // A body that never ran to its end counts as none.
       {"{% for x in [1] %}{% break %}{% else %}else{% endfor %}", "else"},
       {"{% for x in [1] %}{% continue %}{% else %}else{% endfor %}", "else"},
       {"{% for x in [1, 2] %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% else %}else{% "
        "endfor %}",
        "2"},
       {"{% for x in [1, 2, 3] if x != 2 %}{{ x }}{{ loop.nextitem }}|{% endfor %}", "13|3|"},
       {"{% for x in [1, 2, 3, 4] %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 4 %}"
        "{% break %}{% endif %}{{ x }}{% endfor %}",
        "13"},
       {"{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"},
       {"{% for x in [1, [2, [3]]] recursive %}{% if x is number %}{{ x }}@{{ loop.depth }}"
        "{% else %}({{ loop(x) }}){% endif %}{% endfor %}",
        "1@1(2@2(3@3))"},
       {"{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "TrueaFalsebTruea"}});
}

TEST(TemplateTest, Filters) {
  CheckAll(
      {{"{{ d|tojson }}", "{\"b\": 1, \"A\": [\"é\", null, 1.5, true], \"c\": {}}"},
       {"{{ d|tojson(indent=2) }}",
        "{\n  \"b\": 1,\n  \"A\": [\n    \"é\",\n    null,\n    1.5,\n    true\n  ],\n  \"c\": "
        "{}\n}"},
       {"{{ '</é>'|tojson(ensure_ascii=true) }}", "\"</\\u00e9>\""},
       {"{{ d|dictsort }}", "[('A', ['é', None, 1.5, True]), ('b', 1), ('c', {})]"},
       {"{{ [3, 1, 2]|sort(reverse=true)|join(', ') }}", "3, 2, 1"},
       {"{{ ['b', 'A']|sort }}{{ ['b', 'A', 'a']|unique|list }}", "['A', 'b']['b', 'A']"},
       {"{{ [{'a': 1}, {'a': 2}, {}]|map(attribute='a', default=0)|sum }}", "3"},
       {"{{ [1, 2, 3, 4]|select('even')|list }}{{ [0, 1]|reject|list }}", "[2, 4][0]"},
       {"{{ [{'r': 'u'}, {'r': 'a'}]|selectattr('r', 'equalto', 'a')|list }}", "[{'r': 'a'}]"},
       {"{{ x|default('d') }}{{ ''|d('e', true) }}{{ none|default(1) }}", "deNone"},
       {"{{ 'a\nb\n\nc'|indent }}", "a\n    b\n\n    c"},
       {"{{ 'hello big world'|truncate(9, leeway=0) }}|{{ 'hEllo wOrld'|title }}",
        "hello...|Hello World"},
       {"{{ '42'|int + '1.9'|int }}|{{ 'x'|int(7) }}|{{ 2.5|round }}|{{ 2.567|round(1) }}",
        "43|7|2.0|2.6"},
       {"{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}",
        "[[1, 2], [3, 0]][[1, 2], [3]]"},
       {"{{ [{'k': 1, 'v': 'a'}, {'k': 2, 'v': 'b'}, {'k': 1, 'v': 'c'}]|groupby('k')"
        "|map('last')|map('map', attribute='v')|map('join')|list }}",
        "['ac', 'b']"},
       {"{{ ('<' | safe) + '<' }}{{ '<' | e }}{{ ['<'|e] }}", "<&lt;&lt;[Markup('&lt;')]"},
       {"{{ ('-'|safe).join(['<', '>'|safe, 1]) }}", "&lt;->-1"},
       {"{{ 1024|filesizeformat }}|{{ 'a b'|urlencode }}|{{ 'a b c'|wordcount }}",
        "1.0 kB|a%20b|3"}},
      {{"d", {{"b", 1}, {"A", {"é", nullptr, 1.5, true}}, {"c", Json::object()}}}});
}

TEST(TemplateTest, Methods) {
  CheckAll({{"{{ ' a b '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a\nb'.splitlines() }}",
             "['a', 'b']['a', 'b,c']['a', 'b']"},
            {"{{ 'xxaxx'.strip('x') }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'aXa'.replace('a', 'b', "
             "1) }}",
             "aTruebXa"},
            {"{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.items()|list }}{{ {'a': 1}.keys() }}",
             "2[('a', 1)]dict_keys(['a'])"},
            // A method hides the key of its name from the dot, not from the brackets.
            {"{{ {'items': 1}['items'] }}{{ {'items': 1}.items is callable }}", "1True"},
            {"{{ 'a-b'.partition('-') }}{{ '7'.zfill(3) }}{{ 'x'.center(5, '*') }}",
             "('a', '-', 'b')007**x**"},
            {"{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"}});
}

// What chat templates use beside that; the published ones do, but they are not always at hand.
TEST(TemplateTest, TestsOperatorsAndFilters) {
  Json many;
  for (int i = 0; i < 12; ++i) many["k" + std::to_string(i)] = i;
  CheckAll(
      {{"{% for x in xs %}{{ loop.previtem if not loop.first else loop.previtem is defined }},{% "
        "endfor %}",
        "False,3,1,"},
       {"{{ 'ab' is lower }} {{ 'AB' is upper }} {{ 'Ab' is lower }} {{ '12' is upper }} {{ s is "
        "string }}",
        "True True False False True"},
       {"{{ xs is iterable }} {{ 5 is iterable }} {{ d is mapping }} {{ xs is mapping }} {{ none "
        "is none }}",
        "True False True False True"},
       {"{{ xs is sequence }} {{ nope is sequence }} {{ 5 is sequence }} {{ (1,) is sequence }}",
        "True True False True"},
       {"{{ true is boolean }} {{ 1 is boolean }} {{ true is true }} {{ 1 is true }} {{ false is "
        "false }} {{ 3 is integer }} {{ true is integer }}",
        "True False True False True True False"},
       {"{{ +3 }} {{ +1.5 }} {{ not xs }} {{ xs is not mapping }} {{ 0 or 'b' }} {{ 'a' or 'b' }} "
        "{{ 1 not in xs }}",
        "3 1.5 False True b a False"},
       {"{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(*xs[:2]) }} {{ m(*[7], **{'b': 8}) "
        "}}",
        "31 78"},
       {"{{ xs.0 }} {{ d.items() | list }} {{ many.k7 }} {{ many | length }}",
        "3 [('b', 1), ('a', [1, 2])] 7 12"},
       {"{% for (a, b), c in [((1, 2), 3)] %}{{ a + b + c }}{% endfor %}", "6"},
       {"{% set a, b = 1, 2 %}{{ a }}{{ b }}{% for k in d %}{{ k }};{% endfor %}", "12b;a;"},
       {"{% if x is defined %}1{% elif xs | length > 2 %}2{% else %}3{% endif %}", "2"},
       {"{{ nope }}|{{ nope | string }}|{{ 5 | string + '!' }}|{{ 1 in nope }}", "||5!|False"},
       {"{{ d | tojson(sort_keys=true) }} {{ '\"\\\\\\n\\t\\u0001\\x7f' | tojson }} {{ 'é😀' | "
        "tojson(ensure_ascii=true) }}",
        "{\"a\": [1, 2], \"b\": 1} \"\\\"\\\\\\n\\t\\u0001\177\" \"\\u00e9\\ud83d\\ude00\""},
       {"{{ d | tojson(separators=(',', ':')) }} {{ d | tojson(indent=1) }}",
        "{\"b\":1,\"a\":[1,2]} {\n \"b\": 1,\n \"a\": [\n  1,\n  2\n ]\n}"},
       {"{{ 7.5 // 2 }} {{ -7.5 // 2 }} {{ 7 // -2 }} {{ 0.0 // 5 }} {{ 7 - 10 }} {{ 2 <= 2 }} {{ "
        "2 >= 3 }} {{ 'a' <= 'b' }}",
        "3.0 -4.0 -4 0.0 -3 True False True"},
       {"{{ {'a': 1} == {'a': 1} }} {{ {'a': 1} == {'a': 2} }} {{ {'a': 1} == {'b': 1} }} {{ {'a': "
        "1} != {} }}",
        "True False False True"},
       {"{{ s | capitalize }} {{ s | lower }} {{ s.title() }} {{ s.upper() }} {{ s.capitalize() }}",
        "Hello wörld hello wörld Hello Wörld HELLO WÖRLD Hello wörld"},
       {"{{ -3 | abs }} {{ (-3) | abs }} {{ (-2.5) | abs }} {{ '3.7' | float }} {{ 'x' | float }} "
        "{{ 'x' | float(1.5) }} {{ 3 | float }} {{ 3.9 | int }} {{ '12' | int }} {{ 'x' | int(9) "
        "}}",
        "3 3 2.5 3.7 0.0 1.5 3.0 3 12 9"},
       {"{{ [{'a': 2, 'b': 1}, {'a': 1, 'b': 2}] | sort(attribute='a,b') | map(attribute='b') | "
        "list }}",
        "[2, 1]"},
       {"{{ d | items | list }} {{ nope | items | list }}", "[('b', 1), ('a', [1, 2])] []"},
       {"{{ 'aé'.replace('', '-') }} {{ 'aa'.replace('', '-', 2) }} {{ ['a', nope, [nope]] }}",
        "-a-é- -a-a ['a', Undefined, [Undefined]]"},
       {"{{ 'a\\u0301b'.title() }} {{ [none, true, nope] }} {{ 'x' ~ none ~ 1.0 }}",
        "A\u0301B [None, True, Undefined] xNone1.0"}},
      {{"d", {{"b", 1}, {"a", {1, 2}}}}, {"s", "hElLo wÖrld"}, {"xs", {3, 1, 2}}, {"many", many}});
  for (const Case& item : std::initializer_list<Case>{
           {"{{ 1 in 5 }}", "TypeError: argument of type 'int' is not iterable"},
           {"{{ 1 + 'a' }}", "TypeError: unsupported operand type(s) for +: 'int' and 'str'"},
           {"{{ 5 | length }}", "TypeError: object of type 'int' has no len()"},
           {"{{ 5 | items | list }}", "TypeError: Can only get item pairs from a mapping."},
           {"{{ 'a'.count(x=1) }}", "TypeError: str.count() takes no keyword arguments"},
           {"{{ nope + 1 }}", "UndefinedError: 'nope' is undefined"},
           {"{{ nope | float }}", "UndefinedError: 'nope' is undefined"},
           {"{{ 1.0 // 0 }}", "ZeroDivisionError: float floor division by zero"},
           {"{{ xs | tojson | tojson + 1 }}",
            "TypeError: can only concatenate str (not \"int\") to str"},
           {"{{ (xs | map('string')) | tojson }}",
            "TypeError: Object of type generator is not JSON serializable"},
           {"{{ 'a' - xs }}", "TypeError: unsupported operand type(s) for -: 'str' and 'list'"},
           {"{{ none.x.y }}", "UndefinedError: 'None' has no attribute 'x'"}}) {
    EXPECT_THAT(ErrorOf(item.source, {{"xs", {3, 1, 2}}}), testing::EndsWith(item.expected))
        << item.source;
  }
}

TEST(TemplateTest, ErrorsArePythons) {
  const std::pair<const char*, const char*> kCases[] = {
      {"a\n{{ 'a' + 1 }}", "test:2: TypeError: can only concatenate str (not \"int\") to str"},
      {"{{ x.y }}", "test:1: UndefinedError: 'x' is undefined"},
      {"{{ [].x.y }}", "test:1: UndefinedError: 'list object' has no attribute 'x'"},
      {"{{ raise_exception('no\nway') }}", "test:1: TemplateError: no\\nway"},
      {"{{ 1 // 0 }}", "test:1: ZeroDivisionError: integer division or modulo by zero"},
      {"{{ [].append(1) }}",
       "test:1: SecurityError: access to attribute 'append' of 'list' object is unsafe."},
      {"{{ ''.__class__.__mro__ }}",
       "test:1: SecurityError: access to attribute '__class__' of 'str' object is unsafe."},
      {"{{ 1|nope }}", "test:1: TemplateAssertionError: No filter named 'nope'."},
      {"{% if x",
       "test:1: TemplateSyntaxError: unexpected end of template, expected 'end of "
       "statement block'."},
      {"{% for %}",
       "test:1: TemplateSyntaxError: Expected an expression, got 'end of statement "
       "block'"},
      {"\n{% wat %}", "test:2: TemplateSyntaxError: Encountered unknown tag 'wat'."},
      {"{% if 1 %}",
       "test:1: TemplateSyntaxError: Unexpected end of template. Jinja was looking "
       "for the following tags: 'elif' or 'else' or 'endif'. The innermost block "
       "that needs to be closed is 'if'."},
      {"{% break %}", "test:1: TemplateSyntaxError: 'break' outside loop"},
      {"{{ {[]: 1} }}", "test:1: TypeError: unhashable type: 'list'"},
      {"{% set x, y = [1] %}",
       "test:1: ValueError: not enough values to unpack (expected 2, got 1)"},
      {"{{ range(100001) }}",
       "test:1: OverflowError: Range too big. The sandbox blocks ranges "
       "larger than MAX_RANGE (100000)."}};
  for (const auto& [source, expected] : kCases) EXPECT_EQ(ErrorOf(source), expected) << source;
}

TEST(TemplateTest, WhatIsNotThereSaysSo) {
  EXPECT_EQ(ErrorOf("{% include 'x' %}"),
            "test:1: TemplateSyntaxError: the tag 'include' is not supported");
  EXPECT_THAT(ErrorOf("{{ lipsum() }}"), HasSubstr("unsupported: the function lipsum"));
  EXPECT_THAT(ErrorOf("{{ 'x'|urlize }}"), HasSubstr("unsupported: a filter"));
}

std::string Repeat(std::string_view text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

TEST(TemplateLimitsTest, DepthOfTheSource) {
  const int many = 200'000;
  for (const std::string& source :
       {"{{ " + Repeat("(", many), "{{ " + Repeat("[", many), "{{ " + Repeat("{1:", many),
        "{{ " + Repeat("-", many) + "1 }}", "{{ " + Repeat("not ", many) + "1 }}",
        "{{ a" + Repeat("[0]", many) + " }}", "{{ a" + Repeat("|e", many) + " }}",
        "{{ a" + Repeat("+a", many) + " }}", "{{ a" + Repeat("()", many) + " }}",
        "{{ a" + Repeat(" if a else a", many / 4) + " }}",
        "{{ a" + Repeat(" is a a", many / 8) + " }}", Repeat("{% if a %}", many / 4),
        Repeat("{% for a in a %}", many / 4), Repeat("{% macro a() %}", many / 4)}) {
    EXPECT_THAT(ErrorOf(source),
                testing::AnyOf(HasSubstr("nested deeper"), HasSubstr("You cannot chain")))
        << source.substr(0, 20);
  }
  EXPECT_EQ(Render("{{ 0" + Repeat("+1", 400) + " }}"), "400");
  EXPECT_EQ(Render("{{ " + Repeat("(", 90) + "1" + Repeat(")", 90) + " }}"), "1");
}

TEST(TemplateLimitsTest, SizeOfTheSource) {
  EXPECT_THAT(ErrorOf(Repeat("x", 2 << 20)), HasSubstr("a template of 2097152 bytes"));
  EXPECT_THAT(ErrorOf("\xff"), HasSubstr("expected UTF-8"));
}

TEST(TemplateLimitsTest, DepthOfEvaluation) {
  EXPECT_THAT(ErrorOf("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
              HasSubstr("maximum recursion depth"));
  EXPECT_THAT(ErrorOf("{% macro m() %}{% if 1 %}{% if 1 %}{% for x in [1] %}{{ [(m())|trim] }}"
                      "{% endfor %}{% endif %}{% endif %}{% endmacro %}{{ m() }}"),
              HasSubstr("maximum recursion depth"));
  EXPECT_THAT(ErrorOf("{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}"),
              HasSubstr("maximum recursion depth"));
  // Iterators that draw from each other.
  EXPECT_THAT(ErrorOf("{% set ns = namespace(i=[1]) %}{% for x in range(1000) %}"
                      "{% set ns.i = ns.i|map('abs') %}{% endfor %}{{ ns.i|list }}"),
              HasSubstr("nested deeper"));
}

TEST(TemplateLimitsTest, DepthAndSizeOfValues) {
  EXPECT_THAT(ErrorOf("{% set ns = namespace(x=[]) %}{% for i in range(1000) %}"
                      "{% set ns.x = [ns.x] %}{% endfor %}"),
              HasSubstr("values nested deeper than 500"));
  const std::string doubled =
      "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
      "{% endfor %}";
  EXPECT_THAT(ErrorOf(doubled), HasSubstr("a value of more than"));
  EXPECT_THAT(ErrorOf("{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns }}"),
              HasSubstr("maximum recursion depth"));
  // Many namespaces, each in the next.
  EXPECT_EQ(Render("{% set ns = namespace(x=none) %}{% for i in range(100000) %}"
                   "{% set t = namespace(x=ns.x) %}{% set ns.x = t %}{% endfor %}done"),
            "done");
}

TEST(TemplateLimitsTest, Memory) {
  const Limits limits = {.max_live_bytes = 64 << 20, .max_output_bytes = 32 << 20};
  for (const char* source :
       {"{{ 'a' * 10**9 }}", "{{ [0] * 10**12 }}", "{{ 'a'.center(10**15) }}",
        "{{ 'a'.ljust(2**62, 'é') }}", "{{ '1'.zfill(10**12) }}", "{{ 'a\n'|indent(10**12) }}",
        "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}", "{{ [1]|batch(10**12, 0)|list }}",
        "{{ [1]|slice(10**12)|list }}", "{{ ('a' * 10**6).join('b' * 10**6) }}",
        "{{ (['a' * 10**6] * 10**3) | join }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(10**5) %}"
        "{% set ns.l = ns.l + ['a' * 10**6] %}{% endfor %}",
        "{% for i in range(10**5) %}{{ 'a' * 10**5 }}{% endfor %}",
        // Text that waits within the calls of a macro for the innermost to end.
        "{% macro m() %}{{ 'a' * 10**6 }}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ '%0999999999d' % 1 }}", "{{ '{:999999999}'.format(1) }}",
        "{{ 1|round(10**9) ~ '%.999999999f' % 1 }}"}) {
    EXPECT_THAT(ErrorOf(source, Json::object(), limits),
                testing::AnyOf(HasSubstr(" bytes"), HasSubstr("a width or precision of more")))
        << source;
  }
}

TEST(TemplateLimitsTest, Work) {
  const Limits limits = {.max_work = 10'000'000};
  for (const char* source :
       {"{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% set s = 'a' * 10**6 %}{% for i in range(10**5) %}{{ s.find('b') }}{% endfor %}",
        "{% set l = range(10**5)|list %}{% for i in l %}{{ -1 in l }}{% endfor %}",
        "{% set l = range(10**5)|list %}{% for i in l %}{{ l == l + [] }}{% endfor %}"}) {
    EXPECT_THAT(ErrorOf(source, Json::object(), limits), HasSubstr("did not finish within"))
        << source;
  }
}

TEST(PythonTextTest, SearchesAsTheStandardLibraryDoes) {
  std::mt19937 random(5);
  const auto text_of = [&](size_t most) {
    std::string text;
    for (size_t n = random() % (most + 1); n > 0; --n)
      text += static_cast<char>('a' + random() % 2);
    return text;
  };
  for (int round = 0; round < 20000; ++round) {
    const std::string text = text_of(30), part = text_of(5);
    const size_t from = random() % 32;
    EXPECT_EQ(Find(text, part, from), text.find(part, from)) << text << " " << part << " " << from;
    EXPECT_EQ(FindFromRight(text, part), text.rfind(part)) << text << " " << part;
    if (part.empty()) continue;
    const auto most = static_cast<int64_t>(random() % 5) - 1;
    std::vector<std::string_view> expected;
    std::string_view rest = text;
    for (size_t at; std::ssize(expected) != most && (at = rest.rfind(part)) != rest.npos;) {
      expected.insert(expected.begin(), rest.substr(at + part.size()));
      rest = rest.substr(0, at);
    }
    expected.insert(expected.begin(), rest);
    EXPECT_EQ(SplitFromRight(text, part, most), expected) << text << " " << part << " " << most;
  }
}

TEST(TemplateLimitsTest, NobodyWaitsAnyMore) {
  const Template endless(
      "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "t",
      {.max_work = uint64_t{1} << 60});
  std::atomic<bool> abandoned = false;
  std::thread other([&] { abandoned = true; });
  try {
    endless.Render(nlohmann::ordered_json::object(), LocalTime(), &abandoned);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_NE(error.message().find("nobody waits"), std::string::npos) << error.message();
  }
  other.join();
}

TEST(TemplateLimitsTest, IntegersAndWidths) {
  EXPECT_THAT(ErrorOf("{{ 2 ** 200 }}"), HasSubstr("an integer of more than 128 bits"));
  EXPECT_THAT(ErrorOf("{{ 99999999999999999999 ** 2 * 10 }}"), HasSubstr("128 bits"));
  EXPECT_EQ(Render("{{ x }}{{ x + 1 }}", {{"x", 18446744073709551615u}}),
            "1844674407370955161518446744073709551616");
}

// Values that come to hold themselves must not outlive the rendering: leak checkers see it.
TEST(TemplateTest, CyclesAreFreed) {
  CheckAll({{"{% set ns = namespace() %}{% set ns.self = ns %}{% set ns.l = [ns, [ns]] %}x", "x"},
            {"{% set ns = namespace(u=0) %}{% set ns.u = [ns]|map(attribute='u')|batch(2) %}"
             "{{ ns.u|list|length }}",
             "1"},
            {"{% set ns = namespace(l=0) %}{% for x in [ns, ns]|map(attribute='l') %}"
             "{% set ns.l = loop %}{% set y = loop.changed(loop) %}{% endfor %}x",
             "x"},
            {"{% set ns = namespace() %}{% macro m() %}{% endmacro %}{% set ns.m = m %}x", "x"}});
}

TEST(TemplateTest, ManyThreadsMayRender) {
  const Template shared("{% for x in xs %}{{ 'item ' ~ x }}{{ undefined_name }};{% endfor %}", "t");
  std::vector<std::thread> threads;
  std::vector<std::string> texts(4);
  for (std::string& text : texts) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) text = shared.Render({{"xs", {1, 2, 3}}}, Noon());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : texts) EXPECT_EQ(text, "item 1;item 2;item 3;");
}

// The published language cases, from ../shared/templates (or $OCTAVO_SHARED/templates).
TEST(TemplateTest, PublishedLanguageCases) {
  const char* shared = std::getenv("OCTAVO_SHARED");
  std::filesystem::path path = shared ? shared : OCTAVO_SOURCE_DIR "/../shared";
  if (!shared && !std::filesystem::exists(path)) path = OCTAVO_SOURCE_DIR "/../../shared";
  path = path / "templates" / "hf_jinja_language_conformance.json";
  if (!std::filesystem::exists(path)) {
    std::cout << "SKIPPED: " << path.string() << " not found" << std::endl;
    GTEST_SKIP() << path.string() << " not found";
  }
  std::ifstream file(path);
  const Json cases = Json::parse(file);
  EXPECT_EQ(cases.size(), 161u);
  int checked = 0;
  for (const auto& [name, item] : cases.items()) {
    if (item.contains("note")) continue;  // a context of JavaScript functions
    const std::string source = item["template"];
    if (item["expected_python"].is_null()) {
      EXPECT_THAT(ErrorOf(source, item["context"]),
                  testing::EndsWith(item["python_error"].get<std::string>()))
          << name;
    } else {
      EXPECT_EQ(Render(source, item["context"]), item["expected_python"]) << name;
    }
    ++checked;
  }
  EXPECT_EQ(checked, 157);
}

}  // namespace
}  // namespace octavo::jinja
