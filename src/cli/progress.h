// A bar on stderr, where that is a terminal.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace octavo::cli {

// To be called with how many of how many are done.
std::function<void(int done, int all)> ProgressBar(const std::string& what);

// The same for EngineOptions::load_progress.
std::function<void(int64_t done, int64_t all)> LoadProgressBar();

}  // namespace octavo::cli
