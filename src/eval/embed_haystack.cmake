# embed_haystack(OUT): writes a source file that holds haystack.json as octavo::kHaystackGrammar, rewritten when the data
# changes, and puts its path into OUT. In pieces, because compilers limit the length of one string literal.
function(embed_haystack out)
  set(json ${PROJECT_SOURCE_DIR}/src/eval/haystack.json)
  set(source ${PROJECT_BINARY_DIR}/generated/haystack_grammar.cpp)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${json})
  file(READ ${json} text)
  string(LENGTH "${text}" length)
  set(pieces "")
  set(at 0)
  while(at LESS length)
    string(SUBSTRING "${text}" ${at} 8192 piece)
    string(APPEND pieces "R\"json(${piece})json\"\n")
    math(EXPR at "${at} + 8192")
  endwhile()
  file(CONFIGURE OUTPUT ${source} @ONLY CONTENT
"// Made from src/eval/haystack.json.
#include <string_view>
namespace octavo {
extern const std::string_view kHaystackGrammar;
const std::string_view kHaystackGrammar =
@pieces@;
}  // namespace octavo
")
  set(${out} ${source} PARENT_SCOPE)
endfunction()
