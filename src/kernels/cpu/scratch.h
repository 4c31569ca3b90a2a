// Memory that an op keeps between calls, so that a steady state allocates nothing: grown, never
// shrunk. Contents mean nothing between calls.
#pragma once

#include "base/tensor.h"

namespace octavo::cpu {

class Scratch {
 public:
  template <class T>
  T* Get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (buffer_.size() < bytes) {
      buffer_ = Buffer();  // the old one first: both need not exist at once
      buffer_ = Buffer(bytes + bytes / 4);
    }
    return reinterpret_cast<T*>(buffer_.data());
  }

 private:
  Buffer buffer_;
};

}  // namespace octavo::cpu
