// The key that a caller must show: "Authorization: Bearer KEY" or, since a browser that is given an
// address shows no header, /?key=KEY.
#pragma once

#include <string_view>

namespace octavo {

// Take a time that depends on the length of what is shown only. An empty key lets everybody in.
bool IsAuthorized(std::string_view header, std::string_view key);
// `query`: of the target, percent-encoded.
bool IsAuthorizedByQuery(std::string_view query, std::string_view key);

}  // namespace octavo
