// Gather, norm, what is owed, gated activation, rope table: a row per block (activation: eight
// elements per thread), 16 bytes per access. All are bound by memory with many rows and by latency
// with few.
#include <algorithm>

#include "base/error.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vector8.cuh"

namespace octavo::cuda {
namespace {

// Elements of a row; rows are `stride` apart. Both multiples of 8, as vectors need.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ T* At(int64_t row, int64_t column) const { return data + row * stride + column; }
};

template <class T>
Rows<T> RowsOf(const Tensor& t) {
  const bool vectors = t.columns() % 8 == 0 && (t.row_stride % 8 == 0 || t.rows() <= 1) &&
                       reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  OCTAVO_CHECK(!t || vectors, ShapeString(t), t.row_stride);
  OCTAVO_CHECK(!t || SizeOf(t.dtype) == sizeof(T), ShapeString(t));
  return {static_cast<T*>(t.data), t.row_stride};
}

int Threads(int64_t columns, int most = 1024) {
  return static_cast<int>(std::clamp<int64_t>((columns / 8 + 31) / 32 * 32, 32, most));
}

// f(T{}) with T float or BFloat16.
template <class F>
void ByType(DType dtype, const F& f) {
  OCTAVO_CHECK(dtype == DType::kF32 || dtype == DType::kBF16, Name(dtype));
  if (dtype == DType::kF32)
    f(float{});
  else
    f(BFloat16{});
}

template <class Table, class Out>
__global__ void gather_kernel(Rows<const Table> table, const int32_t* ids, float scale, int columns,
                              Rows<Out> out) {
  WaitForInputs();
  const int64_t row = blockIdx.x, id = ids[row];
  for (int i = static_cast<int>(threadIdx.x) * 8; i < columns;
       i += static_cast<int>(blockDim.x) * 8) {
    Vector8 x = Load8(table.At(id, i));
#pragma unroll
    for (float& v : x.v) v *= scale;
    Store8(out.At(row, i), x);
  }
}

__device__ float BlockSum(float x) {
  __shared__ float sums[32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// Eight columns of `count` terms, `stride` apart, added in order; several are on their way at once.
__device__ __forceinline__ Vector8 SumOfTerms(const float* terms, int count, int64_t stride) {
  constexpr int kAtOnce = 4;
  Vector8 sum{};
  for (int first = 0; first < count; first += kAtOnce) {
    Vector8 more[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k < count) more[k] = Load8(terms + (first + k) * stride);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k >= count) break;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum.v[j] += more[k].v[j];
    }
  }
  return sum;
}

struct NormParams {
  float* x;
  const float* terms;  // owed to x: [rows * term_count, columns]
  int term_count;
  const BFloat16* weight;
  BFloat16* rounded;  // optional
  int64_t x_stride, out_stride, rounded_stride;
  int columns;
  float eps, offset;
  bool accumulate;
};

// A thread keeps its vectors between the sum and the product. Terms take registers, which many rows
// want for more threads: only with kPays are there any.
constexpr int kNormThreads = 512;
template <int kVectors, class Out, bool kPays>
__global__ __launch_bounds__(kNormThreads) void norm_kernel(NormParams p, Out* out) {
  const int step = static_cast<int>(blockDim.x) * 8;
  const int first = static_cast<int>(threadIdx.x) * 8;
  const int64_t row = blockIdx.x;
  Vector8 x[kVectors], weight[kVectors];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    if (first + n * step < p.columns) weight[n] = Load8(p.weight + first + n * step);
  }
  OverlapAndWaitForInputs();
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int i = first + n * step;
    if (i >= p.columns) continue;
    float* const from = p.x + row * p.x_stride + i;
    x[n] = Load8(from);
    if constexpr (kPays) {
      const Vector8 sum =
          SumOfTerms(p.terms + row * p.term_count * p.columns + i, p.term_count, p.columns);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[n].v[k] += sum.v[k];
      Store8(from, x[n]);
    }
#pragma unroll
    for (float v : x[n].v) sum += v * v;
  }
  const float mean = BlockSum(sum) / static_cast<float>(p.columns);
  const float factor = 1.0f / sqrtf(mean + p.eps);
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int i = first + n * step;
    if (i >= p.columns) continue;
#pragma unroll
    for (int k = 0; k < 8; ++k) x[n].v[k] *= factor * (weight[n].v[k] + p.offset);
    Out* const to = out + row * p.out_stride + i;
    if (p.accumulate) {
      const Vector8 before = Load8(to);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[n].v[k] += before.v[k];
    }
    Store8(to, x[n]);
    if (p.rounded) Store8(p.rounded + row * p.rounded_stride + i, x[n]);
  }
}

template <class Out>
__global__ void settle_kernel(const float* terms, int count, int columns, bool accumulate,
                              Rows<Out> out) {
  OverlapAndWaitForInputs();
  const int64_t row = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < columns;
       i += static_cast<int>(blockDim.x) * 8) {
    Out* const to = out.At(row, i);
    const Vector8 before = accumulate ? Load8(to) : Vector8{};
    Vector8 sum = SumOfTerms(terms + row * count * columns + i, count, columns);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum.v[k] += before.v[k];
    Store8(to, sum);
  }
}

template <class T>
__global__ void activation_kernel(Activation activation, float limit, Rows<const T> gate,
                                  Rows<const T> up, Rows<T> out, int vectors, int64_t total) {
  WaitForInputs();
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= total) return;
  const int64_t row = index / vectors, i = index % vectors * 8;
  Vector8 g = Load8(gate.At(row, i));
  const Vector8 u = Load8(up.At(row, i));
  const Activator activated(activation, limit);
