// Append: one launch. Blocks are dealt out by tiles of consecutive tokens. Of a tile, each of the
// first kv_heads blocks stores the values of one head: quantised into shared memory token by token,
// then out again as rows of V, 16 bytes at a time where the tokens fill them. The tile's other
// blocks rotate queries and keys: a warp takes some heads of one token, so that cosines and norm
// weights are read once.
//
// 8k tokens of 32 + 8 heads of 128 from bfloat16 into FP8: 101 MB in, 84 MB out, 50 million
// elements; at 4.6 TB/s that leaves some 20 instructions per element.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/append_heads.cuh"
#include "kernels/cuda/append_values.cuh"
#include "kernels/cuda/launch.cuh"
#include "octavo/attention.h"

namespace octavo::cuda {
namespace {

template <int kHeadDim, class Input>
__global__ __launch_bounds__(kAppendThreads, sizeof(Input) == 2 ? 5 : 4) void append_kernel(
    const __grid_constant__ AppendParams p) {
  extern __shared__ __align__(16) std::byte staged[];
  const int tile_begin = static_cast<int>(blockIdx.y) * p.tile;
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.kv_heads) {
    if (Is16Bit(p.v_format)) {
      AppendValues<kHeadDim, Input, true>(p, tile_begin, block, staged);
    } else {
      AppendValues<kHeadDim, Input, false>(p, tile_begin, block, staged);
    }
  } else {
    const int unit = (block - p.kv_heads) * kAppendWarps + static_cast<int>(threadIdx.x / 32);
    AppendQueriesAndKeys<kHeadDim, Input>(p, tile_begin, unit, reinterpret_cast<float*>(staged));
  }
}

[[noreturn]] void Refuse(const char* argument, const std::string& expected,
                         const std::string& found) {
  throw std::invalid_argument(std::string("Append: ") + argument + ": expected " + expected +
                              ", found " + found);
}
void Require(bool condition, const char* argument, const char* expected, int64_t found) {
  if (!condition) Refuse(argument, expected, std::to_string(found));
}
void RequirePointer(const void* p, const char* argument) {
  if (p == nullptr) Refuse(argument, "a device pointer", "null");
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) Refuse(argument, "16-byte alignment", "less");
}
bool HasStaticScale(KvFormat format) {
  return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
}

void Check(const AppendCall& call) {
  const KvLayout& layout = call.cache.layout;
  const int d = layout.head_dim;
  Require(call.tokens >= 0, "tokens", "0 or more", call.tokens);
  Require(d == 64 || d == 128 || d == 256, "cache.layout.head_dim", "64, 128 or 256", d);
  Require(layout.kv_heads > 0, "cache.layout.kv_heads", "1 or more", layout.kv_heads);
  Require(call.heads > 0, "heads", "1 or more", call.heads);
  for (KvFormat format : {layout.k_format, layout.v_format}) {
    if (format == KvFormat::kF32) Refuse("cache.layout", "8- or 16-bit formats", Name(format));
  }
  Require(call.rotary_dim >= 0 && call.rotary_dim <= d && call.rotary_dim % 16 == 0, "rotary_dim",
          "a multiple of 16 up to head_dim", call.rotary_dim);
  const int per_vector = call.input == AppendCall::Input::kBF16 ? 8 : 4;
  const char* const expected = "a multiple of 16 bytes";
  Require(call.q_stride % per_vector == 0, "q_stride", expected, call.q_stride);
  Require(call.k_stride % per_vector == 0, "k_stride", expected, call.k_stride);
  Require(call.v_stride % per_vector == 0, "v_stride", expected, call.v_stride);
  RequirePointer(call.q, "q");
  RequirePointer(call.k, "k");
  RequirePointer(call.v, "v");
  RequirePointer(call.q_out, "q_out");
  RequirePointer(call.cache.arena, "cache.arena");
  if (call.slots == nullptr) Refuse("slots", "a device pointer", "null");
  if (call.q_norm != nullptr) RequirePointer(call.q_norm, "q_norm");
  if (call.k_norm != nullptr) RequirePointer(call.k_norm, "k_norm");
  if (call.cos_sin != nullptr) RequirePointer(call.cos_sin, "cos_sin");
  if (HasStaticScale(layout.k_format) && call.cache.k_scale == nullptr)
    Refuse("cache.k_scale", "[kv_heads] scales", "null");
  if (HasStaticScale(layout.v_format) && call.cache.v_scale == nullptr)
    Refuse("cache.v_scale", "[kv_heads] scales", "null");
  if (call.fp8_queries != nullptr) {
    RequirePointer(call.q_fp8, "q_fp8");
    if (call.q_scale == nullptr) Refuse("q_scale", "a device pointer", "null");
  }
}

