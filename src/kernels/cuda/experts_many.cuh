// Experts for many rows: a persistent grid takes products of a tile's pairs with some outputs of
// two matrices, gate and up or the first and second half of a tile's outputs of down. One thread
// fills a ring of stages, 64 of k each, by TMA; the other warpgroups multiply. How is for Tiles to
// say, for weights come as bfloat16 (experts_many_bf16.cu) or MXFP4 (experts_many_mxfp4.cu):
//
//   struct Tiles {
//     static constexpr bool kGated;           // gate and up, else down
//     static constexpr int kPairs, kOuts;     // of a tile at most; of either matrix
//     static constexpr int kConsumers;        // warpgroups that multiply
//     static constexpr int kStages, kBytes;   // kBytes: of kOuts in a stage
//     static constexpr int kStepX, kRowsY;    // the map's coordinates: of a step, outputs per row
//     static constexpr int kBoxPairs;         // that one copy brings
//     static CUtensorMap Map(const void* base, int64_t k, int64_t outs, int64_t experts,
//                            int64_t stride);
//     static __device__ void Take(const ManyTile&, const ExpertsParams&, ManyRing<Tiles>&);
//   };
#pragma once

#include <algorithm>

#include "kernels/cuda/experts.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace octavo::cuda {

inline constexpr int kManyRowBytes = 128;
inline constexpr int kManyStepK = kManyRowBytes / 2;

// Of all registers that threads get at first, the one that copies needs few.
template <int kConsumers>
struct ManyThreads {
  static constexpr int kCount = 128 * (kConsumers + 1);
  static constexpr int kRegistersAtStart = 65536 / kCount / 8 * 8, kCopyRegisters = 40;
  static constexpr int kRegisters =
      (kRegistersAtStart + (kRegistersAtStart - kCopyRegisters) / kConsumers) / 8 * 8;
};

template <class Tiles>
struct alignas(1024) ManyStage {  // the swizzle counts from multiples of 1024
  std::byte x[Tiles::kPairs * kManyRowBytes];
  std::byte weights[2][Tiles::kBytes];
};

// Where a thread stands in the ring.
template <class Tiles>
struct ManyRing {
  struct Memory {
    ManyStage<Tiles> stages[Tiles::kStages];
    uint64_t full[Tiles::kStages], empty[Tiles::kStages];
  };
  Memory& memory;
  int index = 0;
  uint32_t phase = 0;

