// Sampler: a cluster of blocks per row, each of which keeps its part of the logits in shared
// memory, so device memory is read once. Greedy rows need the largest logit, the log-sum-exp and
// whether all are finite; sampling is one pass more, an exponential race (kernels/sampling.h), and
// top_k and top_p first find their last token: by histograms, until few are left.
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/sampling.h"

namespace octavo::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024;
constexpr int kCluster = 8;
constexpr int kMostTokens = 40960;  // of a block: 160 KiB
constexpr int kNone = 0x7FFFFFFF;

// A token whose logit is changed before sampling.
struct Adjustment {
  int32_t id;
  float add;
  float penalty;  // 1: none
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
  const float* logits;
  int64_t stride;
  int vocab;
  float soft_cap;
  const RowParams* rows;
  const Adjustment* adjustments;
  SampledToken* out;
};

// The larger value, the lower id among equals.
template <class T>
struct Best {
  T value;
  int id;
  __device__ void Add(const Best& other) {
    if (other.value > value || (other.value == value && other.id < id)) *this = other;
  }
  __device__ Best Shuffled(int lanes) const {
    return {__shfl_xor_sync(~0u, value, lanes), __shfl_xor_sync(~0u, id, lanes)};
  }
};
struct Top {
  Best<float> best;
  bool finite;
  __device__ void Add(const Top& other) {
    best.Add(other.best);
    finite = finite && other.finite;
  }
  __device__ Top Shuffled(int lanes) const {
    return {best.Shuffled(lanes), __shfl_xor_sync(~0u, finite, lanes) != 0};
  }
};
template <class T>
struct Sum {
  T value;
  __device__ void Add(const Sum& other) { value += other.value; }
  __device__ Sum Shuffled(int lanes) const { return {__shfl_xor_sync(~0u, value, lanes)}; }
};

// All threads of the cluster get the same, added in the same order every time. `round` counts the
// calls: a block may still read one's values while another writes the next's.
template <class T>
__device__ T Reduce(T x, int& round) {
  __shared__ T warps[kThreads / 32];
  __shared__ T blocks[2][kCluster];
  const cg::cluster_group cluster = cg::this_cluster();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const auto warp_reduce = [&] {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x.Add(x.Shuffled(lanes));
  };
  warp_reduce();
  if (thread % 32 == 0) warps[warp] = x;
  __syncthreads();
  T(&all)[kCluster] = blocks[round++ % 2];
  if (warp == 0) {
    x = warps[thread];
    warp_reduce();
    if (thread < kCluster) *cluster.map_shared_rank(&all[cluster.block_rank()], thread) = x;
  }
  cluster.sync();
  x = all[0];
#pragma unroll
  for (int block = 1; block < kCluster; ++block) x.Add(all[block]);
  return x;
}

// Tokens in descending order of logits, then ascending of ids, have ascending ranks.
__device__ uint64_t Rank(float logit, int id) {
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t descending = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
  return uint64_t{descending} << 32 | static_cast<uint32_t>(id);
}

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// A block's part of a row, behind soft cap, penalties, biases and temperature.
struct Row {
  const float* logits;  // of ids begin ... begin + count
  int begin, count;
  float max;
  float least;                   // the smallest logit that is kept,
  uint64_t last = ~uint64_t{0};  // and the last rank

  __device__ bool Keeps(int i) const {
    return logits[i] >= least && Rank(logits[i], begin + i) <= last;
  }
  // Descending logits; spreads them better than their bits would.
  __device__ int Bin(int i) const {
    return min(kBins - 1, static_cast<int>((max - logits[i]) * (kBins / 32)));
  }
};

// The smallest logit that is not further below the largest than min_p allows.
__device__ float LeastLogit(double max, double margin) {
  if (margin == -INFINITY) return -INFINITY;
  const auto keeps = [&](float logit) { return logit - max >= margin; };
  auto least = static_cast<float>(max + margin);
  while (!keeps(least)) least = nextafterf(least, INFINITY);
  for (float below; keeps(below = nextafterf(least, -INFINITY));) least = below;
  return least;
}

