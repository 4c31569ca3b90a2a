// Backend: everything a model needs from a machine. The op list is here; kernels/reference (double
// precision, the oracle of every test), kernels/cpu (Highway) and, in a shared library, the CUDA
// backend implement it.
//
// Activations are float32 or bfloat16 ("T" below) as the caller's tensors say; inside an op
// everything is float32 (or better). Weights are bfloat16, float16 or float32, [out, in] row-major
// (CUDA: bfloat16, biases of the type of the outputs), those of experts also MXFP4. Shapes are
// checked by the caller once (models/decoder) and CHECKed here; ops do not fail. Every op is
// ordered on the backend's one stream; the CPU's is immediate. A backend is used by one thread at a
// time.
//
// Tensors are in the backend's memory (Allocate); spans are in the host's and are read before an op
// returns.
//
// Row invariance (CPU): a row's result does not depend on how many rows share the call, on the
// chunk, or on threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/tensor.h"
#include "octavo/attention_spec.h"
#include "octavo/kv_layout.h"

namespace octavo {

// out[i] = table[ids[i]] * scale. table: [vocab, hidden] weights or T; out: [ids, hidden] T.
// The scale is the caller's, already rounded to T where the model does so (Gemma).
struct GatherArgs {
  Tensor table;
  Tensor ids;  // [ids] int32
  float scale = 1.0f;
  Tensor out;
};

// out = x * rsqrt(mean(x^2) + eps) * (weight + offset), or with `accumulate` out += that. Rows of
// [rows, columns].
struct NormArgs {
  Tensor x;       // [rows, hidden] T
  Tensor weight;  // [hidden]
  float eps = 0;
  float offset = 0;         // 1 for Gemma
  Tensor out;               // [rows, hidden], x's type, or bfloat16 of a float32 x; may be x
  Tensor rounded;           // [rows, hidden] bfloat16, optional: float32 `out` once more, where
                            // Backend::intermediate_dtype() is bfloat16
  bool accumulate = false;  // x and `out` are float32
};

// out = x * weight^T + bias, or with `accumulate` out += that. x: [rows, in] T; weight: [out, in];
// bias: [out], optional; out: [rows, out] T or float32. Rows of x and out may be strided.
struct MatMulArgs {
  Tensor x, weight, bias, out;
  bool accumulate = false;  // `out` is float32
};

// One of several matmuls of the same x.
struct Projection {
  Tensor weight, bias, out;
};

enum class Activation : uint8_t { kSilu, kGeluTanh, kSwigluOai };

// out = act(gate) * up; kSwigluOai (gpt-oss): g = min(gate, limit), u = clamp(up, -limit, limit),
// out = (u + 1) * g * sigmoid(1.702 * g). All [rows, intermediate] T.
struct GatedActivationArgs {
  Activation activation = Activation::kSilu;
  float limit = 0;
  Tensor gate, up, out;
};

// Chooses top_k experts per row. softmax_first: softmax over all experts, then top-k (renormalised
// if `normalize`); otherwise top-k of the logits, then softmax over those. Ties go to the lower
// expert. ids [rows, top_k] int32 in ascending expert order; weights [rows, top_k] float32.
struct RouteArgs {
  Tensor logits;  // [rows, experts] float32
  int top_k = 0;
  bool softmax_first = true;
  bool normalize = true;
  Tensor ids, weights;
};

// If one matrix of a call is MXFP4 (kernels/mxfp4.h), all are.
struct Expert {
  Tensor gate, up, down;                 // [intermediate, hidden] x 2, [hidden, intermediate]
  Tensor gate_bias, up_bias, down_bias;  // optional
};

// out[row] = sum over k of weights[row, k] * expert(ids[row, k])(x[row]), added in float32 in the
// order of k, or with `accumulate` out += that. Values between gate, up and down are float32.
struct ExpertsArgs {
  Tensor x;  // [rows, hidden] T
  Tensor ids, weights;
  std::span<const Expert> experts;
  Activation activation = Activation::kSilu;
  float limit = 0;
  Tensor out;  // [rows, hidden] T or float32
  bool accumulate = false;
};

// cos_sin[i] = cos, then sin of positions[i] * inv_freq[j] (product in float32, accurate cos and
// sin), times scaling.
struct RopeTableArgs {
  Tensor positions;  // [tokens] int32
  Tensor inv_freq;   // [rotary_dim / 2] float32
  float scaling = 1.0f;
  Tensor cos_sin;  // [tokens, 2 * rotary_dim / 2] float32
};

// The sequences of a step as one page group sees them. Tokens of a sequence are consecutive rows. A
// sequence of kv_len 0 is padding: its rows' slots are -1 and their results mean nothing.
struct BatchView {
  int tokens = 0;
  std::span<const int32_t> q_begin;  // [sequences + 1] first row of each sequence
  std::span<const int32_t> kv_len;   // [sequences] tokens in the cache with this step's appended
  Tensor slots;        // [tokens] int64: page * kPageSize + place in page, page in kPageUnits
  Tensor block_table;  // [sequences, pages] int32 (uint32 page entries), kNoPage behind a window

