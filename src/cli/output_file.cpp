#include "cli/output_file.h"

#include <fstream>

#include <fmt/core.h>

#include "base/error.h"

namespace octavo::cli {

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  if (!path_.empty() && !std::ofstream(path_, std::ios::app)) Write("");
}

void OutputFile::Write(const std::string& text) const {
  std::ofstream file(path_, std::ios::binary);
  if (!(file << text).flush())
    throw Error(ErrorCode::kInvalidArgument, fmt::format("cannot write {}", path_));
}

}  // namespace octavo::cli
