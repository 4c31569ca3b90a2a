// Experts. Pairs of a row and one of its experts are sorted by expert on the device.
//
// Few rows, and whatever is recorded in a graph: two
// products in the manner of matmul_few.cuh, whose "x" are the rows of an expert's pairs, and a sum
// over a row's experts in their order. A block takes 16 outputs of one expert for all of its pairs,
// 8 kTiles at a time, so for up to that many the weights of the experts that are used are read
// once, and no others.
//
// Many rows: their elements are gathered in sorted order and each expert's are multiplied by
// cuBLASLt, which wants the numbers of rows on the host: the one place where a step waits for the
// device before its end.
#include <algorithm>
#include <stdexcept>

#include "base/error.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_few.cuh"
#include "kernels/cuda/ops.h"

namespace octavo::cuda {
namespace {

constexpr int kSortThreads = 1024;

struct SortParams {
  const int32_t* ids;  // [pairs]
  int pairs, experts;
  int32_t* begins;  // [experts + 1]
  int32_t* sorted;  // [pairs] pairs by expert, each expert's in order
  int32_t* places;  // [pairs] where each pair is in `sorted`
};

// One block. An expert's pairs keep their order, so sums do not depend on chance.
__global__ __launch_bounds__(kSortThreads) void sort_pairs_kernel(SortParams p) {
  extern __shared__ int32_t counts[];  // [warps][experts]
  constexpr int kWarps = kSortThreads / 32;
  WaitForInputs();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int i = thread; i < kWarps * p.experts; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  // A warp's pairs are a stretch of all.
  const int share = (p.pairs + kWarps - 1) / kWarps;
  const int begin = min(warp * share, p.pairs), end = min(begin + share, p.pairs);
  for (int i = begin + lane; i < end; i += 32) atomicAdd(&counts[warp * p.experts + p.ids[i]], 1);
  __syncthreads();
  for (int e = thread; e < p.experts; e += kSortThreads) {  // counts become begins within an expert
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int count = counts[w * p.experts + e];
      counts[w * p.experts + e] = sum;
      sum += count;
    }
    p.begins[e + 1] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    int sum = 0;
    p.begins[0] = 0;
    for (int e = 0; e < p.experts; ++e) p.begins[e + 1] = sum += p.begins[e + 1];
  }
  __syncthreads();
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane;
    const int id = i < end ? p.ids[i] : -1;
    const unsigned same = __match_any_sync(~0u, id);
    const int before = __popc(same & ((1u << lane) - 1));
    int place = 0;
    if (id >= 0) place = counts[warp * p.experts + id] + before;
    __syncwarp();
    if (id >= 0) {
      p.sorted[p.begins[id] + place] = i;
      p.places[i] = p.begins[id] + place;
      if (before == 0) counts[warp * p.experts + id] += __popc(same);
    }
    __syncwarp();
  }
}

struct ExpertsParams {
  const BFloat16 *gate, *up, *down;                 // of expert 0
  const BFloat16 *gate_bias, *up_bias, *down_bias;  // or null
  int64_t weight_stride, bias_stride;               // from expert to expert, elements
  const int32_t *begins, *sorted;
  const BFloat16* x;  // [rows, hidden]
  int64_t x_stride;
  int hidden, intermediate, top_k;
  Activation activation;
  float limit;
  BFloat16* activated;        // [pairs, intermediate], in sorted order
  const float* pair_weights;  // [pairs]
  float* results;             // [pairs, hidden], weighted
};

// The 16 outputs from `first_out` on of the block's expert; out rows behind the last are clamped.
struct OutRows {
  int64_t low, high_offset;  // elements from the matrix's first to this lane's first
};
__device__ OutRows LaneRows(int first_out, int outs, int k) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int low = min(first_out + lane / 4, outs - 1),
            high = min(first_out + lane / 4 + 8, outs - 1);
  return {int64_t{low} * k + lane % 4 * 8, int64_t{high - low} * k};
}