// Weights of tokens, at most 2^32, added up by bins. The two halves are added by 32-bit atomics,
// which kMostTokens cannot overflow.
struct Histogram {
  alignas(8) uint32_t low[kBins];
  alignas(8) uint32_t high[kBins];

  __device__ void Add(int bin, uint64_t weight) {
    const auto half = static_cast<uint32_t>(weight >> 16);
    atomicAdd(&low[bin], static_cast<uint32_t>(weight) & 0xFFFF);
    if (half > 0) atomicAdd(&high[bin], half);
  }
};
static_assert(kMostTokens < 1 << 16);

// Tokens among which the last one is.
constexpr int kListed = kThreads;
struct List {
  uint64_t rank[kListed], weight[kListed];
};

// What finding the last token takes in shared memory.
struct Scratch {
  union {
    Histogram histogram;
    List list;  // the first block's
  };
  int listed;  // may be more than there is room for
  uint64_t last;
};

struct Place {
  int bin;          // -1: all bins together weigh less than is wanted
  uint64_t before;  // weight of the bins before it
};

// The bin of the whole cluster's tokens in which the weights reach `want`. bin_of(i): token i's bin
// or -1. All threads of the cluster return the same.
template <class BinOf, class Weight>
__device__ Place FindBin(const Row& row, const BinOf& bin_of, const Weight& weight, uint64_t want,
                         Scratch& scratch) {
  Histogram& histogram = scratch.histogram;
  __shared__ uint64_t warp_sums[kThreads / 32];
  __shared__ Place found;
  const cg::cluster_group cluster = cg::this_cluster();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  static_assert(kBins == 2 * kThreads);
  for (int bin = thread; bin < kBins; bin += kThreads) histogram.low[bin] = histogram.high[bin] = 0;
  if (thread == 0) found = {-1, 0};
  __syncthreads();
  for (int i = thread; i < row.count; i += kThreads) {
    const int bin = bin_of(i);
    if (bin >= 0) histogram.Add(bin, weight(row.logits[i]));
  }
  cluster.sync();
  if (thread == 0) scratch.listed = 0;
  uint64_t own[2] = {};
#pragma unroll 4
  for (int block = 0; block < kCluster; ++block) {
    const Histogram* theirs = cluster.map_shared_rank(&histogram, block);
    const uint2 low = reinterpret_cast<const uint2*>(theirs->low)[thread];
    const uint2 high = reinterpret_cast<const uint2*>(theirs->high)[thread];
    own[0] += low.x + (uint64_t{high.x} << 16);
    own[1] += low.y + (uint64_t{high.y} << 16);
  }
  uint64_t end = own[0] + own[1];  // of this thread's bins, first in its warp, then in all
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, end, distance);
    if (lane >= distance) end += other;
  }
  if (lane == 31) warp_sums[thread / 32] = end;
  __syncthreads();
  for (int warp = 0; warp < thread / 32; ++warp) end += warp_sums[warp];
  const uint64_t begin = end - own[0] - own[1];
  if (begin < want && want <= end) {
    const bool first = want <= begin + own[0];
    found = {2 * thread + (first ? 0 : 1), begin + (first ? 0 : own[0])};
  }
  cluster.sync();  // the histogram has been read
  const Place place = found;
  __syncthreads();
  return place;
}

// Lists the cluster's tokens that `in_bin(i)`, if there is room for all.
template <class InBin, class Weight>
__device__ bool ListTokens(const Row& row, const InBin& in_bin, const Weight& weight,
                           Scratch& scratch) {
  const cg::cluster_group cluster = cg::this_cluster();
  Scratch& first = *cluster.map_shared_rank(&scratch, 0);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int begin = thread - lane; begin < row.count; begin += kThreads) {
    const int i = begin + lane;
    const bool listed = i < row.count && in_bin(i);
    const uint32_t warp = __ballot_sync(~0u, listed);
    if (warp == 0) continue;
    int at = 0;
    if (lane == 0) at = atomicAdd(&first.listed, __popc(warp));
    at = __shfl_sync(~0u, at, 0) + __popc(warp & ((1u << lane) - 1));
    if (!listed || at >= kListed) continue;
    first.list.rank[at] = Rank(row.logits[i], row.begin + i);
    first.list.weight[at] = weight(row.logits[i]);
  }
  cluster.sync();
  return first.listed <= kListed;
}

