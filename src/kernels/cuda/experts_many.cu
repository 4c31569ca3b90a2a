// Experts for many rows: a persistent grid takes products of [128 pairs, k] and [256 outputs, k]^T,
// gate and up being 128 outputs each of the same 256. A warpgroup fills a ring of stages, two of 64
// pairs each multiply; where the tile's pairs end before its second 64, the second one only lets
// the stages go. A stage's x, and weights of bfloat16, are TMA's to load; MXFP4 weights are widened
// on their way from global to shared memory, where they look as if TMA had brought them.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mxfp4.cuh"
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
constexpr int kRegistersAtStart = 65536 / kThreads / 8 * 8;  // what warpgroups then share anew

struct Stage {
  std::byte x[kPairs * kRowBytes];
  std::byte weights[kOuts * kRowBytes];
};
struct Shared {
  Stage stages[kStages];
  uint64_t full[kStages], empty[kStages];
};
constexpr int kSharedBytes = sizeof(Shared) + 1024;  // the swizzle counts from multiples of 1024

// What fills the stages: so many arrivals make one full, with so many registers per thread.
// [experts, outs, k] of a tile's first and last 128 outputs.
struct BFloat16Weights {
  static constexpr int kArrivals = 1, kRegisters = 40;
  CUtensorMap first, second;
};
struct Mxfp4Weights {
  static constexpr int kWarps = 4, kArrivals = 1 + kWarps, kRegisters = 56;
  const std::byte *first, *second;  // of expert 0
  int64_t stride;                   // from expert to expert, bytes
  int outs;
};

template <class Weights>
struct Product {
  CUtensorMap x;  // [pairs, k]
  Weights weights;
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

// A block's steps of 64 of k, tile after tile.
template <class Weights>
struct Steps {
  const Product<Weights>& product;
  const ExpertsParams& p;
  const int total = *p.tile_count * product.out_tiles;
  int i = static_cast<int>(blockIdx.x), k = 0, out = 0;
  ExpertTile tile{};

  __device__ Steps(const Product<Weights>& product_, const ExpertsParams& p_)
      : product(product_), p(p_) {
    FindTile();
  }
  __device__ bool more() const { return i < total; }
  __device__ void Next() {
    k += kStepK;
    if (k < product.k) return;
    k = 0;
    i += static_cast<int>(gridDim.x);
    FindTile();
  }

 private:
  __device__ void FindTile() {
    if (!more()) return;
    tile = p.tiles[i / product.out_tiles];
    out = i % product.out_tiles * product.tile_outs;
  }
};

// ---- bfloat16: one thread

__device__ void FillStages(const Product<BFloat16Weights>& product, const ExpertsParams& p,
                           Shared& shared) {
  if (threadIdx.x % 128 != 0) return;
  Ring ring;
  for (Steps steps(product, p); steps.more(); steps.Next()) {
    Stage& stage = shared.stages[ring.stage];
    uint64_t* full = &shared.full[ring.stage];
    BarrierWait(&shared.empty[ring.stage], ring.phase ^ 1);
    BarrierArriveExpect(full, sizeof(Stage));
    TmaLoad3(stage.x, &product.x, full, 2 * steps.k, steps.tile.begin, 0);
    TmaLoad3(stage.weights, &product.weights.first, full, 2 * steps.k, steps.out,
             steps.tile.expert);
    TmaLoad3(stage.weights + sizeof(stage.weights) / 2, &product.weights.second, full, 2 * steps.k,
             steps.out + product.second_at, steps.tile.expert);
    ring.Next();
  }
}

// ---- MXFP4: a warp widens four of a stage's 16 tiles of 16 outputs

constexpr int kWarpTiles = kOuts / mxfp4::kTileRows / Mxfp4Weights::kWarps;
constexpr int kPrefetchSteps = 4;
static_assert(kStepK == mxfp4::kTileColumns);

// Writes what this lane holds of 16 outputs as TMA would with its swizzle of 128 bytes.
__device__ __forceinline__ void PutWidened(const Mxfp4Piece& piece, std::byte* to) {
  const int row = static_cast<int>(threadIdx.x % 32) / 4,
            lane_k = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // Every other row begins with its second half, or two rows would meet in the same banks.
    const int half = i ^ (row & 1);
    std::byte* at = to + row * kRowBytes + ((half * 4 + lane_k) ^ row) * 16;
    *reinterpret_cast<uint4*>(at) = piece.Low(half);
    *reinterpret_cast<uint4*>(at + 8 * kRowBytes) = piece.High(half);
  }
}

