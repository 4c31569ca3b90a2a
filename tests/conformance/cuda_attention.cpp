// cuda::Attention against attention in double precision on the same cache and the same queries (in
// FP8 math those that Append rounded to e4m3), so that what is left is the kernels' own arithmetic.
//
// Limits, as relative L2 of everything and of any row (64 to 256 elements):
// - 16-bit math: rounding the output to bfloat16 alone is 1.66e-3 (simulated on Gaussian data);
//   with P in bfloat16 (V in bfloat16 pages) 2.1e-3 to 2.4e-3, 3.1e-3 in a row; with P in float16
//   1.7e-3 and 2.3e-3.
// - FP8 math: P in e4m3 has a rounding error of 2^-4 / sqrt(12) to half of that, evenly spread: 2
// to
//   2.6 % where V has no mean; in a row the few largest P may be unlucky together.
// lse, absolute: float32 sums of float32 exponentials; FP8 math may sum the rounded P.
#include <cmath>
#include <cstring>

#include "attention_cases.h"
#include "cuda_batch.h"
#include "cuda_memory.h"
#include "kernels/reference/attention.h"

namespace octavo::conformance {
namespace {

struct CudaCase {
  AttentionCase c;  // group, formats, window and so on
  AttentionMath math = AttentionMath::k16Bit;
  bool deterministic = false;
  int nan_sequence = -1;
  int64_t widened_bytes = int64_t{256} << 20;

