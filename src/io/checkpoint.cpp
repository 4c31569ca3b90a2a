#include "io/checkpoint.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include <fmt/format.h>

#include "base/error.h"
#include "io/json.h"
#include "io/mapped_file.h"

namespace octavo {
namespace {

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little,
              "tensors are used as they lie in the file");

constexpr size_t kLengthBytes = 8;
// Far above any real model's (DeepSeek-sized ones stay below 20 MB).
constexpr uint64_t kMaxHeaderBytes = 64 << 20;

[[noreturn]] void Fail(const std::string& source, const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, fmt::format("{}: {}", source, what));
}

struct Range {
  uint64_t begin, end;
};

// A tensor's header entry: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}.
class EntryReader {
 public:
  EntryReader(const std::string& source, const std::string& name, const Json& json)
      : source_(source), name_(name), json_(json) {
    if (!json.is_object()) Fail("", "an object", json);
    for (const auto& [key, value] : json.items()) {
      if (key != "dtype" && key != "shape" && key != "data_offsets") {
        FailEntry(fmt::format("unknown field {}", Quote(key)));
      }
    }
  }

  // Without data.
  Tensor ReadTensor() const {
    const Json& tag = Field("dtype");
    if (!tag.is_string()) Fail("dtype", "a string", tag);
    const auto dtype = DTypeFromSafetensors(tag.get_ref<const std::string&>());
    if (!dtype) {
      throw Error(ErrorCode::kUnsupported, fmt::format("{}: tensor {}: dtype {} is not supported",
                                                       source_, Quote(name_), Describe(tag)));
    }
    const Json& dims = Field("shape");
    Tensor tensor;
    if (!dims.is_array()) Fail("shape", "an array", dims);
    if (dims.size() > tensor.shape.size()) {
      Fail("shape", fmt::format("at most {} dimensions", tensor.shape.size()), dims);
    }
    tensor.dtype = *dtype;
    tensor.rank = std::max<int>(1, static_cast<int>(dims.size()));
    tensor.shape[0] = 1;
    int64_t bytes = static_cast<int64_t>(SizeOf(*dtype));
    for (size_t i = 0; i < dims.size(); ++i) {
      tensor.shape[i] = static_cast<int64_t>(Unsigned("shape", dims[i], INT64_MAX));
      if (__builtin_mul_overflow(bytes, tensor.shape[i], &bytes)) {
        Fail("shape", "fewer elements", dims);
      }
    }
    tensor.row_stride = tensor.columns();
    return tensor;
  }

  Range ReadRange(const Tensor& tensor, uint64_t data_bytes) const {
    const Json& offsets = Field("data_offsets");
    if (!offsets.is_array() || offsets.size() != 2) Fail("data_offsets", "two integers", offsets);
    const Range range{Unsigned("data_offsets", offsets[0], data_bytes),
                      Unsigned("data_offsets", offsets[1], data_bytes)};
    const uint64_t expected = static_cast<uint64_t>(tensor.size()) * SizeOf(tensor.dtype);
    if (range.end < range.begin || range.end - range.begin != expected) {
      FailEntry(fmt::format("data_offsets: expected {} bytes for {}, found [{}, {}]", expected,
                            ShapeString(tensor), range.begin, range.end));
    }
    return range;
  }

 private:
  const Json& Field(const char* key) const {
    const auto it = json_.find(key);
    if (it == json_.end()) FailEntry(fmt::format("{} is missing", key));
    return *it;
  }

  uint64_t Unsigned(const char* key, const Json& value, uint64_t most) const {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > most) {
      Fail(key, fmt::format("integers from 0 to {}", most), value);
    }
    return value.get<uint64_t>();
  }

  [[noreturn]] void Fail(const char* key, const std::string& expected, const Json& found) const {
    FailEntry(
        fmt::format("{}{}expected {}, found {}", key, *key ? ": " : "", expected, Describe(found)));
  }
  [[noreturn]] void FailEntry(const std::string& what) const {
    octavo::Fail(source_, fmt::format("tensor {}: {}", Quote(name_), what));
  }

  const std::string& source_;
  const std::string& name_;
  const Json& json_;
};

}  // namespace