template <int kTiles>
__global__ __launch_bounds__(kFewWarps *
                             32) void gate_up_kernel(const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<kTiles> partials[2];
  WaitForInputs();
  const int expert = static_cast<int>(blockIdx.y),
            first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int begin = p.begins[expert], end = p.begins[expert + 1];
  const OutRows at = LaneRows(first_out, p.intermediate, p.hidden);
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr int kPairs = 8 * kTiles;
  for (int first = begin; first < end; first += kPairs) {
    const auto x_row = [&](int n) -> const BFloat16* {
      const int pair = first + 8 * n + lane / 4;
      return pair < end ? p.x + p.sorted[pair] / p.top_k * p.x_stride + lane % 4 * 8 : nullptr;
    };
#pragma unroll
    for (int matrix = 0; matrix < 2; ++matrix) {
      const BFloat16* weights = (matrix == 0 ? p.gate : p.up) + expert * p.weight_stride + at.low;
      float sums[kTiles][4] = {};
      StreamFew<BFloat16, kTiles>(
          weights, at.high_offset, p.hidden, x_row, [] {}, sums);
      partials[matrix].Put(sums);
    }
    __syncthreads();
    const int pairs = min(kPairs, end - first);
    for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * pairs; i += kFewWarps * 32) {
      const int out = i % kFewOuts, pair = i / kFewOuts, column = first_out + out;
      if (column >= p.intermediate) continue;
      float gate = partials[0].Sum(out, pair), up = partials[1].Sum(out, pair);
      if (p.gate_bias) {
        gate += ToFloat(p.gate_bias[expert * p.bias_stride + column]);
        up += ToFloat(p.up_bias[expert * p.bias_stride + column]);
      }
      p.activated[int64_t{first + pair} * p.intermediate + column] =
          FromFloat<BFloat16>(Activated(p.activation, p.limit, gate, up));
    }
    __syncthreads();
  }
}

template <int kTiles>
__global__ __launch_bounds__(kFewWarps *
                             32) void down_kernel(const __grid_constant__ ExpertsParams p) {
  __shared__ FewPartials<kTiles> partials;
  WaitForInputs();
  const int expert = static_cast<int>(blockIdx.y),
            first_out = static_cast<int>(blockIdx.x) * kFewOuts;
  const int begin = p.begins[expert], end = p.begins[expert + 1];
  const OutRows at = LaneRows(first_out, p.hidden, p.intermediate);
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr int kPairs = 8 * kTiles;
  for (int first = begin; first < end; first += kPairs) {
    const auto row = [&](int n) -> const BFloat16* {
      const int pair = first + 8 * n + lane / 4;
      return pair < end ? p.activated + int64_t{pair} * p.intermediate + lane % 4 * 8 : nullptr;
    };
    float sums[kTiles][4] = {};
    StreamFew<BFloat16, kTiles>(
        p.down + expert * p.weight_stride + at.low, at.high_offset, p.intermediate, row, [] {},
        sums);
    partials.Put(sums);
    __syncthreads();
    const int pairs = min(kPairs, end - first);
    for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * pairs; i += kFewWarps * 32) {
      const int out = i % kFewOuts, pair = i / kFewOuts, column = first_out + out;
      if (column >= p.hidden) continue;
      float value = partials.Sum(out, pair);
      if (p.down_bias) value += ToFloat(p.down_bias[expert * p.bias_stride + column]);
      const int source = p.sorted[first + pair];
      p.results[int64_t{source} * p.hidden + column] = value * p.pair_weights[source];
    }
    __syncthreads();
  }
}

// The row of each pair, in sorted order.
template <class X>
__global__ void gather_pairs_kernel(const X* x, int64_t x_stride, const int32_t* sorted, int top_k,
                                    int hidden, BFloat16* out) {
  WaitForInputs();
  const int64_t pair = blockIdx.x;
  const X* row = x + sorted[pair] / top_k * x_stride;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < hidden; i += static_cast<int>(blockDim.x) * 8)
    Store8(out + pair * hidden + i, Load8(row + i));
}

struct MixParams {
  const float* results;  // [pairs, hidden] in sorted order
  const int32_t *places, *ids;
  const float* weights;
  const BFloat16* bias;  // of expert 0, or null
  int64_t bias_stride;
  int top_k, hidden;
  int64_t out_stride;
};