// The rank of the listed token at which the weights, in order, reach `want`.
__device__ uint64_t FindListed(uint64_t want, Scratch& scratch) {
  const cg::cluster_group cluster = cg::this_cluster();
  const int thread = static_cast<int>(threadIdx.x);
  const List& list = scratch.list;
  if (cluster.block_rank() == 0 && thread < scratch.listed) {
    const uint64_t rank = list.rank[thread];
    uint64_t before = 0;
    for (int i = 0; i < scratch.listed; ++i) before += list.rank[i] < rank ? list.weight[i] : 0;
    if (before < want && want <= before + list.weight[thread]) {
      for (int block = 0; block < kCluster; ++block)
        cluster.map_shared_rank(&scratch, block)->last = rank;
    }
  }
  cluster.sync();
  return scratch.last;
}

// The rank of the token at which the weights of those kept, in order, reach `want`. Weights are
// whole numbers, so the order of adding does not matter.
template <class Weight>
__device__ uint64_t FindLast(const Row& row, const Weight& weight, uint64_t want,
                             Scratch& scratch) {
  const auto coarse_bin = [&](int i) { return row.Keeps(i) ? row.Bin(i) : -1; };
  Place place = FindBin(row, coarse_bin, weight, want, scratch);
  if (place.bin < 0) return row.last;
  const int coarse = place.bin;
  // Then by digits of ranks: the logit's 32 bits, an id's 22.
  uint64_t prefix = 0;  // of the ranks in question, down to bit `known`
  int known = 64;
  const auto in_question = [&](int i) {
    return row.Bin(i) == coarse && row.Keeps(i) &&
           (known == 64 || Rank(row.logits[i], row.begin + i) >> known == prefix >> known);
  };
  while (known > 0) {
    want -= place.before;
    if (ListTokens(row, in_question, weight, scratch)) return FindListed(want, scratch);
    const int shift = max(known - kDigitBits, known > 32 ? 32 : 0);
    const auto digit = [&](int i) {
      if (!in_question(i)) return -1;
      const uint64_t digits = Rank(row.logits[i], row.begin + i) >> shift;
      return static_cast<int>(digits & ((1u << (known - shift)) - 1));
    };
    place = FindBin(row, digit, weight, want, scratch);
    prefix |= static_cast<uint64_t>(place.bin) << shift;
    known = shift == 32 ? 22 : shift;
  }
  return prefix;
}

// What RaceScore (kernels/sampling.h) says to about 1e-6, and to the bit.
__device__ float AboutRaceScore(float logit, uint32_t word) {
  const float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  const float rest = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;
  return logit - logf(v < 0.5f ? -log1pf(-v) : -logf(rest));
}
__device__ double ExactRaceScore(float logit, uint32_t word) {
  return logit - log(-log1p(-(word + 0.5) * 0x1p-32));
}

// f(i, word) for each token that is kept.
template <class F>
__device__ void ForEachDraw(const Row& row, const RowParams& p, const F& f) {
  for (int first = 4 * static_cast<int>(threadIdx.x); first < row.count; first += 4 * kThreads) {
    const auto words =
        SampleWords(static_cast<uint32_t>(row.begin + first) / 4, p.seed, p.choice, p.token_index);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (first + k < row.count && row.Keeps(first + k)) f(first + k, words[k]);
    }
  }
}

