// Experts for many rows: a persistent grid takes products of [256 outputs, k] and [up to 128 pairs,
// k]^T, 128 outputs each of gate and up or 256 of down. One thread fills a ring of stages, 64 of k
// each, by TMA; two warpgroups multiply. How is the weights' to say, for they come as bfloat16
// (experts_many_bf16.cu) or MXFP4 (experts_many_mxfp4.cu):
//
//   struct Weights {
//     static constexpr int kBytes;    // of 128 outputs in a stage
//     static constexpr int kStepX, kRowsY;  // the map's coordinates: of a step, outputs per row
//     static constexpr int kStages, kBoxPairs;  // kBoxPairs: pairs that one copy brings
//     static CUtensorMap Map(const void* base, int64_t k, int64_t outs, int64_t experts,
//                            int64_t stride);
//     template <bool kGated>  // else down
//     static __device__ void Take(const ManyTile&, const ExpertsParams&, ManyRing<Weights>&);
//   };
#pragma once

#include <algorithm>

#include "kernels/cuda/experts.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"

namespace octavo::cuda {

inline constexpr int kManyOuts = 128;  // of a tile, of either matrix
inline constexpr int kManyRowBytes = 128;
inline constexpr int kManyStepK = kManyRowBytes / 2;
inline constexpr int kManyConsumers = 2;  // warpgroups
inline constexpr int kManyThreads = 128 * (kManyConsumers + 1);
// Of all registers that threads get at first, the one that copies needs few.
inline constexpr int kManyRegistersAtStart = 65536 / kManyThreads / 8 * 8, kManyCopyRegisters = 40;
inline constexpr int kManyRegisters =
    kManyRegistersAtStart + (kManyRegistersAtStart - kManyCopyRegisters) / kManyConsumers;

template <class Weights>
struct alignas(1024) ManyStage {  // the swizzle counts from multiples of 1024
  std::byte x[kManyExpertPairs * kManyRowBytes];
  std::byte weights[2][Weights::kBytes];
};

// Where a thread stands in the ring.
template <class Weights>
struct ManyRing {
  struct Memory {
    ManyStage<Weights> stages[Weights::kStages];
    uint64_t full[Weights::kStages], empty[Weights::kStages];
  };
  Memory& memory;
  int index = 0;
  uint32_t phase = 0;

