// Experts: unless there are few rows, one block sorts the pairs of a row and one of its experts by
// expert and cuts them into tiles; then the products (experts.h). The sum over a row's experts, in
// their order, is left to who reads it (Owed).
#include "kernels/cuda/experts.h"

#include <algorithm>
#include <stdexcept>

#include "base/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mxfp4.cuh"
#include "kernels/cuda/ops.h"

namespace octavo::cuda {
namespace {

struct SortParams {
  const int32_t* ids;  // [pairs]
  int pairs, experts, tile_pairs;
  ExpertTile* tiles;
  int32_t* tile_count;
  int32_t* sorted;  // [pairs] pairs by expert, each expert's in order
};

__device__ int InclusiveSum(int x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, x, distance);
    if (lane >= distance) x += other;
  }
  return x;
}

// One warp: totals become the experts' first places, and the tiles are written.
__device__ void CutTiles(const SortParams& p, int32_t* totals) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int pairs_before = 0, tiles_before = 0;
  for (int first = 0; first < p.experts; first += 32) {
    const int expert = first + lane;
    const int pairs = expert < p.experts ? totals[expert] : 0;
    const int tiles = (pairs + p.tile_pairs - 1) / p.tile_pairs;
    const int pairs_end = pairs_before + InclusiveSum(pairs);
    const int tiles_end = tiles_before + InclusiveSum(tiles);
    const int begin = pairs_end - pairs;
    for (int t = 0; t < tiles; ++t) {
      p.tiles[tiles_end - tiles + t] = {expert, begin + t * p.tile_pairs,
                                        min(begin + (t + 1) * p.tile_pairs, pairs_end)};
    }
    if (expert < p.experts) totals[expert] = begin;
    pairs_before = __shfl_sync(~0u, pairs_end, 31);
    tiles_before = __shfl_sync(~0u, tiles_end, 31);
  }
  if (lane == 0) *p.tile_count = tiles_before;
}

// One block. A warp's pairs are a stretch of all, and an expert's pairs keep their order, so sums
// do not depend on chance.
__device__ void SortPairs(const SortParams& p) {
  extern __shared__ int32_t counts[];  // [warps][experts], then [experts] totals
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  int32_t* own = counts + thread / 32 * p.experts;
  int32_t* totals = counts + warps * p.experts;
  for (int e = lane; e < p.experts; e += 32) own[e] = 0;
  __syncwarp();
  const int share = (p.pairs + warps - 1) / warps;
  const int begin = min(thread / 32 * share, p.pairs), end = min(begin + share, p.pairs);
#pragma unroll 4
  for (int i = begin + lane; i < end; i += 32) atomicAdd(&own[p.ids[i]], 1);
  __syncthreads();
  for (int e = thread; e < p.experts; e += threads) {  // counts become places within an expert
    int sum = 0;
    for (int w = 0; w < warps; ++w) {
      const int count = counts[w * p.experts + e];
      counts[w * p.experts + e] = sum;
      sum += count;
    }
    totals[e] = sum;
  }
  __syncthreads();
  if (thread < 32) CutTiles(p, totals);
  __syncthreads();
  int next = begin + lane < end ? p.ids[begin + lane] : -1;
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane, id = next;
    next = i + 32 < end ? p.ids[i + 32] : -1;
    const unsigned same = __match_any_sync(~0u, id);
    const int before = __popc(same & ((1u << lane) - 1));
    if (id >= 0) p.sorted[totals[id] + own[id] + before] = i;
    __syncwarp();
    if (id >= 0 && before == 0) own[id] += __popc(same);
    __syncwarp();
  }
}

__global__ void sort_pairs_kernel(SortParams p) {
  WaitForInputs();
  SortPairs(p);
}

