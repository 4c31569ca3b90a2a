#include "measure.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <memory>

#include "kernels/cuda/bandwidth.h"

namespace octavo::bench {
namespace {

__device__ uint64_t Mix(uint64_t z) {  // splitmix64
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

__global__ void fill_normal_kernel(void* to, Element element, int64_t count, float scale,
                                   uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const uint64_t bits = Mix(Mix(seed) + i);
    const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;
    const float v = static_cast<float>(bits & 0xFFFFFF) * 0x1p-24f;
    const float x = sqrtf(-2 * logf(u)) * cospif(2 * v) / scale;
    switch (element) {
      case Element::kF32:
        static_cast<float*>(to)[i] = x;
        break;
      case Element::kF16:
        static_cast<__half*>(to)[i] = __float2half(x);
        break;
      case Element::kBF16:
        static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(x);
        break;
      case Element::kE4M3:
        static_cast<uint8_t*>(to)[i] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
        break;
      case Element::kE5M2:
        static_cast<uint8_t*>(to)[i] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
        break;
      case Element::kI8:
        static_cast<int8_t*>(to)[i] = static_cast<int8_t>(fmaxf(-127, fminf(127, rintf(x))));
        break;
    }
  }
}

__global__ void fill_floats_kernel(float* to, float value, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step)
    to[i] = value;
}

__global__ void fill_scales_kernel(std::byte* scales, int64_t page_bytes, int count, float value) {
  auto* to = reinterpret_cast<float*>(scales + blockIdx.x * page_bytes);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
    to[i] = value;
}

double Median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

class Timer {
 public:
  Timer() {
    BENCH_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    BENCH_CUDA(cudaEventCreate(&begin_));
    BENCH_CUDA(cudaEventCreate(&end_));
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream);
  }
  Timer(const Timer&) = delete;
  template <class Work>
  double Seconds(const Work& work) {
    BENCH_CUDA(cudaEventRecord(begin_, stream));
    work();
    BENCH_CUDA(cudaEventRecord(end_, stream));
    BENCH_CUDA(cudaEventSynchronize(end_));
    float ms = 0;
    BENCH_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
    return ms * 1e-3;
  }
  cudaStream_t stream = nullptr;

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

struct Graph {
  Graph(const Row& row, int calls, Timer& timer) {
    cudaGraph_t graph;
    BENCH_CUDA(cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) row.call(i % row.sets, timer.stream);
    BENCH_CUDA(cudaStreamEndCapture(timer.stream, &graph));
    BENCH_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    BENCH_CUDA(cudaGraphDestroy(graph));
  }
  ~Graph() { cudaGraphExecDestroy(exec); }
  Graph(const Graph&) = delete;
  cudaGraphExec_t exec = nullptr;
};

}  // namespace

Element ElementOf(KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return Element::kF32;
    case KvFormat::kF16:
      return Element::kF16;
    case KvFormat::kBF16:
      return Element::kBF16;
    case KvFormat::kFp8E5M2:
      return Element::kE5M2;
    case KvFormat::kInt8PerTokenHead:
      return Element::kI8;
    default:
      return Element::kE4M3;
  }
}

void FillNormal(void* to, Element element, int64_t count, float scale, uint64_t seed) {
  fill_normal_kernel<<<2048, 256>>>(to, element, count, scale, seed);
  BENCH_CUDA(cudaGetLastError());
}

void FillFloats(float* to, float value, int64_t count) {
  fill_floats_kernel<<<256, 256>>>(to, value, count);
  BENCH_CUDA(cudaGetLastError());
}

void FillScales(std::byte* pages, int64_t page_count, int64_t page_bytes, int64_t offset, int count,
                float value) {
  fill_scales_kernel<<<static_cast<int>(page_count), 256>>>(pages + offset, page_bytes, count,
                                                            value);
  BENCH_CUDA(cudaGetLastError());
}

Bandwidth MeasureBandwidth() {
  const int64_t bytes = int64_t{4} << 30;
  const DeviceMemory from(bytes), to(bytes);
  FillNormal(from.as(), Element::kF32, bytes / 4, 1, 1);
  BENCH_CUDA(cudaDeviceSynchronize());
  Timer timer;
  std::vector<double> copy;
  for (int i = 0; i < 9; ++i) {
    copy.push_back(timer.Seconds([&] {
      BENCH_CUDA(
          cudaMemcpyAsync(to.as(), from.as(), bytes, cudaMemcpyDeviceToDevice, timer.stream));
    }));
  }
  return {.read = cuda::ReadBandwidth(), .copy = 2 * bytes / Median(copy)};
}

void Measure(std::vector<Row>& rows, double seconds_per_row) {
  Timer timer;
  std::vector<std::unique_ptr<Graph>> graphs;
  std::vector<int> calls;
  std::vector<std::vector<double>> times(rows.size());
  for (Row& row : rows) {
    row.before();
    for (int set = 0; set < row.sets; ++set) row.call(set, timer.stream);
    const double once = timer.Seconds([&] { row.call(0, timer.stream); });
    // Enough calls that a replay takes a while, so that its start does not count.
    const int least = once < 50e-6 ? static_cast<int>(400e-6 / once) + 1 : 1;
    calls.push_back((least + row.sets - 1) / row.sets * row.sets);
    graphs.push_back(std::make_unique<Graph>(row, calls.back(), timer));
  }
  double spent = 0;
  for (int repeat = 0; repeat < 5 || (repeat < 100 && spent < seconds_per_row * rows.size());
       ++repeat) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const double seconds =
          timer.Seconds([&] { BENCH_CUDA(cudaGraphLaunch(graphs[i]->exec, timer.stream)); });
      spent += seconds;
      if (repeat > 0) times[i].push_back(seconds / calls[i]);  // the first warms up
    }
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    const size_t n = times[i].size();
    rows[i].seconds = times[i][n / 2];
    rows[i].spread = (times[i][3 * n / 4] - times[i][n / 4]) / rows[i].seconds;
  }
}

void PrintRow(const Row& row, const Bandwidth& bandwidth) {
  std::printf("%-8s %-40s %-28s %9.1f us", row.group.c_str(), row.name.c_str(), row.format.c_str(),
              row.seconds * 1e6);
  if (row.flops > 0) std::printf(" %7.0f TFLOP/s", row.flops / row.seconds * 1e-12);
  std::printf(" %7.0f GB/s %5.1f %% of read\n", row.bytes / row.seconds * 1e-9,
              row.bytes / row.seconds / bandwidth.read * 100);
}

void WriteJson(const std::string& path, const std::string& device, const Bandwidth& bandwidth,
               const std::vector<Row>& rows) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (file == nullptr) throw std::runtime_error("cannot write " + path);
  std::fprintf(file, "{\"device\": \"%s\", \"read_bandwidth\": %.4g, \"copy_bandwidth\": %.4g,\n",
               device.c_str(), bandwidth.read, bandwidth.copy);
  std::fprintf(file, " \"rows\": [");
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    std::fprintf(file,
                 "%s\n  {\"group\": \"%s\", \"name\": \"%s\", \"format\": \"%s\", \"us\": %.3f, "
                 "\"spread\": %.4f, \"bytes\": %.0f, \"flops\": %.0f}",
                 i == 0 ? "" : ",", row.group.c_str(), row.name.c_str(), row.format.c_str(),
                 row.seconds * 1e6, row.spread, row.bytes, row.flops);
  }
  std::fprintf(file, "\n]}\n");
  if (std::fclose(file) != 0) throw std::runtime_error("cannot write " + path);
}

}  // namespace octavo::bench
