// Sampler: a block per row. One pass over the logits finds the largest, the log-sum-exp and whether
// all are finite, which is all that greedy rows need; sampling is a second pass, an exponential
// race (kernels/sampling.h), and top_k and top_p first find their last token by a radix select.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/sampling.h"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kNone = 0x7FFFFFFF;

// A token whose logit is changed before sampling.
struct Adjustment {
  int32_t id;
  float add;
  float penalty;   // 1: none
  float original;  // written by the kernel
};

struct RowParams {
  float temperature, top_p;
  double min_p_margin;  // -inf: none
  int32_t top_k;        // 0: all
  uint32_t choice, token_index;
  uint64_t seed;
  int32_t target;
  int32_t adjust_begin, adjust_end;
};

struct SampleParams {
  float* logits;
  int64_t stride;
  int vocab;
  float soft_cap;
  const RowParams* rows;
  Adjustment* adjustments;
  SampledToken* out;
};

// The larger value, the lower id among equals.
template <class T>
struct Best {
  T value;
  int id;
  __device__ void Take(T other, int other_id) {
    if (other > value || (other == value && other_id < id)) {
      value = other;
      id = other_id;
    }
  }
};

template <class T>
__device__ Best<T> BlockBest(Best<T> best) {
  __shared__ Best<T> all[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2)
    best.Take(__shfl_xor_sync(~0u, best.value, lane), __shfl_xor_sync(~0u, best.id, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = best;
  __syncthreads();
  best = all[threadIdx.x % 32];
  for (int lane = 16; lane > 0; lane /= 2)
    best.Take(__shfl_xor_sync(~0u, best.value, lane), __shfl_xor_sync(~0u, best.id, lane));
  return best;
}

template <class T>
__device__ T BlockSum(T x) {
  __shared__ T all[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = x;
  __syncthreads();
  x = all[threadIdx.x % 32];
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// Unsigned integers in the order of the floats.
__device__ uint32_t Key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Tokens in descending order of logits, then ascending of ids, up to and with this one.
struct Cut {
  uint32_t key = 0;
  int id = kNone;
  __device__ bool Keeps(uint32_t other, int other_id) const {
    return other > key || (other == key && other_id <= id);
  }
};

// One row after soft cap, penalties and biases.
struct Row {
  const float* logits;
  int vocab;
  float temperature;
  double max, margin;

  __device__ float At(int i) const { return logits[i] / temperature; }
  __device__ bool Plausible(float l) const { return l - max >= margin; }
};

// The first token, in order, at which the weights of those kept add up to `want`. Weights are whole
// numbers, so the order of adding does not matter. All threads return the same.
template <class Weight>
__device__ Cut FindCut(const Row& row, const Cut& within, const Weight& weight,
                       unsigned long long want) {
  __shared__ unsigned long long sums[256];
  __shared__ unsigned long long above_shared;
  __shared__ uint32_t prefix_shared;
  __shared__ int last_shared;
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t prefix = 0;
  unsigned long long above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    if (thread < 256) sums[thread] = 0;
    __syncthreads();
    for (int i = thread; i < row.vocab; i += kThreads) {
      const float l = row.At(i);
      const uint32_t key = Key(l);
      const bool same = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
      if (same && row.Plausible(l) && within.Keeps(key, i))
        atomicAdd(&sums[key >> shift & 255], weight(l));
    }
    __syncthreads();
    if (thread == 0) {
      int digit = 255;
      while (digit > 0 && above + sums[digit] < want) above += sums[digit--];
      above_shared = above;
      prefix_shared = prefix | static_cast<uint32_t>(digit) << shift;
    }
    __syncthreads();
    above = above_shared;
    prefix = prefix_shared;
  }
  // Those with this very logit weigh the same: as many of the first as are needed.
  const unsigned long long one =
      max(weight(__uint_as_float(prefix & 0x80000000u ? prefix ^ 0x80000000u : ~prefix)), 1ull);
  long long needed = static_cast<long long>((want - above + one - 1) / one);
  for (int first = 0; first < row.vocab; first += kThreads) {
    const int i = first + thread;
    const bool equal = i < row.vocab && Key(row.At(i)) == prefix && within.Keeps(prefix, i);
    const int count = __syncthreads_count(equal);
    if (count < needed) {
      needed -= count;
      continue;
    }
    // The last one needed is among these: threads count those before them.
    __shared__ int warp_counts[kThreads / 32];
    const unsigned vote = __ballot_sync(~0u, equal);
    if (thread % 32 == 0) warp_counts[thread / 32] = __popc(vote);
    __syncthreads();
    int before = __popc(vote & ((1u << thread % 32) - 1));
    for (int w = 0; w < thread / 32; ++w) before += warp_counts[w];
    if (equal && before + 1 == needed) last_shared = i;
    __syncthreads();
    return {prefix, last_shared};
  }
  return {prefix, kNone};
}

__device__ int Draw(const Row& row, const RowParams& p) {
  Cut cut;
  if (p.top_k > 0 && p.top_k < row.vocab)
    cut = FindCut(
        row, cut, [](float) { return 1ull; }, static_cast<unsigned long long>(p.top_k));
  if (p.top_p < 1) {
    // 40 bits behind the point: 2^18 tokens of at most 1 each fit.
    const auto weight = [&](float l) {
      return static_cast<unsigned long long>(exp(l - row.max) * 0x1p40);
    };
    unsigned long long total = 0;
    for (int i = static_cast<int>(threadIdx.x); i < row.vocab; i += kThreads) {
      const float l = row.At(i);
      if (row.Plausible(l) && cut.Keeps(Key(l), i)) total += weight(l);
    }
    total = BlockSum(total);
    const auto want = static_cast<unsigned long long>(
        ceil(static_cast<double>(p.top_p) * static_cast<double>(total)));
    cut = FindCut(row, cut, weight, max(want, 1ull));
  }
  Best<double> best{-INFINITY, kNone};
  for (int quad = static_cast<int>(threadIdx.x); quad * 4 < row.vocab; quad += kThreads) {
    const auto words = SampleWords(static_cast<uint32_t>(quad), p.seed, p.choice, p.token_index);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = quad * 4 + k;
      if (i >= row.vocab) break;
      const float l = row.At(i);
      if (!row.Plausible(l) || !cut.Keeps(Key(l), i)) continue;
      best.Take(l - log(-log1p(-(words[k] + 0.5) * 0x1p-32)), i);  // RaceScore
    }
  }
  return BlockBest(best).id;
}

__global__ __launch_bounds__(kThreads) void sample_kernel(const __grid_constant__ SampleParams s) {
  WaitForInputs();
  const RowParams& p = s.rows[blockIdx.x];
  float* logits = s.logits + blockIdx.x * s.stride;
  const int thread = static_cast<int>(threadIdx.x);

  Best<float> top{-INFINITY, kNone};
  bool finite = true;
  for (int i = thread; i < s.vocab; i += kThreads) {
    const float x = logits[i];
    finite = finite && isfinite(x);
    if (!isnan(x)) top.Take(x, i);
    if (s.soft_cap > 0) logits[i] = s.soft_cap * tanhf(x / s.soft_cap);
  }
  top = BlockBest(top);
  finite = __syncthreads_and(finite);
  const int top1 = top.id == kNone ? 0 : top.id;
  SampledToken& out = s.out[blockIdx.x];
  if (!finite) {
    if (thread == 0) out = {.id = top1, .logprob = NAN, .top1 = top1, .finite = false};
    return;
  }
  const float max = logits[top1];
  float sum = 0;
  for (int i = thread; i < s.vocab; i += kThreads) sum += expf(logits[i] - max);
  const double log_sum = log(BlockSum(static_cast<double>(sum)));

  for (int a = p.adjust_begin + thread; a < p.adjust_end; a += kThreads) {
    Adjustment& adjust = s.adjustments[a];
    float& x = logits[adjust.id];
    adjust.original = x;
    if (adjust.penalty != 1) x = x > 0 ? x / adjust.penalty : x * adjust.penalty;
    x += adjust.add;
  }
  __syncthreads();
  int id = top1;
  const bool greedy = p.temperature <= kGreedyTemperature;
  if (!greedy || p.adjust_end > p.adjust_begin) {
    const float temperature = greedy ? 1.0f : p.temperature;
    Best<float> best{-INFINITY, kNone};
    for (int i = thread; i < s.vocab; i += kThreads) best.Take(logits[i] / temperature, i);
    best = BlockBest(best);
    id = best.id;
    if (!greedy && isfinite(best.value)) {
      id = Draw({.logits = logits,
                 .vocab = s.vocab,
                 .temperature = temperature,
                 .max = best.value,
                 .margin = p.min_p_margin},
                p);
    }
  }
  // The log-probability is of the logits as they were.
  const int reported = p.target >= 0 ? p.target : id;
  __shared__ float original;
  if (thread == 0) original = logits[reported];
  __syncthreads();
  for (int a = p.adjust_begin + thread; a < p.adjust_end; a += kThreads) {
    if (s.adjustments[a].id == reported) original = s.adjustments[a].original;
  }
  __syncthreads();
  if (thread == 0) {
    out = {.id = id,
           .logprob = static_cast<float>(static_cast<double>(original) - max - log_sum),
           .top1 = top1,
           .finite = true};
  }
}

// Pinned host memory and as much of the device's; grows.
class Exchange {
 public:
  ~Exchange() { Free(); }
  void Reserve(size_t bytes) {
    if (bytes <= bytes_) return;
    Free();
    bytes_ = 2 * bytes;
    CUDA_CHECK(cudaMallocHost(&host_, bytes_));
    CUDA_CHECK(cudaMalloc(&device_, bytes_));
  }
  std::byte* host() const { return static_cast<std::byte*>(host_); }
  std::byte* device() const { return static_cast<std::byte*>(device_); }

 private:
  void Free() {
    cudaFreeHost(host_);
    cudaFree(device_);
    host_ = device_ = nullptr;
  }
  void *host_ = nullptr, *device_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace

struct Sampler::State {
  State(int rows, int64_t ids) : max_rows(rows), vocab(ids), place(ids) {}

  int max_rows;
  int64_t vocab;
  Exchange exchange;  // row parameters, results, adjustments
  std::vector<Adjustment> adjustments;
  std::vector<int32_t> place;  // by id: index into adjustments + 1, of the row in hand

  void Adjust(const SampleRow& row);
};

Sampler::Sampler(int max_rows, int64_t vocab) : state_(std::make_unique<State>(max_rows, vocab)) {}
Sampler::~Sampler() = default;

// Appends the row's adjustments, no id twice.
void Sampler::State::Adjust(const SampleRow& row) {
  const size_t begin = adjustments.size();
  const auto at = [&](int32_t id) -> Adjustment& {
    if (place[id] == 0) {
      adjustments.push_back({.id = id, .add = 0, .penalty = 1, .original = 0});
      place[id] = static_cast<int32_t>(adjustments.size());
    }
    return adjustments[place[id] - 1];
  };
  if (row.repetition_penalty != 1) {
    for (const int32_t id : row.history) {
      if (id >= 0 && id < vocab) at(id).penalty = row.repetition_penalty;
    }
  }
  for (const LogitBias& bias : row.biases) at(bias.id).add = bias.add;
  for (size_t a = begin; a < adjustments.size(); ++a) place[adjustments[a].id] = 0;
}

void Sampler::Run(const SampleArgs& args, cudaStream_t stream) {
  State& s = *state_;
  const size_t rows = args.rows.size();
  OCTAVO_CHECK(args.logits.dtype == DType::kF32 && args.logits.columns() == s.vocab &&
                   args.logits.rows() == static_cast<int64_t>(rows) &&
                   static_cast<int>(rows) <= s.max_rows && args.out.size() == rows,
               ShapeString(args.logits), rows, s.max_rows);
  s.adjustments.clear();
  std::vector<RowParams> params;
  for (const SampleRow& row : args.rows) {
    const auto begin = static_cast<int32_t>(s.adjustments.size());
    s.Adjust(row);
    params.push_back({.temperature = row.temperature,
                      .top_p = row.top_p,
                      .min_p_margin = row.min_p > 0 ? MinPMargin(row.min_p) : -INFINITY,
                      .top_k = row.top_k,
                      .choice = row.choice,
                      .token_index = row.token_index,
                      .seed = row.seed,
                      .target = row.target,
                      .adjust_begin = begin,
                      .adjust_end = static_cast<int32_t>(s.adjustments.size())});
  }
  const size_t results_at = rows * sizeof(RowParams);
  const size_t adjust_at = (results_at + rows * sizeof(SampledToken) + 15) / 16 * 16;
  const size_t bytes = adjust_at + s.adjustments.size() * sizeof(Adjustment);
  s.exchange.Reserve(bytes);
  std::copy_n(params.data(), rows, reinterpret_cast<RowParams*>(s.exchange.host()));
  std::copy(s.adjustments.begin(), s.adjustments.end(),
            reinterpret_cast<Adjustment*>(s.exchange.host() + adjust_at));
  CUDA_CHECK(cudaMemcpyAsync(s.exchange.device(), s.exchange.host(), bytes, cudaMemcpyHostToDevice,
                             stream));
  auto* results = reinterpret_cast<SampledToken*>(s.exchange.device() + results_at);
  Launch(sample_kernel, static_cast<unsigned>(rows), kThreads, 0, stream,
         SampleParams{.logits = args.logits.Row<float>(0),
                      .stride = args.logits.row_stride,
                      .vocab = static_cast<int>(s.vocab),
                      .soft_cap = args.soft_cap,
                      .rows = reinterpret_cast<const RowParams*>(s.exchange.device()),
                      .adjustments = reinterpret_cast<Adjustment*>(s.exchange.device() + adjust_at),
                      .out = results});
  CUDA_CHECK(cudaMemcpyAsync(s.exchange.host() + results_at, results, rows * sizeof(SampledToken),
                             cudaMemcpyDeviceToHost, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
  std::copy_n(reinterpret_cast<const SampledToken*>(s.exchange.host() + results_at), rows,
              args.out.begin());
}

}  // namespace octavo::cuda
