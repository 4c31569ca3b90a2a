// Results a user asked to have written.
#pragma once

#include <string>

namespace octavo::cli {

// Opened before the work, so that a path that cannot be written costs a line and not the results.
// Empty path: no file.
class OutputFile {
 public:
  explicit OutputFile(std::string path);
  explicit operator bool() const { return !path_.empty(); }
  const std::string& path() const { return path_; }
  void Write(const std::string& text) const;

 private:
  std::string path_;
};

}  // namespace octavo::cli
