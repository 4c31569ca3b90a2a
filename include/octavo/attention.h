// Paged attention on a CUDA device of compute capability 9.0, usable without the rest of Octavo:
// link liboctavo_cuda.so. Plan on the host once per step, then for every layer append the step's
// keys and values to the cache and run. Appending and running allocate nothing, cannot fail for a
// planned batch, and may be captured in a CUDA graph, which then serves every later plan with the
// same limits.
//
// Pages lie in an arena as octavo/kv_layout.h says. Pointers are to device memory unless marked
// "host". A stream is a cudaStream_t. What a caller gets wrong throws std::invalid_argument naming
// the argument, found and expected; a failing CUDA call throws std::runtime_error.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "octavo/attention_spec.h"
#include "octavo/kv_layout.h"

namespace octavo::cuda {

using Stream = void*;

using octavo::AttentionMath;
using octavo::AttentionShape;  // head_dim 64, 128 or 256

struct AttentionLimits {
  int tokens = 0;           // query tokens of a step
  int sequences = 0;        // sequences of a step
  int sequence_tokens = 0;  // query tokens of one sequence; 0: as `tokens`
  int kv_tokens = 0;  // tokens of one sequence; 0: any, which prefill that widens pages refuses
};

// How a step's work is shared out. Its device buffers have fixed addresses.
class AttentionPlan {
 public:
  struct Options {
    AttentionMath math = AttentionMath::k16Bit;
    bool soft_cap = false;       // calls may give one; 16-bit math only
    bool deterministic = false;  // a sequence's result does not depend on the rest of the batch
    // Prefill in 16-bit math writes 8-bit pages as 16-bit ones to a buffer of this size, or of what
    // one kv head of limits.kv_tokens takes, if that is more. What does not fit goes in several
    // rounds.
    int64_t widened_bytes = int64_t{256} << 20;
  };
  AttentionPlan(const AttentionShape& shape, KvFormat k_format, KvFormat v_format,
                const AttentionLimits& limits, const Options& options);
  ~AttentionPlan();
  AttentionPlan(const AttentionPlan&) = delete;

  // Sequence s has the query rows q_begin[s] to q_begin[s + 1] (host, [sequences + 1]) and, with
  // them, kv_len[s] tokens (host, [sequences]). Copies the work lists to the device on `stream`.
  void Make(std::span<const int32_t> q_begin, std::span<const int32_t> kv_len, Stream stream);

  // [limits.tokens] 1 where prefill in FP8 math will read this token's query, else 0. Append needs
  // it.
  const uint8_t* fp8_queries() const;

  struct State;
  const State& state() const { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

// The pages of the step's sequences.
struct BlockTable {
  const uint32_t* entries = nullptr;  // [sequences, stride], kNoPage behind a window
  int64_t stride = 0;
};

// q, k: RMS norm per head where there are weights, then rotation of pairs (i, i + rotary_dim / 2);
// K and V are quantised from float32 into their slots. Writing slot 0 of a page clears the rest of
// that page's V and scales; the tokens of a page must be consecutive rows of the call.
//
// Append and Attention start before the kernel launched in front of them has ended, and wait for it
// before they read what a step computes: q, k, v, queries, pages. Norms, cos_sin, slots,
// fp8_queries, scales, sinks and block tables they read at once: these must be complete before
// that.
struct AppendCall {
  enum class Input : uint8_t { kBF16, kF32 };
  int tokens = 0;
  int heads = 0;
  Input input = Input::kBF16;
  const void *q = nullptr, *k = nullptr, *v = nullptr;  // [tokens, heads or kv_heads, head_dim]
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;     // elements from token to token
  const void *q_norm = nullptr, *k_norm = nullptr;      // [head_dim] bfloat16, optional
  float norm_eps = 0, norm_offset = 0;
  const float* cos_sin = nullptr;  // [tokens, rotary_dim]: cosines, then sines; optional
  int rotary_dim = 0;
  const int64_t* slots = nullptr;  // [tokens] page * kPageSize + place in page; -1: padding
  KvLayer cache;                   // device pointers
  void* q_out = nullptr;           // [tokens, heads, head_dim] bfloat16
  // FP8 math: queries of tokens with fp8_queries[token] go to q_fp8 instead of q_out, e4m3 with one
  // scale per token and head.
  const uint8_t* fp8_queries = nullptr;
  void* q_fp8 = nullptr;     // [tokens, heads, head_dim] fp8_e4m3
  float* q_scale = nullptr;  // [tokens, heads]
};
void Append(const AppendCall& call, Stream stream);

// softmax(scale * q k^T, soft-capped, causal, windowed, with a sink per head) v over the pages of
// each sequence of the plan. Rows of no sequence are not written.
struct AttentionCall {
  const AttentionPlan* plan = nullptr;
  KvLayer cache;  // device pointers
  BlockTable block_table;
  const void* q = nullptr;         // [limits.tokens, heads, head_dim] bfloat16
  const void* q_fp8 = nullptr;     // [limits.tokens, heads, head_dim] as Append wrote it; FP8 math
                                   // only
  const float* q_scale = nullptr;  // [limits.tokens, heads]; FP8 math only
  float scale = 0;
  float soft_cap = 0;            // 0: none; s = cap * tanh(s / cap); see Options
  const float* sinks = nullptr;  // [heads], optional: exp(sink) joins the softmax's denominator
  void* out = nullptr;           // [limits.tokens, heads, head_dim] bfloat16
  float* lse = nullptr;          // [limits.tokens, heads] natural log of the denominator, optional
};
void Attention(const AttentionCall& call, Stream stream);

}  // namespace octavo::cuda