__device__ void FillStages(const Product<Mxfp4Weights>& product, const ExpertsParams& p,
                           Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x % 128) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Mxfp4Weights& weights = product.weights;
  // Tile `n` of this warp's, of those of a step.
  const auto tile_at = [&](const Steps<Mxfp4Weights>& steps, int n) {
    const int first_row = (warp * kWarpTiles + n) * mxfp4::kTileRows;
    const bool second = first_row >= kOuts / 2;
    const int row = steps.out + first_row % (kOuts / 2) + (second ? product.second_at : 0);
    // Outputs behind the last are computed from the last ones and not written.
    return (second ? weights.second : weights.first) + steps.tile.expert * weights.stride +
           mxfp4::TileOffset(product.k, min(row, weights.outs - 1), steps.k);
  };
  Steps ahead(product, p);
  Mxfp4Piece pieces[kWarpTiles];
  const auto load = [&](int n) {
    if (!ahead.more()) return;
    const std::byte* tile = tile_at(ahead, n);
    const int left = (product.k - ahead.k + kStepK - 1) / kStepK;  // steps of these outputs
    if (lane == 0 && ahead.k == 0) PrefetchL2(tile, min(kPrefetchSteps, left) * mxfp4::kTileBytes);
    if (lane == 0 && left > kPrefetchSteps)
      PrefetchL2(tile + kPrefetchSteps * mxfp4::kTileBytes, mxfp4::kTileBytes);
    pieces[n] = LoadMxfp4Piece(tile);
  };
#pragma unroll
  for (int n = 0; n < kWarpTiles; ++n) load(n);
  Ring ring;
  for (Steps steps(product, p); steps.more(); steps.Next()) {
    ahead.Next();
    Stage& stage = shared.stages[ring.stage];
    uint64_t* full = &shared.full[ring.stage];
    BarrierWait(&shared.empty[ring.stage], ring.phase ^ 1);
    if (warp == 0 && lane == 0) {
      BarrierArriveExpect(full, sizeof(stage.x));
      TmaLoad3(stage.x, &product.x, full, 2 * steps.k, steps.tile.begin, 0);
    }
#pragma unroll
    for (int n = 0; n < kWarpTiles; ++n) {
      PutWidened(pieces[n], stage.weights + (warp * kWarpTiles + n) * mxfp4::kTileRows * kRowBytes);
      load(n);
    }
    FenceProxyAsync();
    __syncwarp();
    if (lane == 0) BarrierArrive(full);
    ring.Next();
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

template <bool kGated, class Weights>
__global__ __launch_bounds__(kThreads, 1) void many_experts_kernel(
    const __grid_constant__ Product<Weights> product, const __grid_constant__ ExpertsParams p) {
  extern __shared__ uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(AlignShared<1024>(memory));
  constexpr int kRegisters = Weights::kRegisters;
  const int group = static_cast<int>(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&shared.full[i], Weights::kArrivals);
      BarrierInit(&shared.empty[i], 4 * kConsumers);
    }
    BarrierInitFence();
  }
  __syncthreads();
  WaitForInputs();
  if (group == kConsumers) {
    RegistersDown<kRegisters>();
    FillStages(product, p, shared);
    return;
  }
  RegistersUp<(kConsumers + 1) * kRegistersAtStart / kConsumers - kRegisters / kConsumers>();
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

// stride: from matrix to matrix, bytes.
CUtensorMap MapOf(const void* base, int64_t k, int64_t rows, int64_t matrices, int64_t stride) {
  const auto unsigned64 = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t dims[] = {unsigned64(2 * k), unsigned64(rows), unsigned64(matrices)};
  const cuuint64_t strides[] = {unsigned64(2 * k), unsigned64(std::max(stride, 2 * k * rows))};
  const cuuint32_t box[] = {kRowBytes, 128, 1};
  return MakeTensorMap(base, 3, dims, strides, box);
}

template <bool kGated, class Weights>
void Run(const ExpertsParams& p, const BFloat16* x, const Weights& weights, int k, int outs,
         cudaStream_t stream) {
  static const int processors = [] {
    int device = 0, count = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(cudaFuncSetAttribute(many_experts_kernel<kGated, Weights>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    return count;
  }();
  const int tile_outs = kGated ? kOuts / 2 : kOuts;
  const Product<Weights> product{.x = MapOf(x, k, p.pairs, 1, 0),
                                 .weights = weights,
                                 .k = k,
                                 .tile_outs = tile_outs,
                                 .out_tiles = (outs + tile_outs - 1) / tile_outs,
                                 .second_at = kGated ? 0 : kOuts / 2};
  Launch(many_experts_kernel<kGated, Weights>, static_cast<unsigned>(processors), kThreads,
         kSharedBytes, stream, product, p);
}

// make(first, second, k, outs): the weights of either product.
template <class Make>
void RunBoth(const ExpertsParams& p, const Make& make, cudaStream_t stream) {
  Run<true>(p, p.x, make(p.gate, p.up, p.hidden, p.intermediate), p.hidden, p.intermediate, stream);
  Run<false>(p, p.activated, make(p.down, p.down, p.intermediate, p.hidden), p.intermediate,
             p.hidden, stream);
}

}  // namespace

void RunManyExperts(const ExpertsParams& p, cudaStream_t stream) {
  if (p.mxfp4) {
    const auto make = [&](const std::byte* first, const std::byte* second, int /*k*/, int outs) {
      return Mxfp4Weights{first, second, p.weight_stride, outs};
    };
    RunBoth(p, make, stream);
    return;
  }
  const auto make = [&](const std::byte* first, const std::byte* second, int k, int outs) {
    return BFloat16Weights{MapOf(first, k, outs, p.experts, p.weight_stride),
                           MapOf(second, k, outs, p.experts, p.weight_stride)};
  };
  RunBoth(p, make, stream);
}

}  // namespace octavo::cuda