template <bool kMmaOrder>
__global__ void sort_rows_kernel(const BFloat16* x, int64_t x_stride, const int32_t* sorted,
                                 int top_k, int hidden, BFloat16* out) {
  WaitForInputs();
  const BFloat16* from = x + sorted[blockIdx.x] / top_k * x_stride;
  BFloat16* to = out + int64_t{blockIdx.x} * hidden;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < hidden;
       i += static_cast<int>(blockDim.x) * 8) {
    if constexpr (kMmaOrder) {
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        *reinterpret_cast<uint32_t*>(to + MmaColumn(i + j)) =
            *reinterpret_cast<const uint32_t*>(from + i + j);
    } else {
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    }
  }
}

// The distance between experts in bytes, which must be one and the same.
int64_t Stride(std::span<const Expert> experts, Tensor Expert::*tensor) {
  const auto* first = static_cast<const std::byte*>((experts[0].*tensor).data);
  if (!first || experts.size() < 2) return 0;
  const int64_t stride = static_cast<const std::byte*>((experts[1].*tensor).data) - first;
  const auto* last = static_cast<const std::byte*>((experts.back().*tensor).data);
  OCTAVO_CHECK(last - first == stride * (std::ssize(experts) - 1) && stride % 16 == 0, stride,
               experts.size());
  return stride;
}

}  // namespace

struct Experts::State {
  Limits limits;
  void* memory = nullptr;
  ExpertTile* tiles;
  int32_t *tile_count, *sorted;
  BFloat16 *activated, *x;
  float* results;
  ~State() { cudaFree(memory); }

  // Tiles of pairs, and their rows of x.
  void Sort(const ExpertsArgs& args, const ExpertsParams& params, cudaStream_t stream) const;
};

Experts::Experts(const Limits& limits) : state_(std::make_unique<State>(limits)) {
  const int64_t pairs = int64_t{limits.rows} * limits.top_k;
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t offset = bytes;
    bytes += (size + 255) / 256 * 256;
    return offset;
  };
  const int64_t results = take(pairs * limits.hidden * 4),
                tiles = take(pairs * int64_t{sizeof(ExpertTile)}), tile_count = take(4),
                sorted = take(pairs * 4), activated = take(pairs * limits.intermediate * 2),
                x = take(pairs * limits.hidden * 2);
  if (cudaMalloc(&state_->memory, bytes) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(
        "out of memory for experts' activations; lower --max-num-batched-tokens");
  }
  auto* base = static_cast<std::byte*>(state_->memory);
  state_->results = reinterpret_cast<float*>(base + results);
  state_->tiles = reinterpret_cast<ExpertTile*>(base + tiles);
  state_->tile_count = reinterpret_cast<int32_t*>(base + tile_count);
  state_->sorted = reinterpret_cast<int32_t*>(base + sorted);
  state_->activated = reinterpret_cast<BFloat16*>(base + activated);
  state_->x = reinterpret_cast<BFloat16*>(base + x);
  CUDA_CHECK(cudaFuncSetAttribute(sort_pairs_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  33 * limits.experts * 4));
}
Experts::~Experts() = default;

void Experts::State::Sort(const ExpertsArgs& args, const ExpertsParams& params,
                          cudaStream_t stream) const {
  const int threads = std::clamp(params.pairs / 8 / 32 * 32, 256, 1024);
  Launch(sort_pairs_kernel, 1, threads, size_t{4} * (threads / 32 + 1) * params.experts, stream,
         SortParams{.ids = args.ids.Row<int32_t>(0),
                    .pairs = params.pairs,
                    .experts = params.experts,
                    .tile_pairs = params.tile_pairs,
                    .tiles = tiles,
                    .tile_count = tile_count,
                    .sorted = sorted});
  Launch(params.mxfp4 ? sort_rows_kernel<true> : sort_rows_kernel<false>,
         static_cast<unsigned>(params.pairs), 256, 0, stream, args.x.Row<BFloat16>(0),
         args.x.row_stride, sorted, params.top_k, params.hidden, x);
}

