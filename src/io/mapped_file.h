// A whole regular file, mapped read-only. Symlinks are followed (the Hugging Face cache is made of
// them).
#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace octavo {

class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);  // throws Error, naming the path
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

 private:
  std::filesystem::path path_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Whether a folder has an entry of that name. A link that leads nowhere (a purged cache), or a
// folder that may not be read, counts as yes: whoever opens it then says what is wrong.
bool IsThere(const std::filesystem::path& path);

}  // namespace octavo
