#include "cuda_oracle.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda_memory.h"

namespace octavo::conformance {
namespace {

constexpr int kThreads = 256;

__device__ double Decode(KvFormat format, const std::byte* base, int64_t index) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(base);
  switch (format) {
    case KvFormat::kF16:
      return __half2float(reinterpret_cast<const __half*>(base)[index]);
    case KvFormat::kBF16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(base)[index]);
    case KvFormat::kFp8E5M2:
      return __half2float(__half(__nv_cvt_fp8_to_halfraw(bytes[index], __NV_E5M2)));
    case KvFormat::kInt8PerTokenHead:
      return reinterpret_cast<const int8_t*>(base)[index];
    default:
      return __half2float(__half(__nv_cvt_fp8_to_halfraw(bytes[index], __NV_E4M3)));
  }
}

struct DeviceArgs {
  OracleArgs args;
  int64_t head_bytes, v_offset, k_scales, v_scales;  // KvLayout's, which the device cannot ask
  bool k_dynamic, v_dynamic, k_static, v_static, v_8bit;
};

// The block's largest, and sum, of a value per thread.
__device__ double BlockReduce(double x, bool max, double* shared) {
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      const double other = shared[threadIdx.x + step];
      shared[threadIdx.x] = max ? fmax(shared[threadIdx.x], other) : shared[threadIdx.x] + other;
    }
    __syncthreads();
  }
  x = shared[0];
  __syncthreads();
  return x;
}

// A block per query row and head; kThreads keys at a time, with the usual running maximum.
__global__ void oracle_kernel(const DeviceArgs device) {
  const OracleArgs& args = device.args;
  __shared__ double q[256], p[kThreads], shared[kThreads];
  const int dim = args.shape.head_dim, heads = args.shape.heads;
  const int row = static_cast<int>(blockIdx.x) / heads, head = static_cast<int>(blockIdx.x) % heads;
  const int kv_head = head / (heads / args.shape.kv_heads);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t q_row = int64_t{row} * heads + head;
  if (thread < dim) {
    const bool fp8 = args.fp8_queries != nullptr && args.fp8_queries[row] != 0;
    q[thread] =
        fp8 ? Decode(KvFormat::kFp8E4M3, static_cast<const std::byte*>(args.q_fp8),
                     q_row * dim + thread) *
                  args.q_scale[q_row]
            : Decode(KvFormat::kBF16, static_cast<const std::byte*>(args.q), q_row * dim + thread);
  }
  __syncthreads();
  const int position = args.row_position[row], window = args.shape.window;
  const int begin = window > 0 ? max(0, position - window + 1) : 0;
  const uint32_t* pages =
      args.block_table.entries + args.row_sequence[row] * args.block_table.stride;
  const KvFormat k_format = args.cache.layout.k_format, v_format = args.cache.layout.v_format;
  auto head_of = [&](int key) {
    return args.cache.arena + int64_t{pages[key / kPageSize]} * kPageUnit +
           args.cache.claim_offset + kv_head * device.head_bytes;
  };
  auto scale_of = [&](const std::byte* stored, int64_t scales, int key) {
    return reinterpret_cast<const float*>(stored + scales)[key % kPageSize];
  };

  double largest = -INFINITY, sum = 0;
  if (args.sinks != nullptr) {
    largest = args.sinks[head];
    sum = thread == 0 ? 1 : 0;
  }
  const int groups = kThreads / dim, group = thread / dim, d = thread % dim;
  double out = 0;
  for (int tile = begin; tile <= position; tile += kThreads) {
    const int key = tile + thread;
    double s = -INFINITY;
    if (key <= position) {
      const std::byte* k = head_of(key);
      const double k_scale = device.k_static    ? args.cache.k_scale[kv_head]
                             : device.k_dynamic ? scale_of(k, device.k_scales, key)
                                                : 1.0;
      s = 0;
      for (int i = 0; i < dim; ++i)
        s += q[i] * (k_scale * Decode(k_format, k, int64_t{key % kPageSize} * dim + i));
      s *= args.scale;
      if (args.soft_cap > 0) s = args.soft_cap * tanh(s / args.soft_cap);
    }
    const double new_largest = fmax(largest, BlockReduce(s, true, shared));
    const double correction = largest == new_largest ? 1 : exp(largest - new_largest);
    largest = new_largest;
    p[thread] = key <= position ? exp(s - largest) : 0;
    sum = sum * correction + p[thread];
    out *= correction;
    __syncthreads();
    for (int n = group; n < kThreads && tile + n <= position; n += groups) {
      const std::byte* stored = head_of(tile + n);
      const int token = (tile + n) % kPageSize, in16 = token % 16;
      const int place =
          device.v_8bit ? token - in16 + 4 * (in16 % 8 / 2) + 2 * (in16 / 8) + in16 % 2 : token;
      const double v_scale = device.v_static    ? args.cache.v_scale[kv_head]
                             : device.v_dynamic ? scale_of(stored, device.v_scales, tile + n)
                                                : 1.0;
      out += p[n] *
             (v_scale * Decode(v_format, stored + device.v_offset, int64_t{d} * kPageSize + place));
    }
    __syncthreads();
  }
  sum = BlockReduce(sum, false, shared);
  shared[thread] = out;
  __syncthreads();
  if (group == 0) {
    for (int other = 1; other < groups; ++other) out += shared[other * dim + d];
    args.out[q_row * dim + d] = position < begin ? 0 : out / sum;
  }
  if (thread == 0) args.lse[q_row] = largest + log(sum);
}

__device__ uint64_t Mix(uint64_t z) {  // splitmix64
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

__global__ void normal_kernel(__nv_bfloat16* to, int64_t count, uint64_t seed, int64_t first,
                              float mean, float deviation) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const uint64_t bits = Mix(Mix(seed) + first + i);
    const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;
    const float v = static_cast<float>(bits & 0xFFFFFF) * 0x1p-24f;
    to[i] = __float2bfloat16(mean + deviation * sqrtf(-2 * logf(u)) * cospif(2 * v));
  }
}

bool IsStatic(KvFormat format) {
  return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
}

}  // namespace

void OracleAttention(const OracleArgs& args) {
  const KvLayout& layout = args.cache.layout;
  const DeviceArgs device{.args = args,
                          .head_bytes = layout.HeadBytes(),
                          .v_offset = layout.VOffset(0),
                          .k_scales = layout.KScaleOffset(0),
                          .v_scales = layout.VScaleOffset(0),
                          .k_dynamic = HasTokenScales(layout.k_format),
                          .v_dynamic = HasTokenScales(layout.v_format),
                          .k_static = IsStatic(layout.k_format),
                          .v_static = IsStatic(layout.v_format),
                          .v_8bit = ElementSize(layout.v_format) == 1};
  if (args.rows == 0) return;
  oracle_kernel<<<args.rows * args.shape.heads, kThreads>>>(device);
  OCTAVO_CUDA(cudaGetLastError());
}

void FillNormal(void* to, int64_t count, uint64_t seed, int64_t first, float mean,
                float deviation) {
  normal_kernel<<<1024, 256>>>(static_cast<__nv_bfloat16*>(to), count, seed, first, mean,
                               deviation);
  OCTAVO_CUDA(cudaGetLastError());
}

}  // namespace octavo::conformance