// out[row] = the sum over k of weight * (result + bias).
template <class Out>
__global__ void mix_experts_kernel(MixParams p, Out* out) {
  WaitForInputs();
  const int64_t row = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < p.hidden;
       i += static_cast<int>(blockDim.x) * 8) {
    Vector8 sum{};
    for (int k = 0; k < p.top_k; ++k) {
      const int64_t pair = row * p.top_k + k;
      Vector8 result = Load8(p.results + int64_t{p.places[pair]} * p.hidden + i);
      if (p.bias) {
        const Vector8 bias = Load8(p.bias + p.ids[pair] * p.bias_stride + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) result.v[j] += bias.v[j];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) sum.v[j] += p.weights[pair] * result.v[j];
    }
    Store8(out + row * p.out_stride + i, sum);
  }
}

template <class Out>
__global__ void add_experts_kernel(const float* results, int top_k, int hidden, int64_t out_stride,
                                   Out* out) {
  WaitForInputs();
  const int64_t row = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < hidden;
       i += static_cast<int>(blockDim.x) * 8) {
    Vector8 sum = Load8(results + row * top_k * hidden + i);
    for (int k = 1; k < top_k; ++k) {
      const Vector8 more = Load8(results + (row * top_k + k) * hidden + i);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum.v[j] += more.v[j];
    }
    Store8(out + row * out_stride + i, sum);
  }
}

__global__ void to_bf16_kernel(const float* x, int64_t x_stride, int hidden, BFloat16* out) {
  WaitForInputs();
  const int64_t row = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < hidden; i += static_cast<int>(blockDim.x) * 8)
    Store8(out + row * hidden + i, Load8(x + row * x_stride + i));
}

// The distance between experts, which must be one and the same.
int64_t Stride(std::span<const Expert> experts, Tensor Expert::*tensor) {
  const auto* first = static_cast<const BFloat16*>((experts[0].*tensor).data);
  if (!first || experts.size() < 2) return 0;
  const int64_t stride = static_cast<const BFloat16*>((experts[1].*tensor).data) - first;
  const auto* last = static_cast<const BFloat16*>((experts.back().*tensor).data);
  OCTAVO_CHECK(last - first == stride * (std::ssize(experts) - 1), stride, experts.size());
  return stride;
}

}  // namespace

struct Experts::State {
  State(const Limits& limits_, MatMuls& matmuls_) : limits(limits_), matmuls(matmuls_) {}
  State(const State&) = delete;
  ~State() {
    cudaFree(memory);
    cudaFreeHost(host_begins);
  }

  Limits limits;
  MatMuls& matmuls;
  void* memory = nullptr;
  int32_t* host_begins = nullptr;
  int32_t *begins, *sorted, *places;
  BFloat16* activated;  // few: [pairs, intermediate]; many: gate and up, [pairs, 2 intermediate]
  BFloat16* x;          // few: [rows, hidden]; many: [pairs, hidden]
  float* results;       // [pairs, hidden]

  void RunFew(const ExpertsArgs& args, cudaStream_t stream) const;
  void RunMany(const ExpertsArgs& args, cudaStream_t stream) const;
};

Experts::Experts(const Limits& limits, MatMuls& matmuls)
    : state_(std::make_unique<State>(limits, matmuls)) {
  const int64_t pairs = int64_t{limits.rows} * limits.top_k;
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t offset = bytes;
    bytes += (size + 255) / 256 * 256;
    return offset;
  };
  const int64_t results = take(pairs * limits.hidden * 4), begins = take((limits.experts + 1) * 4),
                sorted = take(pairs * 4), places = take(pairs * 4),
                activated = take(pairs * 2 * limits.intermediate * 2),
                x = take(pairs * limits.hidden * 2);
  State& s = *state_;
  if (cudaMalloc(&s.memory, bytes) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(
        "out of memory for experts' activations; lower --max-num-batched-tokens");
  }
  CUDA_CHECK(cudaMallocHost(&s.host_begins, (limits.experts + 1) * sizeof(int32_t)));
  auto* base = static_cast<std::byte*>(s.memory);
  s.results = reinterpret_cast<float*>(base + results);
  s.begins = reinterpret_cast<int32_t*>(base + begins);
  s.sorted = reinterpret_cast<int32_t*>(base + sorted);
  s.places = reinterpret_cast<int32_t*>(base + places);
  s.activated = reinterpret_cast<BFloat16*>(base + activated);
  s.x = reinterpret_cast<BFloat16*>(base + x);
  CUDA_CHECK(cudaFuncSetAttribute(sort_pairs_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSortThreads / 32 * limits.experts * 4));
}
Experts::~Experts() = default;

