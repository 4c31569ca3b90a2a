// What the CUDA conformance programs share: guarded device memory, checked CUDA calls and the count
// of what failed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace octavo::conformance {

#define OCTAVO_CUDA(call)                                                \
  do {                                                                   \
    if (const cudaError_t error = (call); error != cudaSuccess) {        \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(error));                           \
      std::exit(3);                                                      \
    }                                                                    \
  } while (false)

// Device memory that starts as 0xFF, with a margin on both sides that must stay so.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    OCTAVO_CUDA(cudaMalloc(&memory_, bytes + 2 * kMargin));
    OCTAVO_CUDA(cudaMemset(memory_, 0xFF, bytes + 2 * kMargin));
  }
  DeviceBuffer(const void* host, size_t bytes) : DeviceBuffer(bytes) { Upload(host); }
  template <class T>
  explicit DeviceBuffer(const std::vector<T>& host)
      : DeviceBuffer(host.data(), host.size() * sizeof(T)) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : bytes_(other.bytes_), memory_(std::exchange(other.memory_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(memory_); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(memory_ + kMargin);
  }
  size_t size() const { return bytes_; }
  void Upload(const void* host) const {
    OCTAVO_CUDA(cudaMemcpy(memory_ + kMargin, host, bytes_, cudaMemcpyHostToDevice));
  }
  template <class T = std::byte>
  std::vector<T> Download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    OCTAVO_CUDA(cudaMemcpy(host.data(), memory_ + kMargin, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  bool intact() const {
    std::vector<unsigned char> margins(2 * kMargin);
    OCTAVO_CUDA(cudaMemcpy(margins.data(), memory_, kMargin, cudaMemcpyDeviceToHost));
    OCTAVO_CUDA(cudaMemcpy(margins.data() + kMargin, memory_ + kMargin + bytes_, kMargin,
                           cudaMemcpyDeviceToHost));
    return std::all_of(margins.begin(), margins.end(), [](unsigned char b) { return b == 0xFF; });
  }

 private:
  static constexpr size_t kMargin = 1024;
  size_t bytes_ = 0;
  std::byte* memory_ = nullptr;
};

// One line per failure, a few per check.
class Tally {
 public:
  void Passed() { ++run_; }
  void Failed(const std::string& name, const std::string& what) {
    ++run_;
    ++failed_;
    std::printf("FAILED %s: %s\n", name.c_str(), what.c_str());
  }
  void Count(const std::string& name, const std::string& failure) {
    failure.empty() ? Passed() : Failed(name, failure);
  }
  int run() const { return run_; }
  int failed() const { return failed_; }

 private:
  int run_ = 0, failed_ = 0;
};

void CheckAppend(bool quick, Tally& tally);
void CheckAttention(bool quick, Tally& tally);
void CheckAccuracy(bool quick, Tally& tally);
void CheckAccumulator(bool quick, Tally& tally);
void CheckOps(bool quick, Tally& tally);

}  // namespace octavo::conformance
