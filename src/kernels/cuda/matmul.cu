// MatMuls: up to 8 rows by a kernel that streams the weights once (matmul_few.cuh), more by
// cuBLASLt with cached plans; float32 rows, of routers, by the former however many they are.
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "base/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_few.cuh"
#include "kernels/cuda/ops.h"

namespace octavo::cuda {
namespace {

constexpr int kFewRows = 8;
constexpr int kMostProjections = 3;
constexpr uint32_t kAlignment = 16;  // of all operands
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

// ---- few rows

struct FewPart {
  const BFloat16* weight;
  const void* bias;  // the type of bias_is_float
  void* out;
  int64_t out_stride;
  int outs;
  int first_block;
  bool out_is_float, bias_is_float;
};

struct FewParams {
  FewPart parts[kMostProjections];
  int count;
  const void* x;
  int64_t x_stride;
  int rows, k;
  bool accumulate;
};

// blockIdx.y: which 8 * kTiles rows.
template <class X, int kTiles, int kAhead, int kBlocks>
__global__ __launch_bounds__(BFloat16Few::kWarps * 32,
                             kBlocks) void matmul_few_kernel(const __grid_constant__ FewParams p) {
  __shared__ FewPartials<BFloat16Few::kWarps, kTiles> partials;
  const int block = static_cast<int>(blockIdx.x);
  int index = 0;
  while (index + 1 < p.count && block >= p.parts[index + 1].first_block) ++index;
  const FewPart& part = p.parts[index];
  const int first_out = (block - part.first_block) * kFewOuts;
  const int lane = static_cast<int>(threadIdx.x % 32), lane_k = lane % 4 * 8;
  float sums[1][kTiles][4] = {};
  const int first_row = static_cast<int>(blockIdx.y) * 8 * kTiles;
  BFloat16Few weights[] = {{part.weight, first_out, part.outs, p.k}};
  constexpr bool kEarlyX = kTiles == 1 && sizeof(X) == 2 && kAhead == BFloat16Few::kAhead;
  StreamFew<kAhead, kEarlyX, X>(
      weights, p.k,
      [&](int n) -> const X* {
        const int row = min(first_row + 8 * n + lane / 4, p.rows - 1);
        return static_cast<const X*>(p.x) + row * p.x_stride + lane_k;
      },
      [] { OverlapAndWaitForInputs(); }, sums);
  partials.Put(sums[0]);
  __syncthreads();
  const int rows = min(8 * kTiles, p.rows - first_row);
  for (int i = static_cast<int>(threadIdx.x); i < kFewOuts * rows; i += BFloat16Few::kWarps * 32) {
    const int out = i % kFewOuts, row = i / kFewOuts, column = first_out + out;
    if (column >= part.outs) continue;
    float value = partials.Sum(out, row);
    if (part.bias) {
      value += part.bias_is_float ? static_cast<const float*>(part.bias)[column]
                                  : ToFloat(static_cast<const BFloat16*>(part.bias)[column]);
    }
    const int64_t at = (first_row + row) * part.out_stride + column;
    if (part.out_is_float) {
      auto* const to = static_cast<float*>(part.out) + at;
      *to = p.accumulate ? *to + value : value;
    } else {
      static_cast<BFloat16*>(part.out)[at] = FromFloat<BFloat16>(value);
    }
  }
}

// ---- few rows of float32, few outputs: a router's. A warp per output, in float32 throughout.

constexpr int kThinWarps = 4;

// p.parts[0] only. Up to kRows rows.
template <int kRows>
__global__ __launch_bounds__(kThinWarps *
                             32) void matmul_thin_kernel(const __grid_constant__ FewParams p) {
  constexpr int kAhead = 8, kStep = 32 * 8;
  const FewPart& part = p.parts[0];
  const int lane_k = static_cast<int>(threadIdx.x % 32) * 8;
  const int out = static_cast<int>(blockIdx.x * kThinWarps + threadIdx.x / 32);
  const BFloat16* weights = part.weight + int64_t{min(out, part.outs - 1)} * p.k;
  uint4 w[kAhead];
  const auto load = [&](int slot, int at) {
    w[slot] = at < p.k ? LoadWeights(weights + at) : make_uint4(0, 0, 0, 0);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, lane_k + i * kStep);
  OverlapAndWaitForInputs();
  float sums[kRows] = {};
  for (int begin = lane_k; begin < p.k; begin += kAhead * kStep) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = begin + i * kStep;
      if (at < p.k) {
        const Vector8 weight = Load8(reinterpret_cast<const BFloat16*>(&w[i]));
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const Vector8 x =
              Load8(static_cast<const float*>(p.x) + min(row, p.rows - 1) * p.x_stride + at);
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[row] = fmaf(weight.v[j], x.v[j], sums[row]);
        }
      }
      load(i, at + kAhead * kStep);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sums[row] += __shfl_xor_sync(~0u, sums[row], lanes);
    if (out >= part.outs || row >= p.rows || lane_k != 0) continue;
    const float bias = part.bias ? static_cast<const float*>(part.bias)[out] : 0.0f;
    static_cast<float*>(part.out)[row * part.out_stride + out] = sums[row] + bias;
  }
}