__device__ int Draw(Row row, const RowParams& p, int vocab, int& round) {
  __shared__ Scratch scratch;
  if (p.top_k > 0 && p.top_k < vocab) {
    const auto one = [](float) { return uint64_t{1}; };
    row.last = FindLast(row, one, static_cast<uint64_t>(p.top_k), scratch);
  }
  if (p.top_p < 1) {
    const auto weight = [&](float l) { return static_cast<uint64_t>(expf(l - row.max) * 0x1p32f); };
    Sum<unsigned long long> total{0};
    for (int i = static_cast<int>(threadIdx.x); i < row.count; i += kThreads) {
      if (row.Keeps(i)) total.value += weight(row.logits[i]);
    }
    total = Reduce(total, round);
    const auto want = static_cast<uint64_t>(
        ceil(static_cast<double>(p.top_p) * static_cast<double>(total.value)));
    row.last = FindLast(row, weight, want > 0 ? want : 1, scratch);
  }
  // Only those that come close are worth the exact score; of a thread's tokens mostly the first.
  Best<float> own{-INFINITY, kNone};
  float second = -INFINITY;
  uint32_t own_word = 0;
  ForEachDraw(row, p, [&](int i, uint32_t word) {
    const float about = AboutRaceScore(row.logits[i], word);
    second = fmaxf(second, fminf(about, own.value));
    if (about > own.value) {
      own = {about, row.begin + i};
      own_word = word;
    }
  });
  const float about = Reduce(own, round).value;
  const float least = about - 1e-5f * (1 + fabsf(about));
  Best<double> best{-INFINITY, kNone};
  if (second >= least) {
    ForEachDraw(row, p, [&](int i, uint32_t word) {
      if (AboutRaceScore(row.logits[i], word) >= least)
        best.Add({ExactRaceScore(row.logits[i], word), row.begin + i});
    });
  } else if (own.value >= least) {
    best = {ExactRaceScore(row.logits[own.id - row.begin], own_word), own.id};
  }
  return Reduce(best, round).id;
}

__device__ float SoftCapped(float x, float cap) { return cap > 0 ? cap * tanhf(x / cap) : x; }

