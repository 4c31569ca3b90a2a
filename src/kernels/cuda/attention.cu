#include "octavo/attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/cuda/combine.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/table.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/widen_pages.h"

namespace octavo::cuda {
namespace {

// Device memory of a fixed size, zeroed.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t bytes) {
    const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 16));
    CUDA_CHECK(cudaMalloc(&data_, size));
    CUDA_CHECK(cudaMemset(data_, 0, size));
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  template <typename T>
  T* At(int64_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset);
  }

 private:
  void* data_ = nullptr;
};

// Pinned host memory that a copy may still be reading.
class StagingBuffer {
 public:
  explicit StagingBuffer(int64_t bytes) {
    CUDA_CHECK(cudaMallocHost(&data_, static_cast<size_t>(bytes)));
    CUDA_CHECK(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming));
  }
  ~StagingBuffer() {
    if (copied_) cudaEventDestroy(copied_);
    cudaFreeHost(data_);
  }
  StagingBuffer(const StagingBuffer&) = delete;
  std::byte* Wait() {
    CUDA_CHECK(cudaEventSynchronize(copied_));
    return static_cast<std::byte*>(data_);
  }
  void CopyTo(void* device, int64_t bytes, cudaStream_t stream) {
    CUDA_CHECK(
        cudaMemcpyAsync(device, data_, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(copied_, stream));
  }

 private:
  void* data_ = nullptr;
  cudaEvent_t copied_ = nullptr;
};

template <typename... Words>
[[noreturn]] void Refuse(const Words&... words) {
  std::string message;
  ((message += words), ...);
  throw std::invalid_argument(message);
}

void Expect(const char* argument, int64_t found, int64_t low, int64_t high) {
  if (found >= low && found <= high) return;
  Refuse(argument, " is ", std::to_string(found), ", expected ", std::to_string(low), " to ",
         std::to_string(high));
}

constexpr int kMany = 1 << 30;

bool HasStaticScale(KvFormat format) {
  return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
}

void CheckCapability() {
  int device = 0, major = 0, minor = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) {
    Refuse("the current CUDA device has compute capability ", std::to_string(major), ".",
           std::to_string(minor), ", expected 9.0");
  }
}

const KernelEntry* Need(Phase phase, const AttentionShape& shape, KvFormat k, KvFormat v,
                        const AttentionPlan::Options& options) {
  const KernelEntry* entry =
      FindKernel(phase, shape.head_dim, k, v, options.math, options.soft_cap);
  if (!entry) {
    Refuse("no ", phase == Phase::kDecode ? "decode" : "prefill", " kernel for head_dim ",
           std::to_string(shape.head_dim), ", K ", Name(k), ", V ", Name(v),
           options.math == AttentionMath::k16Bit ? ", 16-bit math" : ", FP8 math",
           options.soft_cap ? ", a soft cap" : "");
  }
  CUDA_CHECK(cudaFuncSetAttribute(entry->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  entry->shared_bytes));
  return entry;
}

AttentionShape CheckedShape(const AttentionShape& shape) {
  Expect("shape.kv_heads", shape.kv_heads, 1, kMany);
  Expect("shape.heads", shape.heads, shape.kv_heads, kMany);
  Expect("shape.heads % shape.kv_heads", shape.heads % shape.kv_heads, 0, 0);
  Expect("shape.window", shape.window, 0, kMany);
  return shape;
}

AttentionLimits CheckedLimits(AttentionLimits limits) {
  Expect("limits.tokens", limits.tokens, 1, kMany);
  Expect("limits.sequences", limits.sequences, 1, kMany);
  Expect("limits.sequence_tokens", limits.sequence_tokens, 0, limits.tokens);
  Expect("limits.kv_tokens", limits.kv_tokens, 0, kMany);
  if (limits.sequence_tokens == 0) limits.sequence_tokens = limits.tokens;
  return limits;
}

