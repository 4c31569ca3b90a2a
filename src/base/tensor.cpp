#include "base/tensor.h"

#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "base/error.h"

namespace octavo {
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}  // namespace

Tensor::Tensor(const void* data, DType dtype, std::initializer_list<int64_t> dims)
    : data(const_cast<void*>(data)), dtype(dtype), rank(static_cast<int>(dims.size())) {
  OCTAVO_CHECK(dims.size() <= shape.size(), dims.size());
  int i = 0;
  for (int64_t dim : dims) shape[i++] = dim;
  row_stride = columns();
}

int64_t Tensor::rows() const {
  int64_t rows = rank == 0 ? 0 : 1;
  for (int i = 0; i + 1 < rank; ++i) rows *= shape[i];
  return rows;
}

Tensor Tensor::Rows(int64_t begin, int64_t end) const {
  OCTAVO_CHECK(rank == 2 && 0 <= begin && begin <= end && end <= shape[0], rank, begin, end,
               shape[0]);
  Tensor out = *this;
  out.data =
      static_cast<std::byte*>(data) + begin * row_stride * static_cast<int64_t>(SizeOf(dtype));
  out.shape[0] = end - begin;
  return out;
}

Tensor Tensor::Columns(int64_t begin, int64_t end) const {
  OCTAVO_CHECK(rank == 2 && 0 <= begin && begin <= end && end <= shape[1], rank, begin, end,
               shape[1]);
  Tensor out = *this;
  out.data = static_cast<std::byte*>(data) + begin * static_cast<int64_t>(SizeOf(dtype));
  out.shape[1] = end - begin;
  return out;
}

std::string ShapeString(const Tensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "] " + Name(tensor.dtype);
}

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  // Huge pages: a cache of gigabytes is read at random page by page, and TLB misses would cost more
  // than the reads.
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded)));
  if (!data_) throw std::bad_alloc();
#ifdef __linux__
  if (bytes >= kHugePage) {
    madvise(data_.get(), rounded, MADV_HUGEPAGE);  // a hint: works without
    // Fresh anonymous memory reads as zero without being touched; recycled heap memory would not.
    if (madvise(data_.get(), rounded, MADV_DONTNEED) == 0) return;
  }
#endif
  std::memset(data_.get(), 0, rounded);
}

}  // namespace octavo