#pragma unroll
  for (int k = 0; k < 8; ++k) g.v[k] = activated(g.v[k], u.v[k]);
  Store8(out.At(row, i), g);
}

__global__ void rope_table_kernel(const int32_t* positions, const float* inv_freq, float scaling,
                                  int pairs, float* cos_sin) {
  WaitForInputs();
  const int64_t row = blockIdx.x;
  for (int j = static_cast<int>(threadIdx.x); j < pairs; j += static_cast<int>(blockDim.x)) {
    const float angle = __fmul_rn(static_cast<float>(positions[row]), inv_freq[j]);
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    cos_sin[row * 2 * pairs + j] = cosine * scaling;
    cos_sin[row * 2 * pairs + pairs + j] = sine * scaling;
  }
}

}  // namespace

void Gather(const GatherArgs& args, cudaStream_t stream) {
  const int64_t rows = args.ids.size(), columns = args.out.columns();
  OCTAVO_CHECK(args.out.rows() == rows && args.table.columns() == columns, ShapeString(args.table),
               ShapeString(args.out), rows);
  ByType(args.table.dtype, [&](auto table) {
    ByType(args.out.dtype, [&](auto out) {
      using Table = decltype(table);
      using Out = decltype(out);
      const Rows<Table> from = RowsOf<Table>(args.table);
      Launch(gather_kernel<Table, Out>, static_cast<unsigned>(rows), Threads(columns), 0, stream,
             Rows<const Table>{from.data, from.stride}, args.ids.Row<int32_t>(0), args.scale,
             static_cast<int>(columns), RowsOf<Out>(args.out));
    });
  });
}

void Norm(const NormArgs& args, cudaStream_t stream, const Owed& owed) {
  const int64_t columns = args.x.columns();
  OCTAVO_CHECK(args.x.dtype == DType::kF32 && columns <= 4 * 8 * kNormThreads, ShapeString(args.x));
  OCTAVO_CHECK(!args.accumulate || args.out.dtype == DType::kF32, ShapeString(args.out));
  OCTAVO_CHECK(
      !owed.terms || (owed.accumulate && owed.out.data == args.x.data &&
                      owed.out.rows() == args.x.rows() && owed.out.row_stride == args.x.row_stride),
      ShapeString(owed.out), ShapeString(args.x));
  const NormParams params{.x = RowsOf<float>(args.x).data,
                          .terms = owed.terms,
                          .term_count = owed.count,
                          .weight = RowsOf<BFloat16>(args.weight).data,
                          .rounded = RowsOf<BFloat16>(args.rounded).data,
                          .x_stride = args.x.row_stride,
                          .out_stride = args.out.row_stride,
                          .rounded_stride = args.rounded.row_stride,
                          .columns = static_cast<int>(columns),
                          .eps = args.eps,
                          .offset = args.offset,
                          .accumulate = args.accumulate};
  const int threads = Threads(columns, kNormThreads);
  const int64_t vectors = (columns / 8 + threads - 1) / threads;
  const auto launch = [&]<class Out, bool kPays>(Out, std::bool_constant<kPays>) {
    const auto kernel = vectors <= 1   ? norm_kernel<1, Out, kPays>
                        : vectors <= 2 ? norm_kernel<2, Out, kPays>
                                       : norm_kernel<4, Out, kPays>;
    Launch(kernel, static_cast<unsigned>(args.x.rows()), threads, 0, stream, params,
           RowsOf<Out>(args.out).data);
  };
  ByType(args.out.dtype, [&](auto out) {
    owed.terms ? launch(out, std::true_type{}) : launch(out, std::false_type{});
  });
}

void Settle(const Owed& owed, cudaStream_t stream) {
  ByType(owed.out.dtype, [&](auto out) {
    Launch(settle_kernel<decltype(out)>, static_cast<unsigned>(owed.out.rows()),
           Threads(owed.out.columns()), 0, stream, owed.terms, owed.count,
           static_cast<int>(owed.out.columns()), owed.accumulate, RowsOf<decltype(out)>(owed.out));
  });
}

void GatedActivation(const GatedActivationArgs& args, cudaStream_t stream) {
  const int64_t rows = args.out.rows(), columns = args.out.columns();
  OCTAVO_CHECK(args.gate.dtype == args.out.dtype && args.up.dtype == args.out.dtype &&
                   args.gate.columns() == columns && args.up.columns() == columns,
               ShapeString(args.gate), ShapeString(args.up), ShapeString(args.out));
  ByType(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    const Rows<T> gate = RowsOf<T>(args.gate), up = RowsOf<T>(args.up);
    constexpr int kThreads = 256;
    const int64_t total = rows * columns / 8;
    Launch(activation_kernel<T>, static_cast<unsigned>((total + kThreads - 1) / kThreads), kThreads,
           0, stream, args.activation, args.limit, Rows<const T>{gate.data, gate.stride},
           Rows<const T>{up.data, up.stride}, RowsOf<T>(args.out), static_cast<int>(columns / 8),
           total);
  });
}

void RopeTable(const RopeTableArgs& args, cudaStream_t stream) {
  const int64_t rows = args.positions.size(), pairs = args.inv_freq.size();
  OCTAVO_CHECK(args.cos_sin.rows() == rows && args.cos_sin.columns() == 2 * pairs,
               ShapeString(args.cos_sin), rows, pairs);
  Launch(rope_table_kernel, static_cast<unsigned>(rows), 128, 0, stream,
         args.positions.Row<int32_t>(0), args.inv_freq.Row<float>(0), args.scaling,
         static_cast<int>(pairs), args.cos_sin.Row<float>(0));
}

}  // namespace octavo::cuda
