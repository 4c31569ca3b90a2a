// Route: a warp per row; a lane holds up to kSlots experts.
#include "base/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"

namespace octavo::cuda {
namespace {

constexpr int kSlots = 16;     // so up to 512 experts
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

__device__ float WarpMax(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
  return x;
}
__device__ float WarpSum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

__global__ __launch_bounds__(kWarps * 32) void route_kernel(RouteParams p) {
  OverlapAndWaitForInputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (row >= p.rows) return;
  // Expert lane + 32 s is slot s.
  float x[kSlots];
  float max = -INFINITY;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int expert = lane + 32 * s;
    x[s] = expert < p.experts ? p.logits[row * p.stride + expert] : -INFINITY;
    max = fmaxf(max, x[s]);
  }
  max = WarpMax(max);
  float sum = 0;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) sum += expf(x[s] - max);
  sum = WarpSum(sum);

  // One after the other: the largest that is left, the lowest expert first. Lane k keeps the k-th.
  uint32_t taken = 0;
  int id = 0x7FFFFFFF;
  float logit = -INFINITY;
  for (int k = 0; k < p.top_k; ++k) {
    float best = -INFINITY;
    int best_id = 0x7FFFFFFF;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int expert = lane + 32 * s;
      const bool free = expert < p.experts && !(taken >> s & 1);
      if (free && (best_id == 0x7FFFFFFF || x[s] > best)) {
        best = x[s];
        best_id = expert;
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(~0u, best, offset);
      const int other_id = __shfl_xor_sync(~0u, best_id, offset);
      const bool mine = best_id != 0x7FFFFFFF && (other_id == 0x7FFFFFFF || best > other ||
                                                  (best == other && best_id < other_id));
      if (!mine) {
        best = other;
        best_id = other_id;
      }
    }
    if (best_id % 32 == lane) taken |= 1u << (best_id / 32);
    if (lane == k) {
      id = best_id;
      logit = best;
    }
  }
  const float power = lane < p.top_k ? expf(logit - max) : 0.0f;
  const float chosen = WarpSum(power);
  const float weight = power / (p.softmax_first && !p.normalize ? sum : chosen);
  // In ascending order of experts: to the place of how many are lower.
  int place = 0;
  for (int k = 0; k < p.top_k; ++k) place += __shfl_sync(~0u, id, k) < id;
  if (lane < p.top_k) {
    p.ids[int64_t{row} * p.top_k + place] = id;
    p.weights[int64_t{row} * p.top_k + place] = weight;
  }
}

}  // namespace

void Route(const RouteArgs& args, cudaStream_t stream) {
  const int rows = static_cast<int>(args.logits.rows());
  const int experts = static_cast<int>(args.logits.columns());
  OCTAVO_CHECK(args.logits.dtype == DType::kF32 && experts <= 32 * kSlots &&
                   args.top_k <= std::min(experts, kMostTopK),
               ShapeString(args.logits), args.top_k);
  OCTAVO_CHECK(args.ids.contiguous() && args.weights.contiguous(), ShapeString(args.ids));
  Launch(route_kernel, static_cast<unsigned>((rows + kWarps - 1) / kWarps), kWarps * 32, 0, stream,
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