  std::string Name() const {
    const char* const maths[] = {"16bit", "fp8", "fp8 tensor-core"};
    return std::string(maths[static_cast<int>(math)]) + (deterministic ? " deterministic " : " ") +
           c.Name() + (widened_bytes == 0 ? " rounds" : "") +
           (nan_sequence >= 0 ? " NaN in sequence " + std::to_string(nan_sequence) : "");
  }
};

struct ErrorLimits {
  double relative_l2, worst_row, lse;
};
ErrorLimits LimitsOf(const CudaCase& c) {
  if (c.math == AttentionMath::kFp8) return {3e-2, 8e-2, 3e-2};
  if (c.math == AttentionMath::kFp8TensorCore) return {4e-2, 1e-1, 3e-2};
  // An output in bfloat16 is off by 2^-7 / sqrt(12) = 2.3e-3 in the mean where its mantissa is
  // small (1.7e-3 over all mantissas), a row of 64 by 2.9e-3 in one of a thousand. A probability in
  // bfloat16 is off by 2^-8 = 3.9e-3 at most, which shows where one key outweighs all others, and
  // in float16 by an eighth of it.
  constexpr double kOut = 2.3e-3, kOutRow = 2.9e-3;
  // Prefill computes in bfloat16 if K or V is. Keys with token scales are rounded to its type, so
  // that scores are off by 2^-12, in bfloat16 2^-9, of what their terms add up to in quadrature:
  // some units.
  const bool bfloat16 = c.c.k_format == KvFormat::kBF16 || c.c.v_format == KvFormat::kBF16;
  const bool rounded = HasTokenScales(c.c.k_format);
  if (bfloat16) {
    const double key = rounded ? 6e-3 : 0;
    return {std::hypot(kOut, 1.7e-3, key / 2), std::hypot(kOutRow, 3.9e-3, key),
            rounded ? 8e-3 : 1e-4};
  }
  return {std::hypot(kOut, 0.2e-3), std::hypot(kOutRow, 0.5e-3), rounded ? 1e-3 : 1e-4};
}

CacheSpec CacheOf(const CudaCase& c) {
  return {.k_format = c.c.k_format,
          .v_format = c.c.v_format,
          .kv_heads = c.c.kv_heads,
          .head_dim = c.c.head_dim,
          .lengths = Lengths(c.c),
          .nan_sequence = c.nan_sequence,
          .seed = c.c.seed};
}
StepSpec StepOf(const CudaCase& c) {
  StepSpec step{.group = c.c.group,
                .window = c.c.window,
                .sinks = c.c.sinks,
                .soft_cap = c.c.soft_cap,
                .math = c.math,
                .deterministic = c.deterministic,
                .widened_bytes = c.widened_bytes,
                .seed = c.c.seed};
  for (const SequenceCase& s : c.c.sequences) step.tokens.push_back(s.tokens);
  return step;
}

std::string Judge(const Result& actual, const Result& expected, int head_dim,
                  const ErrorLimits& limits) {
  if (!actual.failure.empty()) return actual.failure;
  const Comparison comparison = Compare(actual, expected, head_dim);
  if (!comparison.finite_alike) return "finite where the reference is not, or the reverse";
  auto above = [](const char* what, double found, double limit) {
    char text[100];
    std::snprintf(text, sizeof(text), "%s %.3g, limit %.3g", what, found, limit);
    return found <= limit ? std::string() : std::string(text);
  };
  for (const std::string& failure :
       {above("relative L2", comparison.relative_l2, limits.relative_l2),
        above("relative L2 of a row", comparison.worst_row, limits.worst_row),
        above("lse off by", comparison.lse, limits.lse)}) {
    if (!failure.empty()) return failure;
  }
  return "";
}

std::string RunCase(const CudaCase& c) {
  try {
    const DeviceCache cache(CacheOf(c));
    DeviceStep step(cache, StepOf(c));
    const Result actual = step.Run();
    return Judge(actual, step.Oracle(), c.c.head_dim, LimitsOf(c));
  } catch (const std::exception& error) {
    return error.what();
  }
}

// ---- the list

using Batch = std::vector<SequenceCase>;
const Batch kDecodes = {{0, 1}, {62, 1}, {63, 1}, {64, 1}, {999, 1}, {0, 0}, {337, 1}, {4999, 1}};
const Batch kPrompts = {{0, 1}, {0, 63}, {0, 64}, {0, 65}, {0, 0}, {0, 131}, {0, 300}};
const Batch kMixed = {{100, 37}, {70, 1}, {0, 50}, {64, 64}, {200, 2}, {1000, 129}, {5000, 1}};
const Batch kSplit = {{20000, 1}, {1100, 20}, {9000, 130}};

std::vector<CudaCase> Cases(bool quick) {
  constexpr KvFormat kFormats[] = {KvFormat::kBF16,    KvFormat::kFp8E4M3,
                                   KvFormat::kFp8E5M2, KvFormat::kFp8PerTokenHead,
                                   KvFormat::kF16,     KvFormat::kInt8PerTokenHead};
  std::vector<CudaCase> cases;
  auto add = [&](CudaCase c) {
    c.c.seed = 7000 + cases.size();
    c.c.dtype = DType::kBF16;
    cases.push_back(c);
    // FP8 math changes prefill alone, and only over these formats.
    const bool fp8 = c.c.k_format == KvFormat::kFp8E4M3 && c.c.v_format == KvFormat::kFp8E4M3 &&
                     c.c.soft_cap == 0 && c.math == AttentionMath::k16Bit;
    bool prefills = false;
    for (const SequenceCase& s : c.c.sequences) prefills |= s.tokens * c.c.group > 16;
    if (!fp8 || !prefills) return;
    for (AttentionMath math : {AttentionMath::kFp8, AttentionMath::kFp8TensorCore}) {
      c.math = math;
      cases.push_back(c);
    }
  };
  // The cases of every backend.
  for (const AttentionCase& c : AttentionCases()) {
    const bool dim = c.head_dim == 64 || c.head_dim == 128 || c.head_dim == 256;
    if (quick || !dim || c.k_format == KvFormat::kF32 || c.v_format == KvFormat::kF32) continue;
    add({.c = c});
  }
  for (int head_dim : {64, 128, 256}) {
    const AttentionCase base{.group = 4, .head_dim = head_dim};
    auto with = [&](KvFormat k, KvFormat v, const Batch& batch) {
      CudaCase c{.c = base};
      c.c.k_format = k;
      c.c.v_format = v;
      c.c.sequences = batch;
      return c;
    };
    for (KvFormat k : kFormats) {
      for (KvFormat v : kFormats) {
        if (quick && k != v) continue;
        // A model has one 16-bit type; prefill refuses a cache of two.
        if (k != v && ElementSize(k) == 2 && ElementSize(v) == 2) continue;
        add(with(k, v, kMixed));
        if (!quick) add(with(k, v, kDecodes));
      }
    }
    for (KvFormat format : {KvFormat::kBF16, KvFormat::kFp8E4M3}) {
      for (int group : {1, 2, 5, 8, 16}) {
        for (const Batch& batch : {kDecodes, kPrompts, kMixed}) {
          if (quick && (group != 5 || format == KvFormat::kBF16)) continue;
          CudaCase c = with(format, format, batch);
          c.c.group = group;
          add(c);
        }
      }
    }
    for (KvFormat format : {KvFormat::kBF16, KvFormat::kFp8E4M3, KvFormat::kInt8PerTokenHead}) {
      for (const Batch& batch : {kMixed, kSplit}) {
        if (quick && &batch == &kSplit) continue;
        for (int window : {1, 16, 64, 65, 200, 1000}) {
          if (quick && window != 65) continue;
          CudaCase c = with(format, format, batch);
          c.c.window = window;
          c.c.sinks = window % 16 == 0;
          add(c);
        }
        CudaCase c = with(format, format, batch);
        c.c.sinks = true;
        add(c);
        c.deterministic = true;
        add(c);
        c.c.soft_cap = 20;
        c.c.sinks = false;
        if (!quick) add(c);
        c = with(format, format, batch);
        if (!quick) add(c);
        c.nan_sequence = 1;
        add(c);
        if (ElementSize(format) == 1) {  // a kv head at a time
          c.widened_bytes = 0;
          add(c);
        }
      }
    }
  }
  return cases;
}

// ---- the oracle itself, and what a list of cases does not say

// The device's double precision against kernels/reference.
std::string CheckOracle(const CudaCase& c) {
  const DeviceCache cache(CacheOf(c));
  DeviceStep step(cache, StepOf(c));
  step.Plan();
  const Result oracle = step.Oracle();
  const std::vector<uint16_t> q = step.queries();
  const int heads = c.c.heads(), dim = c.c.head_dim;
  std::vector<std::byte> arena = cache.arena().Download();
  std::vector<float> k_scale, v_scale, sinks, out(oracle.out.size());
  for (int head = 0; head < heads; ++head) sinks.push_back(0.7f * static_cast<float>(head % 5) - 1);
  KvLayer layer = cache.layer();
  for (auto [host, device] : {std::pair{&k_scale, &layer.k_scale}, {&v_scale, &layer.v_scale}}) {
    host->resize(c.c.kv_heads);
    OCTAVO_CUDA(cudaMemcpy(host->data(), *device, host->size() * 4, cudaMemcpyDeviceToHost));
    *device = host->data();
  }
  layer.arena = arena.data();
  std::vector<int32_t> q_begin{0}, kv_len = Lengths(c.c);
  for (const SequenceCase& s : c.c.sequences) q_begin.push_back(q_begin.back() + s.tokens);
  const BatchView batch{
      .tokens = q_begin.back(),
      .q_begin = q_begin,
      .kv_len = kv_len,
      .block_table = Tensor(cache.table().data(), DType::kI32,
                            {static_cast<int64_t>(kv_len.size()), cache.stride()})};
  const reference::NoPlan plan({heads, c.c.kv_heads, dim, c.c.window});
  reference::Attention(
      {.q = Tensor(q.data(), DType::kBF16, {batch.tokens, int64_t{heads} * dim}),
       .out = Tensor(out.data(), DType::kF32, {batch.tokens, int64_t{heads} * dim}),
       .batch = &batch,
       .plan = &plan,
       .cache = layer,
       .scale = 1 / std::sqrt(static_cast<float>(dim)),
       .soft_cap = c.c.soft_cap,
       .sinks = c.c.sinks ? Tensor(sinks.data(), DType::kF32, {heads}) : Tensor()});
  const Result reference{.out = {out.begin(), out.end()}, .lse = oracle.lse, .failure = ""};
  return Judge(oracle, reference, dim, {1e-7, 1e-6, 0});
}

// A decode's bits do not depend on the rest of the batch if the plan is deterministic.
std::string CheckDeterministic(KvFormat format, int head_dim, int window) {
  const std::vector<int> lengths = {5000, 64, 1, 20000, 300};
  const CacheSpec cache_spec{
      .k_format = format, .v_format = format, .head_dim = head_dim, .lengths = lengths, .seed = 11};
  const DeviceCache cache(cache_spec);
  StepSpec spec{
      .group = 4, .window = window, .deterministic = true, .tokens = {1, 1, 1, 1, 1}, .seed = 11};
  auto run = [&](std::vector<int> tokens) {
    spec.tokens = std::move(tokens);
    return DeviceStep(cache, spec).Run();
  };
  const Result all = run({1, 1, 1, 1, 1});
  const size_t row = size_t{8} * head_dim;  // 8 heads
  for (int s = 0; s < 5; ++s) {
    std::vector<int> alone(5);
    alone[s] = 1;
    const Result one = run(alone);
    if (!std::equal(one.out.begin(), one.out.end(), all.out.begin() + s * row) ||
        !std::equal(one.lse.begin(), one.lse.end(), all.lse.begin() + s * 8))
      return "sequence " + std::to_string(s) + " alone gives other bits";
  }
  return "";
}

// A captured launch serves a later plan with the same limits: one of as many rounds as it takes, of
// less work or of none.
std::string CheckGraph(const CudaCase& c) {
  const DeviceCache cache(CacheOf(c));
  DeviceStep step(cache, StepOf(c));
  step.Plan();
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  OCTAVO_CUDA(cudaStreamCreate(&stream));
  OCTAVO_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  step.Launch(stream);
  OCTAVO_CUDA(cudaStreamEndCapture(stream, &graph));
  OCTAVO_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  std::string failure;
  const std::vector<int> all = Lengths(c.c);
  for (const double part : {1.0, 0.0, 0.7}) {
    std::vector<int> lengths;
    for (size_t s = 0; s < all.size(); ++s) {
      const int tokens = c.c.sequences[s].tokens;
      lengths.push_back(tokens + static_cast<int>(part * (all[s] - tokens)));
    }
    step.Shorten(lengths);
    step.Plan();
    OCTAVO_CUDA(cudaGraphLaunch(exec, stream));
    failure = Judge(step.Download(), step.Oracle(), c.c.head_dim, LimitsOf(c));
    if (!failure.empty()) break;
  }
  OCTAVO_CUDA(cudaGraphExecDestroy(exec));
  OCTAVO_CUDA(cudaGraphDestroy(graph));
  OCTAVO_CUDA(cudaStreamDestroy(stream));
  return failure;
}

}  // namespace

void CheckAttention(bool quick, Tally& tally) {
  auto guarded = [&](const std::string& name, const auto& check) {
    try {
      tally.Count(name, check());
    } catch (const std::exception& error) {
      tally.Failed(name, error.what());
    }
  };
  const Batch small = {{70, 5}, {0, 66}, {130, 1}};
  for (KvFormat format : {KvFormat::kBF16, KvFormat::kF16, KvFormat::kFp8E4M3, KvFormat::kFp8E5M2,
                          KvFormat::kFp8PerTokenHead, KvFormat::kInt8PerTokenHead}) {
    for (int window : {0, 65}) {
      CudaCase c{.c = {.k_format = format,
                       .v_format = format,
                       .window = window,
                       .sinks = window > 0,
                       .soft_cap = window > 0 ? 5.0f : 0,
                       .sequences = small,
                       .seed = 31}};
      if (!quick) guarded("oracle " + c.Name(), [&] { return CheckOracle(c); });
    }
  }
  for (const CudaCase& c : Cases(quick)) tally.Count("attention " + c.Name(), RunCase(c));
  const auto graph = [&](KvFormat format, AttentionMath math, int64_t widened_bytes,
                         const Batch& batch) {
    const CudaCase c{.c = {.k_format = format, .v_format = format, .sequences = batch, .seed = 21},
                     .math = math,
                     .widened_bytes = widened_bytes};
    guarded("in a graph " + c.Name(), [&] { return CheckGraph(c); });
  };
  constexpr int64_t kRoom = int64_t{256} << 20;
  graph(KvFormat::kBF16, AttentionMath::k16Bit, kRoom, {{299, 1}, {4, 1}});
  for (const Batch& batch : {kMixed, kSplit}) {
    graph(KvFormat::kBF16, AttentionMath::k16Bit, kRoom, batch);
    graph(KvFormat::kFp8E4M3, AttentionMath::kFp8, kRoom, batch);
    graph(KvFormat::kInt8PerTokenHead, AttentionMath::k16Bit, kRoom, batch);
    graph(KvFormat::kInt8PerTokenHead, AttentionMath::k16Bit, 0, batch);
  }
  for (int head_dim : {64, 128, 256}) {
    for (KvFormat format : {KvFormat::kBF16, KvFormat::kFp8E4M3}) {
      for (int window : {0, 1000}) {
        if (quick) continue;
        guarded(std::string("deterministic decode ") + Name(format) + " head_dim " +
                    std::to_string(head_dim) + " window " + std::to_string(window),
                [&] { return CheckDeterministic(format, head_dim, window); });
      }
    }
  }
}

}  // namespace octavo::conformance