std::vector<SafetensorsEntry> ParseSafetensors(std::string_view bytes, const std::string& source) {
  if (bytes.size() < kLengthBytes) {
    Fail(source,
         fmt::format("not a safetensors file: {} bytes, expected at least 8", bytes.size()));
  }
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  const std::string_view rest = bytes.substr(kLengthBytes);
  if (header_bytes > kMaxHeaderBytes) {
    Fail(source, fmt::format("safetensors header of {} bytes, at most {} are read", header_bytes,
                             kMaxHeaderBytes));
  }
  if (header_bytes > rest.size()) {
    Fail(source, fmt::format("truncated: safetensors header of {} bytes in a file of {}",
                             header_bytes, bytes.size()));
  }
  const Json header = ParseJson(rest.substr(0, header_bytes), source + " (safetensors header)",
                                {.max_bytes = kMaxHeaderBytes, .max_depth = 4});
  if (!header.is_object()) {
    Fail(source, fmt::format("safetensors header: expected an object, found {}", Describe(header)));
  }
  const std::string_view data = rest.substr(header_bytes);

  std::vector<SafetensorsEntry> entries;
  std::vector<std::pair<Range, size_t>> ranges;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      const bool strings =
          value.is_object() &&
          std::all_of(value.begin(), value.end(), [](const Json& v) { return v.is_string(); });
      if (!strings) Fail(source, "safetensors header: __metadata__: expected an object of strings");
      continue;
    }
    const EntryReader reader(source, name, value);
    Tensor tensor = reader.ReadTensor();
    const Range range = reader.ReadRange(tensor, data.size());
    tensor.data = const_cast<char*>(data.data() + range.begin);
    ranges.emplace_back(range, entries.size());
    entries.push_back({name, tensor});
  }

  // The data must be covered exactly: no overlap, no hole, nothing behind the last tensor.
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first.begin, a.first.end) < std::pair(b.first.begin, b.first.end);
  });
  uint64_t end = 0;
  for (const auto& [range, index] : ranges) {
    if (range.begin != end) {
      Fail(source,
           fmt::format(
               "tensor {}: data_offsets: expected to begin at {}, where the tensor before it ends, "
               "found {}: {}",
               Quote(entries[index].name), end, range.begin,
               range.begin < end ? "they overlap" : "a hole"));
    }
    end = range.end;
  }
  if (end != data.size()) {
    Fail(source, fmt::format("expected {} bytes of tensor data, found {}", end, data.size()));
  }
  return entries;
}

Checkpoint::Checkpoint() = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

std::string FolderName(const fs::path& folder) {
  const fs::path path = fs::absolute(folder).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

Checkpoint Checkpoint::Open(const fs::path& folder) {
  Checkpoint checkpoint;
  checkpoint.path_ = folder;
  if (IsThere(folder / "model.safetensors")) {
    checkpoint.AddFile(folder / "model.safetensors");
  } else if (IsThere(folder / "model.safetensors.index.json")) {
    checkpoint.AddShards(folder / "model.safetensors.index.json");
  } else {
    throw Error(
        ErrorCode::kNotFound,
        fmt::format("{}: neither model.safetensors nor model.safetensors.index.json is there",
                    folder.string()));
  }
  return checkpoint;
}

Checkpoint Checkpoint::Empty(const std::filesystem::path& folder) {
  Checkpoint checkpoint;
  checkpoint.path_ = folder;
  return checkpoint;
}

Checkpoint Checkpoint::OpenFile(const fs::path& file) {
  Checkpoint checkpoint;
  checkpoint.path_ = file;
  checkpoint.AddFile(file);
  return checkpoint;
}

const Tensor* Checkpoint::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const fs::path& Checkpoint::FileOf(std::string_view name) const {
  const auto it = holders_.find(name);
  return it == holders_.end() ? path_ : it->second->path();
}

std::vector<std::string> Checkpoint::AddFile(const fs::path& path) {
  files_.push_back(std::make_unique<MappedFile>(path));
  std::vector<std::string> names;
  for (SafetensorsEntry& entry : ParseSafetensors(files_.back()->bytes(), path.string())) {
    Tensor& tensor = entry.tensor;
    if (reinterpret_cast<uintptr_t>(tensor.data) % SizeOf(tensor.dtype) != 0) {
      const size_t bytes = static_cast<size_t>(tensor.size()) * SizeOf(tensor.dtype);
      Buffer& copy = aligned_copies_.emplace_back(std::max<size_t>(bytes, 1));
      std::memcpy(copy.data(), tensor.data, bytes);
      tensor.data = copy.data();
    }
    if (!tensors_.emplace(entry.name, tensor).second) {
      Fail(path.string(), fmt::format("tensor {}: also in another shard", Quote(entry.name)));
    }
    holders_.emplace(entry.name, files_.back().get());
    names.push_back(std::move(entry.name));
  }
  return names;
}

void Checkpoint::AddShards(const fs::path& index_file) {
  const std::string source = index_file.string();
  const Json index = ReadJsonFile(index_file);
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (map == index.end() || !map->is_object() || map->empty()) {
    Fail(source, "weight_map: expected an object of tensor names and file names");
  }
  std::map<std::string, std::vector<std::string>>
      shards;  // file name -> tensors the index says are in it
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string()) {
      Fail(source, fmt::format("weight_map: {}: expected a file name, found {}", Quote(tensor),
                               Describe(file)));
    }
    const std::string& name = file.get_ref<const std::string&>();
    if (name.find_first_of(std::string_view("/\\\0", 3)) != name.npos ||
        !name.ends_with(".safetensors")) {
      Fail(source,
           fmt::format(
               "weight_map: {}: expected the name of a .safetensors file in this folder, found {}",
               Quote(tensor), Quote(name)));
    }
    shards[name].push_back(tensor);
  }
  for (auto& [file, expected] : shards) {
    const fs::path path = index_file.parent_path() / file;
    std::vector<std::string> found = AddFile(path);
    std::sort(found.begin(), found.end());
    std::sort(expected.begin(), expected.end());
    const auto [a, b] = std::mismatch(expected.begin(), expected.end(), found.begin(), found.end());
    if (a != expected.end() && (b == found.end() || *a < *b)) {
      Fail(source, fmt::format("weight_map: tensor {} is not in {}", Quote(*a), Quote(file)));
    }
    if (b != found.end()) {
      Fail(path.string(), fmt::format("tensor {} is not in weight_map of {}", Quote(*b),
                                      index_file.filename().string()));
    }
  }
}

}  // namespace octavo