void RunFew(const Tensor& x, std::span<const Projection> projections, bool accumulate,
            cudaStream_t stream) {
  FewParams params{.parts = {},
                   .count = static_cast<int>(projections.size()),
                   .x = x.data,
                   .x_stride = x.row_stride,
                   .rows = static_cast<int>(x.rows()),
                   .k = static_cast<int>(x.columns()),
                   .accumulate = accumulate};
  int blocks = 0;
  for (size_t i = 0; i < projections.size(); ++i) {
    const Projection& p = projections[i];
    const int outs = static_cast<int>(p.weight.rows());
    params.parts[i] = {.weight = static_cast<const BFloat16*>(p.weight.data),
                       .bias = p.bias.data,
                       .out = p.out.data,
                       .out_stride = p.out.row_stride,
                       .outs = outs,
                       .first_block = blocks,
                       .out_is_float = p.out.dtype == DType::kF32,
                       .bias_is_float = p.bias.dtype == DType::kF32};
    blocks += (outs + kFewOuts - 1) / kFewOuts;
  }
  if (x.dtype == DType::kF32 && params.rows <= 8 && params.count == 1 &&
      params.parts[0].out_is_float && !accumulate) {
    const auto thin = params.rows == 1   ? matmul_thin_kernel<1>
                      : params.rows <= 4 ? matmul_thin_kernel<4>
                                         : matmul_thin_kernel<8>;
    const int outs = params.parts[0].outs;
    Launch(thin, dim3(static_cast<unsigned>((outs + kThinWarps - 1) / kThinWarps)), kThinWarps * 32,
           0, stream, params);
    return;
  }
  const bool one = params.rows <= kFewRows;
  // So few blocks that each has to ask for more, that enough is on its way.
  const bool far = blocks <= 2 * Multiprocessors();
  constexpr int kAhead = BFloat16Few::kAhead, kFar = BFloat16Few::kFarAhead;
  const auto kernel =
      x.dtype != DType::kBF16
          ? (one ? matmul_few_kernel<float, 1, kAhead, 2> : matmul_few_kernel<float, 2, kAhead, 2>)
      : far ? matmul_few_kernel<BFloat16, 1, kFar, 2>
            : matmul_few_kernel<BFloat16, 1, kAhead, 3>;
  const int rows = one ? 8 : 16;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>((params.rows + rows - 1) / rows));
  Launch(kernel, grid, BFloat16Few::kWarps * 32, 0, stream, params);
}

// ---- many rows

void LtCheck(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(call) + ": " + cublasLtGetStatusString(status));
}
#define LT_CHECK(call) LtCheck((call), #call)

// What a cuBLASLt plan depends on. Rows come in every number, so they are rounded up to choose an
// algorithm, which does for the fewer.
struct Problem {
  int64_t rows, k, outs, x_stride, out_stride;
  DType out;
  bool bias;
  auto operator<=>(const Problem&) const = default;
};

cudaDataType CudaType(DType dtype) { return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

// out^T [outs, rows] = weight [k, outs]^T x^T [k, rows], column-major as cuBLAS sees them.
class LtPlan {
 public:
  LtPlan(cublasLtHandle_t handle, const Problem& problem) {
    LT_CHECK(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transposed = CUBLAS_OP_T;
    Set(CUBLASLT_MATMUL_DESC_TRANSA, transposed);
    if (problem.bias) {
      Set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      Set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CudaType(problem.out));
    }
    LT_CHECK(cublasLtMatrixLayoutCreate(&weight_, CUDA_R_16BF, problem.k, problem.outs, problem.k));
    LT_CHECK(
        cublasLtMatrixLayoutCreate(&x_, CUDA_R_16BF, problem.k, problem.rows, problem.x_stride));
    LT_CHECK(cublasLtMatrixLayoutCreate(&out_, CudaType(problem.out), problem.outs, problem.rows,
                                        problem.out_stride));
    cublasLtMatmulPreference_t preference = nullptr;
    LT_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    LT_CHECK(cublasLtMatmulPreferenceSetAttribute(preference,
                                                  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                  &kWorkspaceBytes, sizeof(kWorkspaceBytes)));
    // Parts of a sum are added in float32; whatever stands at the least alignment that is checked.
    const uint32_t schemes =
                       CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
                   alignment = kAlignment;
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const uint32_t& value) {
      LT_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
    };
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes);
    for (const auto operand :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      prefer(operand, alignment);
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, operation_, weight_, x_, out_, out_, preference, 1, &found, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    LtCheck(count > 0 ? status : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic");
    algorithm_ = found.algo;
  }
  LtPlan(const LtPlan&) = delete;
  ~LtPlan() {
    cublasLtMatrixLayoutDestroy(out_);
    cublasLtMatrixLayoutDestroy(x_);
    cublasLtMatrixLayoutDestroy(weight_);
    cublasLtMatmulDescDestroy(operation_);
  }

  void Run(cublasLtHandle_t handle, const Tensor& x, const void* weight, const void* bias,
           void* out, bool accumulate, void* workspace, cudaStream_t stream) {
    const uint64_t rows = static_cast<uint64_t>(x.rows());
    for (cublasLtMatrixLayout_t layout : {x_, out_}) {
      LT_CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_COLS, &rows,
                                                sizeof(rows)));
    }
    if (bias) Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    const float one = 1, before = accumulate ? 1 : 0;
    LT_CHECK(cublasLtMatmul(handle, operation_, &one, weight, weight_, x.data, x_, &before, out,
                            out_, out, out_, &algorithm_, workspace, kWorkspaceBytes, stream));
  }

 private:
  template <class T>
  void Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    LT_CHECK(cublasLtMatmulDescSetAttribute(operation_, attribute, &value, sizeof(value)));
  }

  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t weight_ = nullptr, x_ = nullptr, out_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_{};
};

