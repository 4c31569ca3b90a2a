// Reports are single files: style inside, no scripts, no external requests.
#pragma once

#include <string>
#include <string_view>

namespace octavo {

std::string EscapeHtml(std::string_view text);
std::string HtmlPage(std::string_view title, std::string_view body);

}  // namespace octavo
