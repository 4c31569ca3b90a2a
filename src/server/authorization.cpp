#include "server/authorization.h"

#include <cstddef>

namespace octavo {

bool IsAuthorized(std::string_view header, std::string_view key) {
  if (key.empty()) return true;
  constexpr std::string_view kScheme = "Bearer ";
  if (!header.starts_with(kScheme)) return false;
  header.remove_prefix(kScheme.size());
  volatile unsigned difference = header.size() == key.size() ? 0 : 1;  // volatile: no early way out
  for (size_t i = 0; i < header.size(); ++i) {
    const auto shown = static_cast<unsigned char>(header[i]);
    difference = difference | (shown ^ static_cast<unsigned char>(key[i % key.size()]));
  }
  return difference == 0;
}

}  // namespace octavo
