// The CUDA backend: one stream, cuBLASLt and our own kernels behind kernels/backend.h, and the
// entry that the program looks up.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/cuda/bandwidth.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/library.h"
#include "kernels/cuda/ops.h"
#include "octavo/attention.h"

namespace octavo::cuda {
namespace {

Memory AllocateDevice(size_t bytes) {
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) != cudaSuccess) {
    cudaGetLastError();  // or the next check finds it
    return {};
  }
  CUDA_CHECK(cudaMemset(data, 0, bytes));
  CUDA_CHECK(cudaStreamSynchronize(nullptr));  // our stream does not wait for that one
  return Memory(static_cast<std::byte*>(data), bytes, [](std::byte* p) { cudaFree(p); });
}

// A plan, and the queries that Append prepares for FP8 prefill.
class StepPlan final : public octavo::AttentionPlan {
 public:
  StepPlan(const AttentionPlanSpec& spec, cudaStream_t stream)
      : octavo::AttentionPlan(spec.shape),
        stream_(stream),
        plan_(spec.shape, spec.k_format, spec.v_format,
              {.tokens = spec.max_tokens,
               .sequences = spec.max_sequences,
               .sequence_tokens = spec.max_sequence_tokens,
               .kv_tokens = spec.max_kv_tokens},
              {.math = spec.math, .soft_cap = spec.soft_cap}) {
    if (spec.math == AttentionMath::k16Bit || spec.max_sequence_tokens == 1) return;
    const size_t rows =
        static_cast<size_t>(spec.max_tokens) * static_cast<size_t>(spec.shape.heads);
    q_fp8_ = AllocateDevice(rows * static_cast<size_t>(spec.shape.head_dim));
    q_scale_ = AllocateDevice(rows * sizeof(float));
    if (!q_fp8_.data() || !q_scale_.data())
      throw std::runtime_error("out of memory for FP8 queries; lower --max-num-batched-tokens");
  }

  void Make(const BatchView& batch) override { plan_.Make(batch.q_begin, batch.kv_len, stream_); }

  const cuda::AttentionPlan& plan() const { return plan_; }
  const uint8_t* fp8_queries() const { return q_fp8_.data() ? plan_.fp8_queries() : nullptr; }
  void* q_fp8() const { return q_fp8_.data(); }
  float* q_scale() const { return reinterpret_cast<float*>(q_scale_.data()); }

 private:
  cudaStream_t stream_;
  cuda::AttentionPlan plan_;
  Memory q_fp8_, q_scale_;
};

