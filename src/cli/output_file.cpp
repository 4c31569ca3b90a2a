#include "cli/output_file.h"

#include <filesystem>
#include <fstream>

#include <fmt/core.h>

#include "base/error.h"

namespace octavo::cli {

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  if (path_.empty()) return;
  std::error_code ignored;
  placeholder_ = !std::filesystem::exists(path_, ignored);
  if (!std::ofstream(path_, std::ios::app)) Write("");
}

OutputFile::~OutputFile() {
  std::error_code ignored;
  if (placeholder_ && std::filesystem::is_empty(path_, ignored))
    std::filesystem::remove(path_, ignored);
}

void OutputFile::Write(const std::string& text) {
  placeholder_ = false;
  std::ofstream file(path_, std::ios::binary);
  if (!(file << text).flush())
    throw Error(ErrorCode::kInvalidArgument, fmt::format("cannot write {}", path_));
}

}  // namespace octavo::cli
