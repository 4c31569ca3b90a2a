// Experts for many rows: a persistent grid takes products of [128 pairs, k] and [256 outputs, k]^T,
// gate and up being 128 outputs each of the same 256. A warp keeps TMA loading a ring of stages,
// two warpgroups of 64 pairs each multiply; where the tile's pairs end before its second 64, the
// second one only lets the stages go.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace octavo::cuda {
namespace {

constexpr int kPairs = kManyExpertPairs;
constexpr int kOuts = 256;
constexpr int kRowBytes = 128;  // of k: 64 elements
constexpr int kStepK = kRowBytes / 2;
constexpr int kStages = 4;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = 128 * (kConsumers + 1);

struct Stage {
  std::byte x[kPairs * kRowBytes];
  std::byte weights[kOuts * kRowBytes];
};
struct Shared {
  Stage stages[kStages];
  uint64_t full[kStages], empty[kStages];
};
constexpr int kSharedBytes = sizeof(Shared) + 1024;  // the swizzle counts from multiples of 1024

struct Product {
  CUtensorMap x;                           // [pairs, k]
  CUtensorMap first, second;               // [experts, outs, k] of the first and last 128 outputs
  int k, tile_outs, out_tiles, second_at;  // second_at: the second's first row, after the first's
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ void LoadTiles(const Product& product, const ExpertsParams& p, Shared& shared) {
  const int total = *p.tile_count * product.out_tiles;
  Ring ring;
  for (int i = static_cast<int>(blockIdx.x); i < total; i += static_cast<int>(gridDim.x)) {
    const ExpertTile tile = p.tiles[i / product.out_tiles];
    const int out = i % product.out_tiles * product.tile_outs;
    for (int k = 0; k < product.k; k += kStepK) {
      Stage& stage = shared.stages[ring.stage];
      uint64_t* full = &shared.full[ring.stage];
      BarrierWait(&shared.empty[ring.stage], ring.phase ^ 1);
      BarrierArriveExpect(full, sizeof(Stage));
      TmaLoad3(stage.x, &product.x, full, 2 * k, tile.begin, 0);
      TmaLoad3(stage.weights, &product.first, full, 2 * k, out, tile.expert);
      TmaLoad3(stage.weights + sizeof(stage.weights) / 2, &product.second, full, 2 * k,
               out + product.second_at, tile.expert);
      ring.Next();
    }
  }
}

// sums: this warpgroup's 64 pairs by 256 outputs.
__device__ __forceinline__ void Multiply(int steps, int group, Shared& shared, Ring& ring,
                                         float (&sums)[kOuts / 2]) {
  const bool elected = threadIdx.x % 32 == 0;  // warps are not in step
  int previous = -1;
  for (int step = 0; step < steps; ++step) {
    const Stage& stage = shared.stages[ring.stage];
    const WgmmaOperand<kRowBytes> x(stage.x + group * 64 * kRowBytes), weights(stage.weights);
    BarrierWait(&shared.full[ring.stage], ring.phase);
    WgmmaFence();
#pragma unroll
    for (int bytes = 0; bytes < kRowBytes; bytes += 32)
      Wgmma<WgmmaType::kBF16, kOuts>::SS(sums, x.At(bytes), weights.At(bytes), step + bytes);
    WgmmaCommit();
    WgmmaWait<1>();
    if (elected && previous >= 0) BarrierArrive(&shared.empty[previous]);
    previous = ring.stage;
    ring.Next();
  }
  WgmmaWait<0>();
  if (elected) BarrierArrive(&shared.empty[previous]);
}

__device__ __forceinline__ void LetGo(int steps, Shared& shared, Ring& ring) {
  for (int step = 0; step < steps; ++step) {
    BarrierWait(&shared.full[ring.stage], ring.phase);
    if (threadIdx.x % 32 == 0) BarrierArrive(&shared.empty[ring.stage]);
    ring.Next();
  }
}

__device__ __forceinline__ float2 Bias2(const BFloat16* bias, int64_t at) {
  return bias ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(bias + at))
              : make_float2(0, 0);
}

// Accumulators 4 j + 2 half and the next are columns 8 j + 2 (lane % 4) and the next.
__device__ __forceinline__ void PutActivated(const ExpertsParams& p, const ExpertTile& tile,
                                             int pair, int half, int first_column,
                                             const float (&sums)[kOuts / 2]) {
  BFloat16* to = p.activated + int64_t{pair} * p.intermediate;
#pragma unroll
  for (int j = 0; j < kOuts / 16; ++j) {
    const int column = first_column + 8 * j;
    if (column >= p.intermediate) break;
    const int64_t at = tile.expert * p.bias_stride + column;
    const float2 gate = Bias2(p.gate_bias, at), up = Bias2(p.up_bias, at);
    const float* g = sums + 4 * j + 2 * half;
    const float* u = g + kOuts / 4;
    *reinterpret_cast<uint32_t*>(to + column) =
        PackBF16(Activated(p.activation, p.limit, g[0] + gate.x, u[0] + up.x),
                 Activated(p.activation, p.limit, g[1] + gate.y, u[1] + up.y));
  }
}

__device__ __forceinline__ void PutResults(const ExpertsParams& p, const ExpertTile& tile, int pair,
                                           int half, int first_column,
                                           const float (&sums)[kOuts / 2]) {
  const int source = p.sorted[pair];
  const float weight = p.pair_weights[source];
  float* to = p.results + int64_t{source} * p.hidden;
#pragma unroll
  for (int j = 0; j < kOuts / 8; ++j) {
    const int column = first_column + 8 * j;
    if (column >= p.hidden) break;
    const float2 bias = Bias2(p.down_bias, tile.expert * p.bias_stride + column);
    const float* s = sums + 4 * j + 2 * half;
    *reinterpret_cast<float2*>(to + column) =
        make_float2((s[0] + bias.x) * weight, (s[1] + bias.y) * weight);
  }
}

template <bool kGated>
__global__ __launch_bounds__(kThreads,
                             1) void many_experts_kernel(const __grid_constant__ Product product,
                                                         const __grid_constant__ ExpertsParams p) {
  extern __shared__ uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(AlignShared<1024>(memory));
  const int group = static_cast<int>(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], 4 * kConsumers);
    }
    BarrierInitFence();
  }
  __syncthreads();
  WaitForInputs();
  if (group == kConsumers) {
    RegistersDown<40>();
    if (threadIdx.x == 128 * kConsumers) LoadTiles(product, p, shared);
    return;
  }
  RegistersUp<232>();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = 64 * group + static_cast<int>(threadIdx.x % 128) / 32 * 16 + lane / 4;
  const int total = *p.tile_count * product.out_tiles;
  Ring ring;
  for (int i = static_cast<int>(blockIdx.x); i < total; i += static_cast<int>(gridDim.x)) {
    const ExpertTile tile = p.tiles[i / product.out_tiles];
    const int steps = (product.k + kStepK - 1) / kStepK;
    if (tile.begin + 64 * group >= tile.end) {
      LetGo(steps, shared, ring);
      continue;
    }
    float sums[kOuts / 2];
    Multiply(steps, group, shared, ring, sums);
    const int column = i % product.out_tiles * product.tile_outs + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = tile.begin + row + 8 * half;
      if (pair >= tile.end) continue;
      if constexpr (kGated)
        PutActivated(p, tile, pair, half, column, sums);
      else
        PutResults(p, tile, pair, half, column, sums);
    }
  }
}

