// Results a user asked to have written.
#pragma once

#include <string>

namespace octavo::cli {

// Opened before the work, so that a path that cannot be written costs a line and not the results. A
// file that was not there is there only once something is in it. Empty path: no file.
class OutputFile {
 public:
  explicit OutputFile(std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  explicit operator bool() const { return !path_.empty(); }
  const std::string& path() const { return path_; }
  void Write(const std::string& text);

 private:
  std::string path_;
  bool placeholder_ = false;  // ours, and empty
};

}  // namespace octavo::cli