namespace {

int RowThreads(int64_t columns) {
  return static_cast<int>(std::min<int64_t>(1024, (columns / 8 + 31) / 32 * 32));
}
const BFloat16* BF16(const Tensor& t) { return static_cast<const BFloat16*>(t.data); }

// f(pointer to float or BFloat16) of a tensor of either type.
template <class F>
void ByPointer(const Tensor& t, const F& f) {
  if (t.dtype == DType::kF32)
    f(t.Row<float>(0));
  else
    f(t.Row<BFloat16>(0));
}

}  // namespace

void Experts::State::RunFew(const ExpertsArgs& args, cudaStream_t stream) const {
  const Expert& first = args.experts[0];
  const int rows = static_cast<int>(args.x.rows()), top_k = static_cast<int>(args.ids.columns());
  const int hidden = static_cast<int>(first.gate.columns());
  const int intermediate = static_cast<int>(first.gate.rows());
  const bool from_float = args.x.dtype == DType::kF32;
  if (from_float) {
    Launch(to_bf16_kernel, static_cast<unsigned>(rows), RowThreads(hidden), 0, stream,
           args.x.Row<float>(0), args.x.row_stride, hidden, x);
  }
  const ExpertsParams params{.gate = BF16(first.gate),
                             .up = BF16(first.up),
                             .down = BF16(first.down),
                             .gate_bias = BF16(first.gate_bias),
                             .up_bias = BF16(first.up_bias),
                             .down_bias = BF16(first.down_bias),
                             .weight_stride = Stride(args.experts, &Expert::gate),
                             .bias_stride = Stride(args.experts, &Expert::gate_bias),
                             .begins = begins,
                             .sorted = sorted,
                             .x = from_float ? x : BF16(args.x),
                             .x_stride = from_float ? hidden : args.x.row_stride,
                             .hidden = hidden,
                             .intermediate = intermediate,
                             .top_k = top_k,
                             .activation = args.activation,
                             .limit = args.limit,
                             .activated = activated,
                             .pair_weights = args.weights.Row<float>(0),
                             .results = results};
  const auto blocks = [&](int outs) {
    return dim3(static_cast<unsigned>((outs + kFewOuts - 1) / kFewOuts),
                static_cast<unsigned>(args.experts.size()));
  };
  // No expert has more pairs than there are rows.
  const bool one = rows <= 8;
  Launch(one ? gate_up_kernel<1> : gate_up_kernel<4>, blocks(intermediate), kFewWarps * 32, 0,
         stream, params);
  Launch(one ? down_kernel<1> : down_kernel<8>, blocks(hidden), kFewWarps * 32, 0, stream, params);
  ByPointer(args.out, [&](auto* out) {
    Launch(add_experts_kernel<std::remove_pointer_t<decltype(out)>>, static_cast<unsigned>(rows),
           RowThreads(hidden), 0, stream, results, top_k, hidden, args.out.row_stride, out);
  });
}