  __device__ ManyStage<Weights>& stage() { return memory.stages[index]; }
  __device__ void Next() {
    if (++index == Weights::kStages) {
      index = 0;
      phase ^= 1;
    }
  }
  __device__ void WaitFull() { BarrierWait(&memory.full[index], phase); }
  // One thread of each multiplying warp, for they are not in step.
  __device__ void LetGo(int stage_index) {
    if (threadIdx.x % 32 == 0) BarrierArrive(&memory.empty[stage_index]);
  }
};

struct ManyProduct {
  CUtensorMap x;           // [pairs, k]
  CUtensorMap weights[2];  // [experts, outs, k]
  int k, out_tiles, tile_outs;
  int second_out;  // from a tile's first output to the first of its second 128
  __device__ int Steps() const { return (k + kManyStepK - 1) / kManyStepK; }
};

struct ManyTile {
  ExpertTile pairs;
  int out, second_out, steps;
};

// Calls f(tile) for each of the block's.
template <class F>
__device__ __forceinline__ void ForEachManyTile(const ManyProduct& product, const ExpertsParams& p,
                                                const F& f) {
  const int total = *p.tile_count * product.out_tiles;
  for (int i = static_cast<int>(blockIdx.x); i < total; i += static_cast<int>(gridDim.x)) {
    const int out = i % product.out_tiles * product.tile_outs;
    f(ManyTile{p.tiles[i / product.out_tiles], out, out + product.second_out, product.Steps()});
  }
}

template <class Weights>
__device__ __forceinline__ void FillManyStages(const ManyProduct& product, const ManyTile& tile,
                                               ManyRing<Weights>& ring) {
  constexpr int kBoxBytes = Weights::kBoxPairs * kManyRowBytes;
  const int pairs = tile.pairs.end - tile.pairs.begin;
  const int boxes = (pairs + Weights::kBoxPairs - 1) / Weights::kBoxPairs;
  for (int step = 0; step < tile.steps; ++step, ring.Next()) {
    uint64_t* full = &ring.memory.full[ring.index];
    BarrierWait(&ring.memory.empty[ring.index], ring.phase ^ 1);
    BarrierArriveExpect(full, 2 * Weights::kBytes + boxes * kBoxBytes);
    for (int m = 0; m < 2; ++m) {
      TmaLoad3(ring.stage().weights[m], &product.weights[m], full, step * Weights::kStepX,
               (m == 0 ? tile.out : tile.second_out) / Weights::kRowsY, tile.pairs.expert);
    }
    for (int box = 0; box < boxes; ++box) {
      TmaLoad3(ring.stage().x + box * kBoxBytes, &product.x, full, step * kManyRowBytes,
               tile.pairs.begin + box * Weights::kBoxPairs, 0);
    }
  }
}

template <bool kGated, class Weights>
__global__ __launch_bounds__(kManyThreads, 1) void many_experts_kernel(
    const __grid_constant__ ManyProduct product, const __grid_constant__ ExpertsParams p) {
  extern __shared__ uint8_t dynamic[];
  auto& memory = *reinterpret_cast<ManyRing<Weights>::Memory*>(AlignShared<1024>(dynamic));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Weights::kStages; ++i) {
      BarrierInit(&memory.full[i], 1);
      BarrierInit(&memory.empty[i], 4 * kManyConsumers);
    }
    BarrierInitFence();
  }
  __syncthreads();
  WaitForInputs();
  ManyRing<Weights> ring{memory};
  if (threadIdx.x >= 128 * kManyConsumers) {
    RegistersDown<kManyCopyRegisters>();
    if (threadIdx.x > 128 * kManyConsumers) return;
    ForEachManyTile(product, p, [&](const ManyTile& t) { FillManyStages(product, t, ring); });
  } else {
    RegistersUp<kManyRegisters>();
    ForEachManyTile(product, p, [&](const ManyTile& t) { Weights::template Take<kGated>(t, p, ring); });
  }
}

// A map of [matrices, rows, k] bfloat16; stride: from matrix to matrix, bytes.
inline CUtensorMap BFloat16Map(const void* base, int64_t k, int64_t rows, int64_t matrices,
                               int64_t stride, int box_rows) {
  const auto unsigned64 = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t dims[] = {unsigned64(2 * k), unsigned64(rows), unsigned64(matrices)};
  const cuuint64_t strides[] = {unsigned64(2 * k), unsigned64(std::max(stride, 2 * k * rows))};
  const cuuint32_t box[] = {kManyRowBytes, static_cast<cuuint32_t>(box_rows), 1};
  return MakeTensorMap(base, 3, dims, strides, box);
}

template <bool kGated, class Weights>
void RunManyProduct(const ExpertsParams& p, const BFloat16* x, const std::byte* first,
                    const std::byte* second, int k, int outs, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(typename ManyRing<Weights>::Memory) + 1024;
  static const int processors = [] {
    int device = 0, count = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(cudaFuncSetAttribute(many_experts_kernel<kGated, Weights>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    return count;
  }();
  const auto map = [&](const std::byte* base) {
    return Weights::Map(base, k, outs, p.experts, p.weight_stride);
  };
  const int tile_outs = kGated ? kManyOuts : 2 * kManyOuts;
  const ManyProduct product{.x = BFloat16Map(x, k, p.pairs, 1, 0, Weights::kBoxPairs),
                            .weights = {map(first), map(second)},
                            .k = k,
                            .out_tiles = (outs + tile_outs - 1) / tile_outs,
                            .tile_outs = tile_outs,
                            .second_out = kGated ? 0 : kManyOuts};
  Launch(many_experts_kernel<kGated, Weights>, static_cast<unsigned>(processors), kManyThreads,
         kSharedBytes, stream, product, p);
}

template <class Weights>
void RunManyExpertsOf(const ExpertsParams& p, cudaStream_t stream) {
  RunManyProduct<true, Weights>(p, p.x, p.gate, p.up, p.hidden, p.intermediate, stream);
  RunManyProduct<false, Weights>(p, p.activated, p.down, p.down, p.intermediate, p.hidden, stream);
}

}  // namespace octavo::cuda