PlanConfig MakeConfig(const AttentionShape& shape, const AttentionLimits& limits,
                      const AttentionPlan::Options& options, KvFormat k, KvFormat v,
                      const KernelEntry* prefill) {
  const auto page_bytes = [&](KvFormat k, KvFormat v) {
    return int64_t{kPageSize} * shape.head_dim * (ElementSize(k) + ElementSize(v));
  };
  CheckCapability();
  PlanConfig config{
      .shape = shape,
      .limits = limits,
      .deterministic = options.deterministic,
      .fp8_prefill = options.math != AttentionMath::k16Bit,
      .page_bytes = page_bytes(k, v),
      .workers = Multiprocessors(),
  };
  if (!prefill) return config;
  config.prefill_rows = prefill->rows;
  config.prefill_tile_pages = prefill->tile_tokens / kPageSize;
  config.prefill_page_bytes = page_bytes(*prefill->k, *prefill->v);
  if (prefill->k == k && prefill->v == v) return config;
  Expect("limits.kv_tokens, for prefill widens pages", limits.kv_tokens, 1, kMany);
  const int64_t longest = MaxPrefillPages(shape, limits);
  config.widened_pages = std::clamp(options.widened_bytes / config.prefill_page_bytes, longest,
                                    longest * shape.kv_heads * limits.sequences);
  return config;
}

}  // namespace

struct AttentionPlan::State {
  State(const AttentionShape& shape_, KvFormat k, KvFormat v, const AttentionLimits& limits_,
        const Options& options_)
      : shape(CheckedShape(shape_)),
        limits(CheckedLimits(limits_)),
        options(options_),
        k_format(k),
        v_format(v),
        decode(Need(Phase::kDecode, shape, k, v, options)),
        prefill(int64_t{limits.sequence_tokens} * (shape.heads / shape.kv_heads) > kDecodeRows
                    ? Need(Phase::kPrefill, shape, k, v, options)
                    : nullptr),
        planner(MakeConfig(shape, limits, options, k, v, prefill)),
        upload(planner.layout().bytes),
        staging{StagingBuffer(planner.layout().bytes), StagingBuffer(planner.layout().bytes)},
        decode_out(planner.decode_partial_rows() * shape.head_dim * int64_t{sizeof(float)}),
        decode_lse(planner.decode_partial_rows() * int64_t{sizeof(float)}),
        prefill_out(planner.prefill_partial_rows() * shape.head_dim * int64_t{sizeof(float)}),
        prefill_lse(planner.prefill_partial_rows() * int64_t{sizeof(float)}),
        widened(planner.config().widened_pages * planner.config().prefill_page_bytes),
        counters(kCounters * int64_t{sizeof(int32_t)}),
        arrivals(planner.decode_combines() * int64_t{sizeof(int32_t)}) {}

  static constexpr int kCounters = 4;  // two of decode, two of prefill

  const AttentionShape shape;
  const AttentionLimits limits;
  const Options options;
  const KvFormat k_format, v_format;
  const KernelEntry *decode, *prefill;
  Planner planner;
  DeviceBuffer upload;
  StagingBuffer staging[2];
  int next_staging = 0;
  PlanCounts counts{};  // of the last Make
  DeviceBuffer decode_out, decode_lse, prefill_out, prefill_lse, widened, counters, arrivals;

  bool widens() const { return planner.config().widened_pages > 0; }
  DecodeParams Decode(const AttentionCall& call) const;
  PrefillParams Prefill(const AttentionCall& call) const;
  void LaunchPrefill(const AttentionCall& call, bool all, cudaStream_t stream) const;
};

AttentionPlan::AttentionPlan(const AttentionShape& shape, KvFormat k_format, KvFormat v_format,
                             const AttentionLimits& limits, const Options& options)
    : state_(std::make_unique<State>(shape, k_format, v_format, limits, options)) {}

AttentionPlan::~AttentionPlan() = default;

const uint8_t* AttentionPlan::fp8_queries() const {
  return state_->upload.At<uint8_t>(state_->planner.layout().fp8_queries);
}

