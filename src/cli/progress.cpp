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

std::function<void(int64_t, int64_t)> LoadProgressBar() {
  const auto bar = ProgressBar("MiB of weights");
  if (!bar) return nullptr;
  return [bar](int64_t done, int64_t all) {
    const int64_t mib = (all >> 20) + 1;
    bar(static_cast<int>(done * mib / all), static_cast<int>(mib));
  };
}

}  // namespace octavo::cli
