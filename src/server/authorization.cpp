#include "server/authorization.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstddef>
#include <string>

namespace octavo {
namespace {

bool IsKey(std::string_view shown, std::string_view key) {
  volatile unsigned difference = shown.size() == key.size() ? 0 : 1;  // volatile: no early way out
  for (size_t i = 0; i < shown.size(); ++i) {
    const auto byte = static_cast<unsigned char>(shown[i]);
    difference = difference | (byte ^ static_cast<unsigned char>(key[i % key.size()]));
  }
  return difference == 0;
}

// A '+' is itself, as in decodeURIComponent, by which the page reads its own address.
std::string PercentDecoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    unsigned byte = 0;
    const char* const digits = text.data() + i + 1;
    if (text[i] == '%' && i + 2 < text.size() &&
        std::from_chars(digits, digits + 2, byte, 16).ptr == digits + 2) {
      out += static_cast<char>(byte);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

}  // namespace

bool IsAuthorized(std::string_view header, std::string_view key) {
  if (key.empty()) return true;
  constexpr std::string_view kScheme = "bearer ";
  const std::string_view scheme = header.substr(0, kScheme.size());
  const bool is_bearer =
      std::equal(scheme.begin(), scheme.end(), kScheme.begin(), kScheme.end(),
                 [](char a, char b) { return std::tolower(static_cast<unsigned char>(a)) == b; });
  return is_bearer && IsKey(header.substr(kScheme.size()), key);
}

bool IsAuthorizedByQuery(std::string_view query, std::string_view key) {
  if (key.empty()) return true;
  constexpr std::string_view kField = "key=";
  while (!query.empty()) {
    const size_t end = std::min(query.find('&'), query.size());
    const std::string_view field = query.substr(0, end);
    if (field.starts_with(kField)) return IsKey(PercentDecoded(field.substr(kField.size())), key);
    query.remove_prefix(std::min(end + 1, query.size()));
  }
  return false;
}

}  // namespace octavo