void AttentionPlan::Make(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len,
                         Stream stream) {
  State& s = *state_;
  Expect("kv_len.size()", std::ssize(kv_len), 0, s.limits.sequences);
  Expect("q_begin.size()", std::ssize(q_begin), std::ssize(kv_len) + 1, std::ssize(kv_len) + 1);
  Expect("q_begin[0]", q_begin[0], 0, s.limits.tokens);
  Expect("q_begin.back()", q_begin.back(), q_begin[0], s.limits.tokens);
  for (size_t i = 0; i < kv_len.size(); ++i) {
    const int tokens = q_begin[i + 1] - q_begin[i];
    Expect("query tokens of a sequence", tokens, 0, s.limits.sequence_tokens);
    Expect("kv_len", kv_len[i], kv_len[i] == 0 ? 0 : tokens,
           s.limits.kv_tokens > 0 ? s.limits.kv_tokens : kMany);
  }
  StagingBuffer& staging = s.staging[s.next_staging];
  s.next_staging ^= 1;
  std::byte* lists = staging.Wait();
  const int64_t bytes = s.planner.Make(q_begin, kv_len, lists);
  s.counts = *reinterpret_cast<const PlanCounts*>(lists);
  staging.CopyTo(s.upload.At<void>(), bytes, static_cast<cudaStream_t>(stream));
}

DecodeParams AttentionPlan::State::Decode(const AttentionCall& call) const {
  const PlanLayout& lists = planner.layout();
  return {
      .items = upload.At<WorkItem>(lists.decode_items),
      .links = upload.At<ItemLink>(lists.decode_links),
      .counts = upload.At<PlanCounts>(lists.counts),
      .arrivals = arrivals.At<int32_t>(),
      .counters = counters.At<int32_t>(),
      .partials = {.out = decode_out.At<float>(), .lse2 = decode_lse.At<float>()},
      .block_table = call.block_table.entries,
      .block_table_stride = call.block_table.stride,
      .claims = call.cache.arena + call.cache.claim_offset,
      .k_format = k_format,
      .v_format = v_format,
      .k_scale = HasStaticScale(k_format) ? call.cache.k_scale : nullptr,
      .v_scale = HasStaticScale(v_format) ? call.cache.v_scale : nullptr,
      .heads = shape.heads,
      .group = shape.heads / shape.kv_heads,
      .group_inverse = GroupInverse(shape.heads / shape.kv_heads),
      .window = shape.window,
      .scale = call.scale * (call.soft_cap > 0 ? 2 * kLog2E / call.soft_cap : kLog2E),
      .soft_cap = call.soft_cap,
      .sinks = call.sinks,
      .q = call.q,
      .out = call.out,
      .lse = call.lse,
  };
}

namespace {

void CheckCall(const AttentionCall& call) {
  if (!call.plan) Refuse("call.plan is null");
  const AttentionPlan::State& s = call.plan->state();
  const KvLayout& layout = call.cache.layout;
  if (layout.k_format != s.k_format || layout.v_format != s.v_format) {
    Refuse("call.cache holds K ", Name(layout.k_format), " and V ", Name(layout.v_format),
           ", the plan was made for ", Name(s.k_format), " and ", Name(s.v_format));
  }
  Expect("call.cache.layout.kv_heads", layout.kv_heads, s.shape.kv_heads, s.shape.kv_heads);
  Expect("call.cache.layout.head_dim", layout.head_dim, s.shape.head_dim, s.shape.head_dim);
  if (!call.q || !call.out || !call.cache.arena || !call.block_table.entries) {
    Refuse("call.q, out, cache.arena or block_table.entries is null");
  }
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (misaligned(call.q) || misaligned(call.q_fp8) || misaligned(call.out) ||
      misaligned(call.cache.arena)) {
    Refuse("call.q, q_fp8, out and cache.arena must be multiples of 16 bytes");
  }
  Expect("call.cache.claim_offset % 1024", call.cache.claim_offset % kPageUnit, 0, 0);
  if (call.soft_cap != 0 && !s.options.soft_cap) {
    Refuse("call.soft_cap is ", std::to_string(call.soft_cap),
           ", but the plan was made without options.soft_cap");
  }
  if (s.prefill && s.options.math != AttentionMath::k16Bit && (!call.q_fp8 || !call.q_scale)) {
    Refuse("call.q_fp8 or q_scale is null, but the plan's prefill computes in FP8");
  }
}

// The kernels wait by themselves for what was launched before them (launch.cuh).
void Launch(const KernelEntry& entry, int blocks, const void* params, cudaStream_t stream) {
  void* arguments[] = {const_cast<void*>(params)};
  cudaLaunchAttribute early = EarlyLaunch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(entry.threads));
  config.dynamicSmemBytes = static_cast<size_t>(entry.shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelExC(&config, entry.function, arguments));
}

}  // namespace

