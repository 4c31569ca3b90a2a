// How CUDA work is measured here: rows of work that state their bytes and FLOPs, captured as graphs
// over several sets of buffers (together larger than four times L2, filled with random numbers),
// and replayed in turn, so that rows of a group see the same machine. Times are medians of replays,
// per call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "octavo/kv_layout.h"

namespace octavo::bench {

#define BENCH_CUDA(call)                                                               \
  do {                                                                                 \
    if (const cudaError_t error = (call); error != cudaSuccess)                        \
      throw std::runtime_error(std::string(#call) + ": " + cudaGetErrorString(error)); \
  } while (false)

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(int64_t bytes) {
    BENCH_CUDA(cudaMalloc(&data_, static_cast<size_t>(bytes)));
  }
  template <class T>
  explicit DeviceMemory(const std::vector<T>& host)
      : DeviceMemory(static_cast<int64_t>(host.size() * sizeof(T))) {
    BENCH_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceMemory() { cudaFree(data_); }
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// Fills memory with normally distributed elements of a storage type, divided by `scale`.
enum class Element { kF32, kF16, kBF16, kE4M3, kE5M2, kI8 };
Element ElementOf(KvFormat format);
void FillNormal(void* to, Element element, int64_t count, float scale, uint64_t seed);
// Sets `count` floats; sets `count` floats at `offset` of every page.
void FillFloats(float* to, float value, int64_t count);
void FillScales(std::byte* pages, int64_t page_count, int64_t page_bytes, int64_t offset, int count,
                float value);

// Bytes per second that the machine reads, from a buffer much larger than L2, and those it copies
// (read and written).
struct Bandwidth {
  double read = 0, copy = 0;
};
Bandwidth MeasureBandwidth();

struct Row {
  std::string group, name;
  std::string format;  // or whatever tells rows of the same name apart
  double bytes = 0;    // each input read once, each output written once
  double flops = 0;
  int sets = 1;                                     // of buffers
  std::function<void(int set, void* stream)> call;  // one call on one set
  std::function<void()> before = [] {};             // outside the graph, on the default stream

  double seconds = 0;  // measured
  double spread = 0;   // (75th - 25th percentile) / median
};

// Measures rows in turn.
void Measure(std::vector<Row>& rows, double seconds_per_row);

void PrintRow(const Row& row, const Bandwidth& bandwidth);
void WriteJson(const std::string& path, const std::string& device, const Bandwidth& bandwidth,
               const std::vector<Row>& rows);

}  // namespace octavo::bench
