// Route: a warp per row.
#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"

namespace octavo::cuda {
namespace {

constexpr int kFewExperts = 128, kMostExperts = 512;
constexpr int kMostTopK = 32;  // a lane each, in the end
constexpr int kWarps = 4;

struct RouteParams {
  const float* logits;
  int64_t stride;
  int rows, experts, top_k;
  bool softmax_first, normalize;
  int32_t* ids;
  float* weights;
};

// Logits as integers of the same order, NaN above everything as torch.topk has it, and none zero.
__device__ __forceinline__ uint32_t RankOf(float logit) {
  if (logit != logit) return ~0u;
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is 0
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float LogitOf(uint32_t rank) {
  return __uint_as_float(rank ^ (rank >> 31 ? 0x80000000u : ~0u));
}

__device__ __forceinline__ float SumOverWarp(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// Experts in ascending order. At most 32 * kSlots.
template <int kSlots>
__global__ __launch_bounds__(kWarps * 32) void route_kernel(RouteParams p) {
  OverlapAndWaitForInputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  // Expert lane + 32 s is slot s.
  uint32_t ranks[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int expert = lane + 32 * s;
    ranks[s] = expert < p.experts ? RankOf(p.logits[row * p.stride + expert]) : 0;
  }
  const bool over_all = p.softmax_first && !p.normalize;
  float sum = 0, max = 0;
  // One after the other: the largest that is left, the lowest expert first. Lane k keeps the k-th.
  int id = 0;
  float logit = 0;
  for (int k = 0; k < p.top_k; ++k) {
    uint32_t best = 0;
    int best_id = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (ranks[s] > best) {
        best = ranks[s];
        best_id = lane + 32 * s;
      }
    }
    const uint32_t highest = __reduce_max_sync(~0u, best);
    const int chosen = __reduce_min_sync(~0u, best == highest ? best_id : 0x7FFFFFFF);
    if (k == 0) {
      max = LogitOf(highest);
      if (over_all) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) sum += ranks[s] ? expf(LogitOf(ranks[s]) - max) : 0.0f;
        sum = SumOverWarp(sum);
      }
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (lane + 32 * s == chosen) ranks[s] = 0;
    }
    if (lane == k) {
      id = chosen;
      logit = LogitOf(highest);
    }
  }
  const float power = lane < p.top_k ? expf(logit - max) : 0.0f;
  if (!over_all) sum = SumOverWarp(power);
  int place = 0;  // how many are lower
  for (int k = 0; k < p.top_k; ++k) place += __shfl_sync(~0u, id, k) < id;
  if (lane < p.top_k) {
    p.ids[row * p.top_k + place] = id;
    p.weights[row * p.top_k + place] = power / sum;
  }
}

}  // namespace

void Route(const RouteArgs& args, cudaStream_t stream) {
  const int rows = static_cast<int>(args.logits.rows());
  const int experts = static_cast<int>(args.logits.columns());
  OCTAVO_CHECK(args.logits.dtype == DType::kF32 && experts <= kMostExperts &&
                   args.top_k <= std::min(experts, kMostTopK),
               ShapeString(args.logits), args.top_k);
  OCTAVO_CHECK(args.ids.contiguous() && args.weights.contiguous(), ShapeString(args.ids));
  const auto kernel =
      experts <= kFewExperts ? route_kernel<kFewExperts / 32> : route_kernel<kMostExperts / 32>;
  Launch(kernel, static_cast<unsigned>((rows + kWarps - 1) / kWarps), kWarps * 32, 0, stream,
         RouteParams{.logits = args.logits.Row<float>(0),
                     .stride = args.logits.row_stride,
                     .rows = rows,
                     .experts = experts,
                     .top_k = args.top_k,
                     .softmax_first = args.softmax_first,
                     .normalize = args.normalize,
                     .ids = args.ids.Row<int32_t>(0),
                     .weights = args.weights.Row<float>(0)});
}

}  // namespace octavo::cuda