Owed Experts::Run(const ExpertsArgs& args, cudaStream_t stream) {
  const State& s = *state_;
  const int rows = static_cast<int>(args.x.rows()), top_k = static_cast<int>(args.ids.columns());
  const int experts = static_cast<int>(std::ssize(args.experts));
  const Expert& first = args.experts[0];
  const int hidden = static_cast<int>(first.gate.columns());
  const int intermediate = static_cast<int>(first.gate.rows());
  OCTAVO_CHECK(rows <= s.limits.rows && experts <= s.limits.experts && top_k <= s.limits.top_k &&
                   hidden <= s.limits.hidden && intermediate <= s.limits.intermediate,
               rows, experts, top_k, hidden, intermediate);
  const bool mxfp4 = first.gate.dtype == DType::kMxfp4;
  OCTAVO_CHECK(args.x.dtype == DType::kBF16 && (mxfp4 || first.gate.dtype == DType::kBF16) &&
                   hidden % (mxfp4 ? 32 : 8) == 0 && intermediate % (mxfp4 ? 32 : 8) == 0,
               ShapeString(args.x), ShapeString(first.gate));
  for (const Expert& e : args.experts) {
    OCTAVO_CHECK(e.gate.dtype == first.gate.dtype && e.up.dtype == first.gate.dtype &&
                     e.down.dtype == first.gate.dtype,
                 ShapeString(e.gate), ShapeString(e.up), ShapeString(e.down));
  }
  const int64_t stride = Stride(args.experts, &Expert::gate);
  const int64_t bias_stride = Stride(args.experts, &Expert::gate_bias);
  OCTAVO_CHECK(stride == Stride(args.experts, &Expert::up) &&
                   stride == Stride(args.experts, &Expert::down) &&
                   bias_stride == Stride(args.experts, &Expert::up_bias) &&
                   bias_stride == Stride(args.experts, &Expert::down_bias),
               stride, bias_stride);
  // Experts that few pairs use are read faster by more warps with fewer sums each.
  const bool narrow = mxfp4 && rows * top_k <= kNarrowExpertTile / 2 * experts;
  const bool many = rows > kFewExpertRows || rows * top_k > kFewExpertPairs;
  const auto bf16 = [](const Tensor& t) { return static_cast<const BFloat16*>(t.data); };
  const auto bytes = [](const Tensor& t) { return static_cast<const std::byte*>(t.data); };
  const ExpertsParams params{.gate = bytes(first.gate),
                             .up = bytes(first.up),
                             .down = bytes(first.down),
                             .mxfp4 = mxfp4,
                             .gate_bias = bf16(first.gate_bias),
                             .up_bias = bf16(first.up_bias),
                             .down_bias = bf16(first.down_bias),
                             .weight_stride = stride,
                             .bias_stride = bias_stride / int64_t{sizeof(BFloat16)},
                             .ids = args.ids.Row<int32_t>(0),
                             .tiles = s.tiles,
                             .tile_count = s.tile_count,
                             .sorted = s.sorted,
                             .tile_pairs = narrow ? kNarrowExpertTile : kWideExpertTile,
                             .x = many ? s.x : args.x.Row<BFloat16>(0),
                             .x_stride = many ? hidden : args.x.row_stride,
                             .pairs = rows * top_k,
                             .experts = experts,
                             .hidden = hidden,
                             .intermediate = intermediate,
                             .top_k = top_k,
                             .activation = args.activation,
                             .limit = args.limit,
                             .activated = s.activated,
                             .activated_stride = intermediate,
                             .pair_weights = args.weights.Row<float>(0),
                             .results = s.results};
  if (many) {
    s.Sort(args, params, stream);
    mxfp4 ? RunManyMxfp4Experts(params, stream) : RunManyBFloat16Experts(params, stream);
  } else {
    RunFewExperts(params, stream);
  }
  return {.terms = s.results, .count = top_k, .out = args.out, .accumulate = args.accumulate};
}

}  // namespace octavo::cuda
