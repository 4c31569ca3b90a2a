#include "cli/progress.h"

#include <unistd.h>

#include <fmt/core.h>

namespace octavo::cli {

std::function<void(int, int)> ProgressBar(const std::string& what) {
  if (!isatty(STDERR_FILENO)) return nullptr;
  return [what](int done, int all) {
    constexpr int kWidth = 40;
    const int filled = kWidth * done / all;
    fmt::print(stderr, "\r[{:#>{}}{:.>{}}] {}/{} {}{}", "", filled, "", kWidth - filled, done, all,
               what, done == all ? "\n" : "");
  };
}

}  // namespace octavo::cli