CUtensorMap MapOf(const BFloat16* base, int64_t k, int64_t rows, int64_t matrices, int64_t stride) {
  const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(2 * elements); };
  const cuuint64_t dims[] = {bytes(k), static_cast<cuuint64_t>(rows),
                             static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[] = {bytes(k), bytes(std::max(stride, k * rows))};
  const cuuint32_t box[] = {kRowBytes, 128, 1};
  return MakeTensorMap(base, 3, dims, strides, box);
}

template <bool kGated>
void Run(const ExpertsParams& p, const BFloat16* x, const BFloat16* first, const BFloat16* second,
         int k, int outs, cudaStream_t stream) {
  static const int processors = [] {
    int device = 0, count = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(cudaFuncSetAttribute(many_experts_kernel<kGated>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    return count;
  }();
  const int tile_outs = kGated ? kOuts / 2 : kOuts;
  const Product product{.x = MapOf(x, k, p.pairs, 1, 0),
                        .first = MapOf(first, k, outs, p.experts, p.weight_stride),
                        .second = MapOf(second, k, outs, p.experts, p.weight_stride),
                        .k = k,
                        .tile_outs = tile_outs,
                        .out_tiles = (outs + tile_outs - 1) / tile_outs,
                        .second_at = kGated ? 0 : kOuts / 2};
  Launch(many_experts_kernel<kGated>, static_cast<unsigned>(processors), kThreads, kSharedBytes,
         stream, product, p);
}

}  // namespace

void RunManyExperts(const ExpertsParams& p, cudaStream_t stream) {
  Run<true>(p, p.x, p.gate, p.up, p.hidden, p.intermediate, stream);
  Run<false>(p, p.activated, p.down, p.down, p.intermediate, p.hidden, stream);
}

}  // namespace octavo::cuda