  int sequences() const { return static_cast<int>(kv_len.size()); }
};

// The attention calls that one plan serves.
struct AttentionPlanSpec {
  AttentionShape shape;
  KvFormat k_format = KvFormat::kBF16, v_format = KvFormat::kBF16;
  AttentionMath math = AttentionMath::k16Bit;
  bool soft_cap = false;                  // calls may give one
  int max_tokens = 0, max_sequences = 0;  // of a step
  int max_sequence_tokens = 0;            // query tokens of one sequence; 1: decode only
  int max_kv_tokens = 0;                  // tokens of one sequence
  bool operator==(const AttentionPlanSpec&) const = default;
};

// How a step's attention is shared out among workers: made on the host once per step for all layers
// of the same shape, formats and group.
class AttentionPlan {
 public:
  explicit AttentionPlan(const AttentionShape& shape) : shape_(shape) {}
  virtual ~AttentionPlan() = default;
  virtual void Make(const BatchView& batch) = 0;
  const AttentionShape& shape() const { return shape_; }

 private:
  AttentionShape shape_;
};

// q, k: per-head RMS norm (if weights), rotate pairs (i, i + rotary_dim / 2); then K and V are
// quantised from float32 into their slots, and Q is written to q_out, or back in place without one.
// Writing slot 0 of a page clears the rest of that page's V and scales.
struct AppendArgs {
  Tensor q, k,
      v;  // [tokens, heads * head_dim], [tokens, kv_heads * head_dim] x 2, T; rows may be strided
  int heads = 0;
  Tensor q_norm, k_norm;  // [head_dim], optional
  float norm_eps = 0, norm_offset = 0;
  Tensor cos_sin;  // [tokens, rotary_dim] float32
  const BatchView* batch = nullptr;
  AttentionPlan* plan = nullptr;  // of the attention that follows; CUDA keeps FP8 queries there
  KvLayer cache;
  Tensor q_out;  // [tokens, heads * head_dim], on CUDA of Backend::intermediate_dtype()
};

// softmax(scale * q k^T, soft-capped, causal, windowed, with a sink per head) v over the pages of
// each sequence.
struct AttentionArgs {
  Tensor q, out;  // [tokens, heads * head_dim] T; rows may be strided
  const BatchView* batch = nullptr;
  const AttentionPlan* plan = nullptr;
  KvLayer cache;
  float scale = 0;
  float soft_cap = 0;  // 0: none; s = cap * tanh(s / cap)
  Tensor sinks;        // [heads], weights, optional: exp(sink) joins the softmax's denominator
};

struct LogitBias {
  int32_t id = 0;
  float add = 0;  // -inf: never this token
};

// In this order: repetition_penalty, biases, temperature, min_p, top_k, top_p, draw.
// kernels/sampling.h defines each to the bit. Equals rank by id, lowest first, also where top_k or
// top_p cuts.
struct SampleRow {
  float temperature = 0;  // 0 (at most 1e-5): greedy
  int32_t top_k = 0;      // 0: all
  float top_p = 1, min_p = 0;
  float repetition_penalty = 1;
  std::span<const int32_t> history;   // prompt and output so far, for the repetition penalty
  std::span<const LogitBias> biases;  // no id twice
  uint64_t seed = 0;
  uint32_t choice = 0, token_index = 0;  // with the seed: the whole state of the random number
  int32_t target = -1;  // report this token's log-probability instead of the sampled one's
};

struct SampledToken {
  int32_t id = 0;
  float logprob = 0;   // log softmax(raw logits) of `target` if given, else of `id`
  int32_t top1 = 0;    // argmax of the raw logits, lowest id first; NaN never wins
  bool finite = true;  // false: a NaN or infinity in the logits; then id = top1 and logprob is NaN
};

struct SampleArgs {
  Tensor logits;  // [rows, vocab] float32; may be overwritten
  float soft_cap = 0;
  std::span<const SampleRow> rows;
  std::span<SampledToken> out;
};

// Zeroed memory that a backend gave, and which it need not outlive. The CPU's is the host's.
class Memory {
 public:
  using Free = std::function<void(std::byte*)>;
  Memory() = default;
  Memory(std::byte* data, size_t bytes, Free free) : data_(data, std::move(free)), size_(bytes) {}

  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

struct MemoryInfo {
  size_t free = 0, total = 0;  // bytes
};

// The most that ops will be asked for: what a backend's workspaces are sized by.
struct BackendLimits {
  int tokens = 0;       // rows of a step
  int sample_rows = 0;  // rows of one call of Sample
  int64_t vocab = 0;
  int experts = 0, top_k = 0;  // 0: no Experts
  int64_t hidden = 0, expert_intermediate = 0;
};

// Recorded ops. Running them again reads what their tensors hold by then; what was in spans and
// plans of other shapes than those recorded is the caller's to keep.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual void Run() = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  // The type of values between the matmuls of a block: of queries after Append, of gate and up.
  virtual DType intermediate_dtype() const { return DType::kF32; }
  virtual bool is_host() const { return false; }  // tensors may be read and written directly

