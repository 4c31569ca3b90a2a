// Tensor: a view of typed elements in someone else's memory, up to four dimensions, rows may be
// strided. Buffer: owns aligned host memory. Both are cheap to move; a Tensor never owns.
//
// The last dimension is contiguous; `row_stride` is the distance in elements between consecutive
// indices of all the dimensions before it taken together (so a Tensor is a matrix [rows, columns]
// with a name for its shape).
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>

#include "base/dtype.h"

namespace octavo {

struct Tensor {
  void* data = nullptr;  // null: no tensor
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<int64_t, 4> shape{};
  int64_t row_stride = 0;

  Tensor() = default;
  Tensor(const void* data, DType dtype, std::initializer_list<int64_t> dims);

  explicit operator bool() const { return data != nullptr; }
  int64_t columns() const { return rank == 0 ? 0 : shape[rank - 1]; }
  int64_t rows() const;
  int64_t size() const { return rows() * columns(); }
  bool contiguous() const { return row_stride == columns() || rows() <= 1; }

  template <class T>
  T* Row(int64_t row) const {
    return static_cast<T*>(data) + row * row_stride;
  }

  // Rows [begin, end) of a matrix; columns [begin, end) of a matrix. Both share the memory.
  Tensor Rows(int64_t begin, int64_t end) const;
  Tensor Columns(int64_t begin, int64_t end) const;
};

std::string ShapeString(const Tensor& tensor);  // "[12, 256] bfloat16"

// Zeroed host memory, aligned for any vector. Large buffers get their pages when first touched.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);

  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

}  // namespace octavo