class RecordedGraph final : public Graph {
 public:
  RecordedGraph(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    CUDA_CHECK(cudaGraphInstantiate(&graph_, graph, 0));
  }
  ~RecordedGraph() override { cudaGraphExecDestroy(graph_); }
  void Run() override { CUDA_CHECK(cudaGraphLaunch(graph_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(std::string name) : name_(std::move(name)) {
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~CudaBackend() override { cudaStreamDestroy(stream_); }

  const char* name() const override { return name_.c_str(); }
  DType intermediate_dtype() const override { return DType::kBF16; }

  void Reserve(const BackendLimits& limits) override {
    matmuls_ = std::make_unique<MatMuls>();
    if (limits.experts > 0) {
      experts_ = std::make_unique<cuda::Experts>(
          cuda::Experts::Limits{.rows = limits.tokens,
                                .experts = limits.experts,
                                .top_k = limits.top_k,
                                .hidden = limits.hidden,
                                .intermediate = limits.expert_intermediate});
    }
    sampler_ = std::make_unique<Sampler>(limits.sample_rows, limits.vocab);
  }

  Memory Allocate(size_t bytes) override { return AllocateDevice(bytes); }
  Memory AllocateHost(size_t bytes) override {
    void* data = nullptr;
    if (cudaMallocHost(&data, bytes) != cudaSuccess) {
      cudaGetLastError();
      return {};
    }
    std::fill_n(static_cast<std::byte*>(data), bytes, std::byte{});
    return Memory(static_cast<std::byte*>(data), bytes, [](std::byte* p) { cudaFreeHost(p); });
  }
  MemoryInfo memory_info() override {
    MemoryInfo info;
    CUDA_CHECK(cudaMemGetInfo(&info.free, &info.total));
    return info;
  }
  void Upload(void* to, const void* from, size_t bytes) override {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, Stream()));
  }
  void Download(void* to, const void* from, size_t bytes) override {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, Stream()));
    Wait();
  }
  double ReadBandwidth() override { return cuda::ReadBandwidth(); }
  void Wait() override { CUDA_CHECK(cudaStreamSynchronize(Stream())); }
  std::unique_ptr<Graph> Record(const std::function<void()>& body) override {
    CUDA_CHECK(cudaStreamBeginCapture(Stream(), cudaStreamCaptureModeThreadLocal));
    body();
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamEndCapture(Stream(), &graph));
    auto recorded = std::make_unique<RecordedGraph>(graph, stream_);
    cudaGraphDestroy(graph);
    return recorded;
  }

  void Gather(const GatherArgs& args) override { cuda::Gather(args, Stream()); }
  void Norm(const NormArgs& args) override {
    if (owed_.terms && owed_.accumulate && owed_.out.data == args.x.data) {
      cuda::Norm(args, stream_, std::exchange(owed_, {}));
    } else {
      cuda::Norm(args, Stream());
    }
  }
  void MatMul(const MatMulArgs& args) override {
    const Projection one[] = {{args.weight, args.bias, args.out}};
    matmuls_->Project(args.x, one, Stream(), args.accumulate);
  }
  void Project(const Tensor& x, std::span<const Projection> projections) override {
    matmuls_->Project(x, projections, Stream());
  }
  void GatedProject(const Tensor& x, const Projection& gate, const Projection& up,
                    const GatedActivationArgs& args) override {
    if (!cuda::GatedProject(x, gate, up, args, Stream())) Backend::GatedProject(x, gate, up, args);
  }
  void GatedActivation(const GatedActivationArgs& args) override {
    cuda::GatedActivation(args, Stream());
  }
  void Route(const RouteArgs& args) override { cuda::Route(args, Stream()); }
  void Experts(const ExpertsArgs& args) override { owed_ = experts_->Run(args, Stream()); }
  void RopeTable(const RopeTableArgs& args) override { cuda::RopeTable(args, Stream()); }

  void Append(const AppendArgs& args) override {
    const StepPlan& plan = PlanOf(args.plan);
    OCTAVO_CHECK(args.q.dtype == DType::kF32 && args.k.dtype == DType::kF32 &&
                     args.v.dtype == DType::kF32 && args.q_out.dtype == DType::kBF16 &&
                     args.q_out.contiguous(),
                 ShapeString(args.q), ShapeString(args.q_out));
    cuda::Append({.tokens = args.batch->tokens,
                  .heads = args.heads,
                  .input = AppendCall::Input::kF32,
                  .q = args.q.data,
                  .k = args.k.data,
                  .v = args.v.data,
                  .q_stride = args.q.row_stride,
                  .k_stride = args.k.row_stride,
                  .v_stride = args.v.row_stride,
                  .q_norm = args.q_norm.data,
                  .k_norm = args.k_norm.data,
                  .norm_eps = args.norm_eps,
                  .norm_offset = args.norm_offset,
                  .cos_sin = static_cast<const float*>(args.cos_sin.data),
                  .rotary_dim = static_cast<int>(args.cos_sin.columns()),
                  .slots = args.batch->slots.Row<int64_t>(0),
                  .cache = args.cache,
                  .q_out = args.q_out.data,
                  .fp8_queries = plan.fp8_queries(),
                  .q_fp8 = plan.q_fp8(),
                  .q_scale = plan.q_scale()},
                 Stream());
  }
  std::unique_ptr<octavo::AttentionPlan> PlanAttention(const AttentionPlanSpec& spec) override {
    return std::make_unique<StepPlan>(spec, Stream());
  }
  void Attention(const AttentionArgs& args) override {
    const StepPlan& plan = PlanOf(args.plan);
    OCTAVO_CHECK(args.q.dtype == DType::kBF16 && args.q.contiguous() &&
                     args.out.dtype == DType::kBF16 && args.out.contiguous(),
                 ShapeString(args.q), ShapeString(args.out));
    const Tensor& table = args.batch->block_table;
    cuda::Attention({.plan = &plan.plan(),
                     .cache = args.cache,
                     .block_table = {table.Row<uint32_t>(0), table.row_stride},
                     .q = args.q.data,
                     .q_fp8 = plan.q_fp8(),
                     .q_scale = plan.q_scale(),
                     .scale = args.scale,
                     .soft_cap = args.soft_cap,
                     .sinks = static_cast<const float*>(args.sinks.data),
                     .out = args.out.data},
                    Stream());
  }
  void Sample(const SampleArgs& args) override { sampler_->Run(args, Stream()); }

 private:
  // Where ops go, after what is owed to the last one's output; Norm may pay that itself.
  cudaStream_t Stream() {
    if (owed_.terms) Settle(std::exchange(owed_, {}), stream_);
    return stream_;
  }
  static const StepPlan& PlanOf(const octavo::AttentionPlan* plan) {
    OCTAVO_CHECK(plan != nullptr);
    return *static_cast<const StepPlan*>(plan);
  }

  std::string name_;
  cudaStream_t stream_ = nullptr;
  Owed owed_;
  std::unique_ptr<MatMuls> matmuls_;
  std::unique_ptr<cuda::Experts> experts_;
  std::unique_ptr<Sampler> sampler_;
};

}  // namespace
}  // namespace octavo::cuda

extern "C" {

const char* octavo_cuda_build_id() { return OCTAVO_BUILD_ID; }

octavo::Backend* octavo_make_cuda_backend(char* reason, size_t reason_bytes) {
  const auto refuse = [&](const std::string& why) {
    std::snprintf(reason, reason_bytes, "%s", why.c_str());
    return nullptr;
  };
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess)
    return refuse(std::string("no CUDA device: ") + cudaGetErrorString(error));
  try {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    if (properties.major != 9 || properties.minor != 0) {
      return refuse(std::string(properties.name) + " has compute capability " +
                    std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                    ", expected 9.0");
    }
    return new octavo::cuda::CudaBackend(properties.name);
  } catch (const std::exception& error) {
    return refuse(error.what());
  }
}
}
