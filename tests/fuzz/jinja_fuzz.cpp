// Any bytes as a chat template: it parses and renders to UTF-8, or throws Error, within its limits.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "text/jinja/template.h"
#include "text/unicode.h"

namespace {

using Json = nlohmann::ordered_json;
using octavo::Error;
using octavo::jinja::Limits;
using octavo::jinja::Template;

constexpr std::string_view kContext = R"({
  "messages": [{"role": "user", "content": "Hi \u00e9\ud83d\ude00\n there"},
               {"role": "assistant", "content": null, "tool_calls": [
                   {"function": {"name": "f", "arguments": {"a": [1, 2.5, true]}}}]}],
  "tools": [{"name": "f"}], "x": 3, "y": -2.5, "s": "<text>", "l": [3, 1, 2],
  "bos_token": "<s>", "add_generation_prompt": true})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Json context = Json::parse(kContext);
  constexpr Limits kLimits = {
      .max_work = 200'000, .max_live_bytes = size_t{16} << 20, .max_output_bytes = size_t{1} << 20};
  const std::string_view source(reinterpret_cast<const char*>(data), size);
  const std::tm now = {.tm_mday = 1, .tm_year = 124};
  try {
    const Template parsed(source, "fuzz", kLimits);
    const std::string text = parsed.Render(context, now);
    if (octavo::ValidUtf8Length(text) != text.size()) __builtin_trap();
  } catch (const Error&) {
  }
  return 0;
}
