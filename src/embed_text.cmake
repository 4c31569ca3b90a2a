# embed_text(OUT FILE NAME): writes a source file that holds FILE as the std::string_view octavo::NAME, rewritten when
# FILE changes, and puts its path into OUT. In pieces, because compilers limit the length of one string literal.
function(embed_text out file name)
  set(source ${PROJECT_BINARY_DIR}/generated/${name}.cpp)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/${file})
  file(READ ${PROJECT_SOURCE_DIR}/${file} text)
  string(LENGTH "${text}" length)
  set(pieces "")
  set(at 0)
  while(at LESS length)
    string(SUBSTRING "${text}" ${at} 8192 piece)
    string(APPEND pieces "R\"text(${piece})text\"\n")
    math(EXPR at "${at} + 8192")
  endwhile()
  file(CONFIGURE OUTPUT ${source} @ONLY CONTENT
"// Made from @file@.
#include <string_view>
namespace octavo {
extern const std::string_view @name@;
const std::string_view @name@ =
@pieces@;
}  // namespace octavo
")
  set(${out} ${source} PARENT_SCOPE)
endfunction()