void Experts::State::RunMany(const ExpertsArgs& args, cudaStream_t stream) const {
  const Expert& first = args.experts[0];
  const int experts = static_cast<int>(std::ssize(args.experts));
  const int top_k = static_cast<int>(args.ids.columns());
  const int64_t pairs = args.x.rows() * top_k, hidden = first.gate.columns(),
                intermediate = first.gate.rows();
  CUDA_CHECK(cudaMemcpyAsync(host_begins, begins, (experts + 1) * sizeof(int32_t),
                             cudaMemcpyDeviceToHost, stream));
  ByPointer(args.x, [&](auto* from) {
    Launch(gather_pairs_kernel<std::remove_pointer_t<decltype(from)>>, static_cast<unsigned>(pairs),
           RowThreads(hidden), 0, stream, from, args.x.row_stride, sorted, top_k,
           static_cast<int>(hidden), x);
  });
  CUDA_CHECK(cudaStreamSynchronize(stream));
  const Tensor gathered(x, DType::kBF16, {pairs, hidden}),
      both(activated, DType::kBF16, {pairs, 2 * intermediate}),
      products(results, DType::kF32, {pairs, hidden});
  const Tensor gate = both.Columns(0, intermediate),
               up = both.Columns(intermediate, 2 * intermediate);
  for (int e = 0; e < experts; ++e) {
    const int begin = host_begins[e], end = host_begins[e + 1];
    if (begin == end) continue;
    const Expert& expert = args.experts[e];
    const Projection parts[] = {{expert.gate, expert.gate_bias, gate.Rows(begin, end)},
                                {expert.up, expert.up_bias, up.Rows(begin, end)}};
    matmuls.Project(gathered.Rows(begin, end), parts, stream);
  }
  cuda::GatedActivation({args.activation, args.limit, gate, up, gate}, stream);
  for (int e = 0; e < experts; ++e) {
    const int begin = host_begins[e], end = host_begins[e + 1];
    if (begin == end) continue;
    const Projection part[] = {{args.experts[e].down, {}, products.Rows(begin, end)}};
    matmuls.Project(gate.Rows(begin, end), part, stream);
  }
  const MixParams params{.results = results,
                         .places = places,
                         .ids = args.ids.Row<int32_t>(0),
                         .weights = args.weights.Row<float>(0),
                         .bias = BF16(first.down_bias),
                         .bias_stride = Stride(args.experts, &Expert::down_bias),
                         .top_k = top_k,
                         .hidden = static_cast<int>(hidden),
                         .out_stride = args.out.row_stride};
  ByPointer(args.out, [&](auto* out) {
    Launch(mix_experts_kernel<std::remove_pointer_t<decltype(out)>>,
           static_cast<unsigned>(args.x.rows()), RowThreads(hidden), 0, stream, params, out);
  });
}

void Experts::Run(const ExpertsArgs& args, cudaStream_t stream) {
  const State& s = *state_;
  const int rows = static_cast<int>(args.x.rows()), top_k = static_cast<int>(args.ids.columns());
  const int experts = static_cast<int>(std::ssize(args.experts));
  const Expert& first = args.experts[0];
  const int64_t hidden = first.gate.columns(), intermediate = first.gate.rows();
  OCTAVO_CHECK(rows <= s.limits.rows && experts <= s.limits.experts && top_k <= s.limits.top_k &&
                   hidden <= s.limits.hidden && intermediate <= s.limits.intermediate,
               rows, experts, top_k, hidden, intermediate);
  OCTAVO_CHECK((args.x.dtype == DType::kF32 || args.x.dtype == DType::kBF16) &&
                   first.gate.dtype == DType::kBF16 && hidden % 8 == 0 && intermediate % 8 == 0,
               ShapeString(args.x), ShapeString(first.gate));
  const int64_t stride = Stride(args.experts, &Expert::gate);
  const int64_t bias_stride = Stride(args.experts, &Expert::gate_bias);
  OCTAVO_CHECK(stride == Stride(args.experts, &Expert::up) &&
                   stride == Stride(args.experts, &Expert::down) &&
                   bias_stride == Stride(args.experts, &Expert::up_bias) &&
                   bias_stride == Stride(args.experts, &Expert::down_bias),
               stride, bias_stride);
  Launch(sort_pairs_kernel, 1, kSortThreads, size_t{kSortThreads / 32} * experts * 4, stream,
         SortParams{.ids = args.ids.Row<int32_t>(0),
                    .pairs = rows * top_k,
                    .experts = experts,
                    .begins = s.begins,
                    .sorted = s.sorted,
                    .places = s.places});
  constexpr int kFewRows = 64;
  cudaStreamCaptureStatus capturing;
  CUDA_CHECK(cudaStreamIsCapturing(stream, &capturing));
  if (rows <= kFewRows || capturing != cudaStreamCaptureStatusNone)
    s.RunFew(args, stream);
  else
    s.RunMany(args, stream);
}

}  // namespace octavo::cuda
