// The key that a caller must show: "Authorization: Bearer KEY".
#pragma once

#include <string_view>

namespace octavo {

// Takes a time that depends on the length of `header` only. An empty key lets everybody in.
bool IsAuthorized(std::string_view header, std::string_view key);

}  // namespace octavo