  // Once, before any op.
  virtual void Reserve(const BackendLimits&) {}

  // Null data if there is not enough.
  virtual Memory Allocate(size_t bytes) = 0;
  virtual Memory AllocateHost(size_t bytes) = 0;  // host memory that copies start from
  virtual MemoryInfo memory_info() = 0;
  // Ordered with the ops. Upload may return before it has read memory of AllocateHost; Download
  // returns with the bytes, so everything before it has run.
  virtual void Upload(void* to, const void* from, size_t bytes) = 0;
  virtual void Download(void* to, const void* from, size_t bytes) = 0;
  virtual void Wait() = 0;             // until all ops have run
  virtual double ReadBandwidth() = 0;  // bytes per second, measured
  // Records the ops that `body` calls, which do not run. Null where calling them again is as good.
  virtual std::unique_ptr<Graph> Record(const std::function<void()>& /*body*/) { return nullptr; }

  virtual void Gather(const GatherArgs&) = 0;
  virtual void Norm(const NormArgs&) = 0;
  virtual void MatMul(const MatMulArgs&) = 0;
  virtual void Project(const Tensor& x, std::span<const Projection> projections) = 0;
  virtual void GatedActivation(const GatedActivationArgs&) = 0;
  // Projects x to the activation's gate and up, then activates them. What those two hold after it
  // is the backend's.
  virtual void GatedProject(const Tensor& x, const Projection& gate, const Projection& up,
                            const GatedActivationArgs& activation) {
    const Projection both[] = {gate, up};
    Project(x, both);
    GatedActivation(activation);
  }
  virtual void Route(const RouteArgs&) = 0;
  virtual void Experts(const ExpertsArgs&) = 0;
  virtual void RopeTable(const RopeTableArgs&) = 0;
  virtual void Append(const AppendArgs&) = 0;
  virtual std::unique_ptr<AttentionPlan> PlanAttention(const AttentionPlanSpec&) = 0;
  virtual void Attention(const AttentionArgs&) = 0;
  virtual void Sample(const SampleArgs&) = 0;
};

std::unique_ptr<Backend> MakeReferenceBackend();       // double precision, obvious, slow
std::unique_ptr<Backend> MakeCpuBackend(int threads);  // Highway; threads <= 0: all

}  // namespace octavo