void CheckShapes(const Tensor& x, std::span<const Projection> projections) {
  OCTAVO_CHECK((x.dtype == DType::kBF16 || x.dtype == DType::kF32) && x.columns() % 8 == 0 &&
                   (x.row_stride % 8 == 0 || x.rows() <= 1) &&
                   reinterpret_cast<uintptr_t>(x.data) % 16 == 0,
               ShapeString(x), x.row_stride);
  OCTAVO_CHECK(projections.size() <= kMostProjections, projections.size());
  for (const Projection& p : projections) {
    OCTAVO_CHECK(p.weight.dtype == DType::kBF16 && p.weight.contiguous() &&
                     p.weight.columns() == x.columns() &&
                     reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0,
                 ShapeString(p.weight), ShapeString(x));
    OCTAVO_CHECK(p.out.rows() == x.rows() && p.out.columns() == p.weight.rows() &&
                     (p.out.dtype == DType::kF32 || p.out.dtype == DType::kBF16),
                 ShapeString(p.out), ShapeString(p.weight));
    // cuBLASLt adds a bias of the output's type.
    OCTAVO_CHECK(!p.bias || (p.bias.size() == p.out.columns() && p.bias.dtype == p.out.dtype),
                 ShapeString(p.bias), ShapeString(p.out));
  }
}

// Weights one behind the other, outputs side by side: one matmul.
bool Adjacent(const Projection& a, const Projection& b) {
  const auto end = [](const Tensor& t) {
    return static_cast<std::byte*>(t.data) + t.columns() * static_cast<int64_t>(SizeOf(t.dtype));
  };
  const bool biases = a.bias ? b.bias && end(a.bias) == b.bias.data : !b.bias;
  return biases && a.out.dtype == b.out.dtype && a.out.row_stride == b.out.row_stride &&
         end(a.out) == b.out.data &&
         static_cast<std::byte*>(a.weight.data) + a.weight.size() * 2 == b.weight.data;
}

}  // namespace

struct MatMuls::State {
  State() {
    LT_CHECK(cublasLtCreate(&handle));
    CUDA_CHECK(cudaMalloc(&workspace, kWorkspaceBytes));
  }
  ~State() {
    plans.clear();
    cudaFree(workspace);
    cublasLtDestroy(handle);
  }

  LtPlan& Plan(const Problem& problem) {
    return plans.try_emplace(problem, handle, problem).first->second;
  }

  cublasLtHandle_t handle = nullptr;
  void* workspace = nullptr;
  std::map<Problem, LtPlan> plans;
};

MatMuls::MatMuls() : state_(std::make_unique<State>()) {}
MatMuls::~MatMuls() = default;

void MatMuls::Project(const Tensor& x, std::span<const Projection> projections, cudaStream_t stream,
                      bool accumulate) {
  CheckShapes(x, projections);
  for (const Projection& p : projections)
    OCTAVO_CHECK(!accumulate || p.out.dtype == DType::kF32, ShapeString(p.out));
  if (x.rows() <= kFewRows || x.dtype == DType::kF32) {
    RunFew(x, projections, accumulate, stream);
    return;
  }
  for (size_t i = 0; i < projections.size();) {
    const Projection& first = projections[i];
    int64_t outs = first.weight.rows();
    for (++i; i < projections.size() && Adjacent(projections[i - 1], projections[i]); ++i)
      outs += projections[i].weight.rows();
    const int64_t step = x.rows() <= 256 ? 16 : 128;
    OCTAVO_CHECK(
        reinterpret_cast<uintptr_t>(first.out.data) % kAlignment == 0 &&
            first.out.row_stride * static_cast<int64_t>(SizeOf(first.out.dtype)) % kAlignment == 0,
        ShapeString(first.out), first.out.row_stride);
    LtPlan& plan = state_->Plan({.rows = (x.rows() + step - 1) / step * step,
                                 .k = x.columns(),
                                 .outs = outs,
                                 .x_stride = x.row_stride,
                                 .out_stride = first.out.row_stride,
                                 .out = first.out.dtype,
                                 .bias = static_cast<bool>(first.bias)});
    plan.Run(state_->handle, x, first.weight.data, first.bias.data, first.out.data, accumulate,
             state_->workspace, stream);
  }
}

}  // namespace octavo::cuda
