// Checkpoint: the tensors of a folder of safetensors files, mapped read-only.
//
// Opens model.safetensors, or the shards that model.safetensors.index.json names (no name may leave
// the folder). Every header is checked before use: sizes, offsets, overlaps, holes, shapes, dtypes;
// index and shards must name the same tensors. Nothing is copied, but for tensors at a file offset
// that is no multiple of their element size. A Checkpoint must outlive its tensors; const use is
// thread-safe.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor.h"

namespace octavo {

class MappedFile;

// The name that a model's folder gives it: "a/b/" and "a/b" are b, "." is what it is called.
std::string FolderName(const std::filesystem::path& folder);

class Checkpoint {
 public:
  static Checkpoint Open(const std::filesystem::path& folder);
  static Checkpoint OpenFile(
      const std::filesystem::path& file);  // one safetensors file (a golden, a side-car)
  static Checkpoint Empty(const std::filesystem::path& folder);  // no tensors
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  const std::filesystem::path& path() const { return path_; }
  // In name order. Scalars have shape [1].
  const std::map<std::string, Tensor, std::less<>>& tensors() const { return tensors_; }
  const Tensor* Find(std::string_view name) const;  // null: not there
  // Where a tensor is; without such a tensor, path(). For messages.
  const std::filesystem::path& FileOf(std::string_view name) const;

 private:
  Checkpoint();
  std::vector<std::string> AddFile(const std::filesystem::path& file);  // the names it holds
  void AddShards(const std::filesystem::path& index_file);

  std::filesystem::path path_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<Buffer> aligned_copies_;
  std::map<std::string, Tensor, std::less<>> tensors_;
  std::map<std::string, const MappedFile*, std::less<>> holders_;
};

// The header of a safetensors file whose bytes these are, checked. Used by Checkpoint and by the
// fuzzer.
struct SafetensorsEntry {
  std::string name;
  Tensor tensor;  // a view into `bytes`, perhaps not aligned
};
std::vector<SafetensorsEntry> ParseSafetensors(std::string_view bytes, const std::string& source);

}  // namespace octavo