// Of all rounds.
PrefillParams AttentionPlan::State::Prefill(const AttentionCall& call) const {
  const bool fp8 = options.math != AttentionMath::k16Bit;
  const KvLayout& layout = call.cache.layout;
  PrefillParams params;
  params.q = MakeQueryMap(fp8 ? call.q_fp8 : call.q, shape.head_dim * (fp8 ? 1 : 2), shape.heads,
                          limits.tokens, planner.prefill_pack());
  PageMaps maps;
  if (widens()) {
    const int64_t page_bytes = planner.config().prefill_page_bytes;
    maps = MakePageMaps({*prefill->k, *prefill->v, 1, shape.head_dim}, widened.At<std::byte>(),
                        page_bytes, planner.config().widened_pages);
  } else {
    // Any 1 KiB of a 2 TiB arena may begin a page.
    maps = MakePageMaps(layout, call.cache.Claim(0), kPageUnit, int64_t{1} << 31);
    params.block_table = call.block_table.entries;
    params.block_table_stride = call.block_table.stride;
  }
  params.k = maps.k;
  params.v = maps.v;
  params.items = upload.At<WorkItem>(planner.layout().prefill_items);
  params.counters = counters.At<int32_t>() + 2;
  params.partials = {.out = prefill_out.At<float>(), .lse2 = prefill_lse.At<float>()};
  params.heads = shape.heads;
  params.group = shape.heads / shape.kv_heads;
  params.pack_shift = std::countr_zero(static_cast<unsigned>(planner.prefill_pack()));
  params.window = shape.window;
  params.scale_log2 = call.scale * kLog2E;
  params.soft_cap = call.soft_cap;
  params.q_scale = fp8 ? call.q_scale : nullptr;
  params.k_scale = HasStaticScale(layout.k_format) ? call.cache.k_scale : nullptr;
  params.v_scale = HasStaticScale(layout.v_format) ? call.cache.v_scale : nullptr;
  params.sinks = call.sinks;
  params.out = call.out;
  params.lse = call.lse;
  return params;
}

// all: whatever a later plan may need.
void AttentionPlan::State::LaunchPrefill(const AttentionCall& call, bool all,
                                         cudaStream_t stream) const {
  const PlanLayout& lists = planner.layout();
  const int blocks = planner.config().workers;
  const int rounds = all ? planner.max_rounds() : static_cast<int>(planner.rounds().size());
  PrefillParams params = Prefill(call);
  for (int i = 0; i < rounds; ++i) {
    const auto* round = upload.At<PrefillRound>(lists.prefill_rounds) + i;
    if (widens()) {
      WidenPages({.cache = call.cache,
                  .block_table = call.block_table,
                  .items = upload.At<WidenItem>(lists.widens),
                  .round = round,
                  .format = *prefill->k,
                  .out = widened.At<std::byte>()},
                 blocks, stream);
    }
    params.round = &round->items;
    Launch(*prefill, blocks, &params, stream);
    if (!all && planner.rounds()[i].combines.count == 0) continue;
    const CombineOutput output{.partials = params.partials,
                               .heads = params.heads,
                               .group = params.group,
                               .v_scale = params.v_scale,
                               .sinks = params.sinks,
                               .out = params.out,
                               .lse = params.lse};
    LaunchCombine(shape.head_dim, output, upload.At<CombineItem>(lists.prefill_combines),
                  &round->combines, prefill->rows, blocks, stream);
  }
}

void Attention(const AttentionCall& call, Stream stream_) {
  CheckCall(call);
  const AttentionPlan::State& s = call.plan->state();
  auto stream = static_cast<cudaStream_t>(stream_);
  // A captured graph serves later plans too, whatever this one holds.
  cudaStreamCaptureStatus capturing;
  CUDA_CHECK(cudaStreamIsCapturing(stream, &capturing));
  const bool all = capturing != cudaStreamCaptureStatusNone;
  if (all || s.counts.decode_items > 0) {
    const DecodeParams params = s.Decode(call);
    Launch(*s.decode, s.planner.config().workers, &params, stream);
  }
  if (s.prefill && (all || s.planner.rounds()[0].items.count > 0)) {
    s.LaunchPrefill(call, all, stream);
  }
}

}  // namespace octavo::cuda