__global__ __cluster_dims__(kCluster, 1, 1)
    __launch_bounds__(kThreads) void sample_kernel(const __grid_constant__ SampleParams s) {
  extern __shared__ float part[];
  WaitForInputs();
  const int row = static_cast<int>(blockIdx.x / kCluster);
  const RowParams& p = s.rows[row];
  const float* logits = s.logits + row * s.stride;
  const int share = (s.vocab + 4 * kCluster - 1) / (4 * kCluster) * 4;
  const int begin = min(static_cast<int>(blockIdx.x % kCluster) * share, s.vocab);
  const int count = min(share, s.vocab - begin);
  const int thread = static_cast<int>(threadIdx.x);
  const bool reports = thread == 0 && blockIdx.x % kCluster == 0;
  int round = 0;

  Top top{{-INFINITY, kNone}, true};
#pragma unroll 8
  for (int i = thread; i < count; i += kThreads) {
    const float x = logits[begin + i];
    part[i] = x;
    top.Add({{x, begin + i}, isfinite(x) != 0});
  }
  top = Reduce(top, round);
  const int top1 = top.best.id == kNone ? 0 : top.best.id;
  if (!top.finite) {
    if (reports) s.out[row] = {.id = top1, .logprob = NAN, .top1 = top1, .finite = false};
    return;
  }
  const float max = SoftCapped(top.best.value, s.soft_cap);
  Sum<double> power{0};
  float own = 0;
  for (int i = thread; i < count; i += kThreads) {
    if (s.soft_cap > 0) part[i] = SoftCapped(part[i], s.soft_cap);
    own += expf(part[i] - max);
  }
  power = Reduce(Sum<double>{own}, round);

  int id = top1;
  const bool greedy = p.temperature <= kGreedyTemperature;
  if (!greedy || p.adjust_end > p.adjust_begin) {
    __syncthreads();
    for (int a = p.adjust_begin + thread; a < p.adjust_end; a += kThreads) {
      const Adjustment adjust = s.adjustments[a];
      if (adjust.id < begin || adjust.id >= begin + count) continue;
      float& x = part[adjust.id - begin];
      if (adjust.penalty != 1) x = x > 0 ? x / adjust.penalty : x * adjust.penalty;
      x += adjust.add;
    }
    __syncthreads();
    Best<float> best{-INFINITY, kNone};
    for (int i = thread; i < count; i += kThreads) {
      if (!greedy) part[i] /= p.temperature;
      best.Add({part[i], begin + i});
    }
    __syncthreads();
    best = Reduce(best, round);
    id = best.id;
    if (!greedy && isfinite(best.value)) {
      id = Draw({.logits = part,
                 .begin = begin,
                 .count = count,
                 .max = best.value,
                 .least = LeastLogit(best.value, p.min_p_margin)},
                p, s.vocab, round);
    }
  }
  if (reports) {
    // The log-probability is of the logits before penalties and biases.
    const double reported = SoftCapped(logits[p.target >= 0 ? p.target : id], s.soft_cap);
    s.out[row] = {.id = id,
                  .logprob = static_cast<float>(reported - max - log(power.value)),
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
  State(int rows, int64_t ids) : max_rows(rows), vocab(ids), place(ids) {
    CUDA_CHECK(cudaMallocHost(&results, rows * sizeof(SampledToken)));
  }
  ~State() { cudaFreeHost(results); }

  int max_rows;
  int64_t vocab;
  Exchange exchange;      // row parameters, adjustments
  SampledToken* results;  // pinned, written by the kernel
  std::vector<Adjustment> adjustments;
  std::vector<int32_t> place;  // by id: index into adjustments + 1, of the row in hand

  void Adjust(const SampleRow& row);
};

Sampler::Sampler(int max_rows, int64_t vocab) : state_(std::make_unique<State>(max_rows, vocab)) {
  OCTAVO_CHECK(vocab <= int64_t{kCluster} * kMostTokens, vocab);
  CUDA_CHECK(cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kMostTokens * int{sizeof(float)}));
}
Sampler::~Sampler() = default;

// Appends the row's adjustments, no id twice.
void Sampler::State::Adjust(const SampleRow& row) {
  const size_t begin = adjustments.size();
  const auto at = [&](int32_t id) -> Adjustment& {
    if (place[id] == 0) {
      adjustments.push_back({.id = id, .add = 0, .penalty = 1});
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
  const size_t adjust_at = (rows * sizeof(RowParams) + 15) / 16 * 16;
  const size_t bytes = adjust_at + s.adjustments.size() * sizeof(Adjustment);
  s.exchange.Reserve(bytes);
  std::copy_n(params.data(), rows, reinterpret_cast<RowParams*>(s.exchange.host()));
  std::copy(s.adjustments.begin(), s.adjustments.end(),
            reinterpret_cast<Adjustment*>(s.exchange.host() + adjust_at));
  CUDA_CHECK(cudaMemcpyAsync(s.exchange.device(), s.exchange.host(), bytes, cudaMemcpyHostToDevice,
                             stream));
  const int64_t share = (s.vocab + 4 * kCluster - 1) / (4 * kCluster) * 4;
  Launch(sample_kernel, static_cast<unsigned>(kCluster * rows), kThreads, share * sizeof(float),
         stream,
         SampleParams{
             .logits = args.logits.Row<float>(0),
             .stride = args.logits.row_stride,
             .vocab = static_cast<int>(s.vocab),
             .soft_cap = args.soft_cap,
             .rows = reinterpret_cast<const RowParams*>(s.exchange.device()),
             .adjustments = reinterpret_cast<const Adjustment*>(s.exchange.device() + adjust_at),
             .out = s.results});
  CUDA_CHECK(cudaStreamSynchronize(stream));
  std::copy_n(s.results, rows, args.out.begin());
}

}  // namespace octavo::cuda