template <int kHeadDim, class Input>
void Launch(AppendParams p, cudaStream_t stream) {
  constexpr int kHeads = 32 / (kHeadDim / 16);
  const auto ceil_div = [](int a, int b) { return (a + b - 1) / b; };
  const int steps = ceil_div(p.heads, kHeads) + ceil_div(p.kv_heads, kHeads);
  // Few tokens need every warp; of many, whole pages of V and long runs of loads matter.
  p.tile = p.tokens >= 2048 ? 64 : p.tokens >= 512 ? 16 : p.tokens >= 128 ? 8 : 2;
  p.shares = p.tokens >= 2048 ? 1 : steps;
  const dim3 grid(p.kv_heads + ceil_div(p.tile * p.shares, kAppendWarps),
                  ceil_div(p.tokens, p.tile));
  const int staged = std::max(p.tile * kHeadDim * ElementSize(p.v_format) + 128,
                              2 * kHeadDim * int{sizeof(float)});
  cuda::Launch(append_kernel<kHeadDim, Input>, grid, kAppendThreads, staged, stream, p);
}

template <class Input>
void LaunchFor(int head_dim, const AppendParams& p, cudaStream_t stream) {
  if (head_dim == 64) return Launch<64, Input>(p, stream);
  if (head_dim == 128) return Launch<128, Input>(p, stream);
  Launch<256, Input>(p, stream);
}

}  // namespace

void Append(const AppendCall& call, Stream stream) {
  Check(call);
  if (call.tokens == 0) return;
  const KvLayer& cache = call.cache;
  const KvLayout& layout = cache.layout;
  const AppendParams p{
      .tokens = call.tokens,
      .heads = call.heads,
      .kv_heads = layout.kv_heads,
      .q = call.q,
      .k = call.k,
      .v = call.v,
      .q_stride = call.q_stride,
      .k_stride = call.k_stride,
      .v_stride = call.v_stride,
      .q_norm = static_cast<const __nv_bfloat16*>(call.q_norm),
      .k_norm = static_cast<const __nv_bfloat16*>(call.k_norm),
      .norm_eps = call.norm_eps,
      .norm_offset = call.norm_offset,
      .cos_sin = call.cos_sin,
      .rotary_dim = call.cos_sin == nullptr ? 0 : call.rotary_dim,
      .slots = call.slots,
      .k_format = layout.k_format,
      .v_format = layout.v_format,
      .arena = cache.arena + cache.claim_offset,
      .head_bytes = layout.HeadBytes(),
      .v_offset = layout.VOffset(0),
      .k_scales = layout.KScaleOffset(0),
      .v_scales = layout.VScaleOffset(0),
      .k_scale = cache.k_scale,
      .v_scale = cache.v_scale,
      .saturated = reinterpret_cast<unsigned long long*>(cache.saturated),
      .amax = cache.amax,
      .q_out = static_cast<__nv_bfloat16*>(call.q_out),
      .fp8_queries = call.fp8_queries,
      .q_fp8 = static_cast<uint8_t*>(call.q_fp8),
      .q_scale = call.q_scale,
  };
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (call.input == AppendCall::Input::kBF16) {
    LaunchFor<__nv_bfloat16>(layout.head_dim, p, cuda_stream);
  } else {
    LaunchFor<float>(layout.head_dim, p, cuda_stream);
  }
}

}  // namespace octavo::cuda
