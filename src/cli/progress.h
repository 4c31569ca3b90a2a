// A bar on stderr, where that is a terminal.
#pragma once

#include <functional>
#include <string>

namespace octavo::cli {

// To be called with how many of how many are done.
std::function<void(int done, int all)> ProgressBar(const std::string& what);

}  // namespace octavo::cli
