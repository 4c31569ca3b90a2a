#include "eval/html.h"

#include <fmt/format.h>

namespace octavo {
namespace {

constexpr const char* kStyle = R"(
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { font-weight: 600; } th:first-child, td.name { text-align: left; } td.name { font-family: ui-monospace, monospace; }
.maps { display: flex; flex-wrap: wrap; gap: 2rem; } figure { margin: 0; }
figcaption { font-family: ui-monospace, monospace; margin-bottom: .4rem; }
table.heat td { border: 1px solid #fff; text-align: center; min-width: 3.2rem; }
table.dense { font-size: .8rem; } table.dense th, table.heat.dense td { padding: .1rem .3rem; min-width: 1.6rem; }
)";

}  // namespace

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string HtmlPage(std::string_view title, std::string_view body) {
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" "
      "content=\"width=device-width\">\n<title>{0} - "
      "Octavo</title>\n<style>{1}</style></head>\n<body>\n<h1>{0}</h1>\n{2}"
      "</body></html>\n",
      EscapeHtml(title), kStyle, body);
}

}  // namespace octavo