  __device__ ManyStage<Tiles>& stage() { return memory.stages[index]; }
  __device__ void Next() {
    if (++index == Tiles::kStages) {
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
  int k, out_tiles;
};

struct ManyTile {
  ExpertTile pairs;
  int out, steps;
};

// A tile's first output of the second matrix, after that of the first; all of a tile's outputs.
template <class Tiles>
inline constexpr int kManySecondOut = Tiles::kGated ? 0 : Tiles::kOuts;
template <class Tiles>
inline constexpr int kManyTileOuts = kManySecondOut<Tiles> + Tiles::kOuts;

// Calls f(tile) for each of the block's.
template <class Tiles, class F>
__device__ __forceinline__ void ForEachManyTile(const ManyProduct& product, const ExpertsParams& p,
                                                const F& f) {
  const int total = *p.tile_count * product.out_tiles;
  for (int i = static_cast<int>(blockIdx.x); i < total; i += static_cast<int>(gridDim.x)) {
    const int tile = i / product.out_tiles, out_tile = i - tile * product.out_tiles;
    f(ManyTile{p.tiles[tile], out_tile * kManyTileOuts<Tiles>,
               (product.k + kManyStepK - 1) / kManyStepK});
  }
}

template <class Tiles>
__device__ __forceinline__ void FillManyStages(const ManyProduct& product, const ManyTile& tile,
                                               ManyRing<Tiles>& ring) {
  constexpr int kBoxBytes = Tiles::kBoxPairs * kManyRowBytes;
  const int pairs = tile.pairs.end - tile.pairs.begin;
  const int boxes = (pairs + Tiles::kBoxPairs - 1) / Tiles::kBoxPairs;
  for (int step = 0; step < tile.steps; ++step, ring.Next()) {
    uint64_t* full = &ring.memory.full[ring.index];
    BarrierWait(&ring.memory.empty[ring.index], ring.phase ^ 1);
    BarrierArriveExpect(full, 2 * Tiles::kBytes + boxes * kBoxBytes);
    for (int m = 0; m < 2; ++m) {
      TmaLoad3(ring.stage().weights[m], &product.weights[m], full, step * Tiles::kStepX,
               (tile.out + m * kManySecondOut<Tiles>) / Tiles::kRowsY, tile.pairs.expert);
    }
    for (int box = 0; box < boxes; ++box) {
      TmaLoad3(ring.stage().x + box * kBoxBytes, &product.x, full, step * kManyRowBytes,
               tile.pairs.begin + box * Tiles::kBoxPairs, 0);
    }
  }
}

// multiply(step) multiplies a full stage; when it returns, the products of the stage before are
// over.
template <class Tiles, class F>
__device__ __forceinline__ void MultiplyStages(int steps, ManyRing<Tiles>& ring,
                                               const F& multiply) {
  int previous = -1;
  for (int step = 0; step < steps; ++step, ring.Next()) {
    ring.WaitFull();
    multiply(step);
    if (previous >= 0) ring.LetGo(previous);
    previous = ring.index;
  }
  WgmmaWait<0>();
  ring.LetGo(previous);
}

template <class Tiles>
__global__ __launch_bounds__(ManyThreads<Tiles::kConsumers>::kCount, 1) void many_experts_kernel(
    const __grid_constant__ ManyProduct product, const __grid_constant__ ExpertsParams p) {
  using Threads = ManyThreads<Tiles::kConsumers>;
  extern __shared__ uint8_t dynamic[];
  auto& memory = *reinterpret_cast<ManyRing<Tiles>::Memory*>(AlignShared<1024>(dynamic));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tiles::kStages; ++i) {
      BarrierInit(&memory.full[i], 1);
      BarrierInit(&memory.empty[i], 4 * Tiles::kConsumers);
    }
    BarrierInitFence();
  }
  __syncthreads();
  WaitForInputs();
  ManyRing<Tiles> ring{memory};
  if (threadIdx.x >= 128 * Tiles::kConsumers) {
    RegistersDown<Threads::kCopyRegisters>();
    if (threadIdx.x > 128 * Tiles::kConsumers) return;
    ForEachManyTile<Tiles>(product, p,
                           [&](const ManyTile& t) { FillManyStages(product, t, ring); });
  } else {
    RegistersUp<Threads::kRegisters>();
    ForEachManyTile<Tiles>(product, p, [&](const ManyTile& t) { Tiles::Take(t, p, ring); });
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

template <class Tiles>
void RunManyProduct(const ExpertsParams& p, const BFloat16* x, const std::byte* first,
                    const std::byte* second, int k, int outs, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(typename ManyRing<Tiles>::Memory) + 1024;
  static const bool once [[maybe_unused]] = [] {
    CUDA_CHECK(cudaFuncSetAttribute(many_experts_kernel<Tiles>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    return true;
  }();
  const auto map = [&](const std::byte* base) {
    return Tiles::Map(base, k, outs, p.experts, p.weight_stride);
  };
  const ManyProduct product{.x = BFloat16Map(x, k, p.pairs, 1, 0, Tiles::kBoxPairs),
                            .weights = {map(first), map(second)},
                            .k = k,
                            .out_tiles = (outs + kManyTileOuts<Tiles> - 1) / kManyTileOuts<Tiles>};
  Launch(many_experts_kernel<Tiles>, static_cast<unsigned>(Multiprocessors()),
         ManyThreads<Tiles::kConsumers>::kCount, kSharedBytes, stream, product, p);
}

template <class GateUp, class Down>
void RunManyProducts(const ExpertsParams& p, cudaStream_t stream) {
  RunManyProduct<GateUp>(p, p.x, p.gate, p.up, p.hidden, p.intermediate, stream);
  RunManyProduct<Down>(p, p.activated, p.down, p.down, p.intermediate, p.hidden, stream);
}

}  // namespace octavo::cuda
