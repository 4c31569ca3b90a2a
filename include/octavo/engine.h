// The engine: give it token ids, get token ids back, many requests at once.
//
//   auto engine = octavo::Engine::Create({.model = "checkpoints/needle", .kv_cache_dtype = "fp8"});
//   auto id = engine->Submit({.prompt = engine->Encode("Hello"), .sampling = {.max_tokens = 16}},
//                            [](const octavo::Event& event) { ... });
//
// Threads: one loop thread runs the model. Submit, Cancel, Encode and Decode may be called from any
// thread. Callbacks run on the loop thread, in order; they must not block nor throw, and may call
// Submit and Cancel. Every accepted request gets exactly one final event. Cancel only asks: events
// may still come until that one. The destructor cancels what is left and returns after all of them.
//
// Errors: Create and Submit throw octavo::Error (base/error.h) for what the caller can mend. A
// request that fails later ends with FinishReason::kError and a message; the others go on.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace octavo {

// Names and meanings are vLLM's, where vLLM has them.
struct EngineOptions {
  std::string model;                 // a Hugging Face folder
  std::string load_format = "auto";  // "dummy": noise for weights, from a config.json alone
  std::string hf_overrides;          // a JSON object: fields that replace config.json's
  std::string tokenizer;             // a folder with tokenizer.json; empty: the model's
  std::string device = "auto";       // "cpu", "cuda", or "auto": a GPU where there is one
  std::string dtype = "bfloat16";    // arithmetic: "bfloat16" or "float32"
  // On a GPU, of layers whose K and V are fp8_e4m3: "auto" (= "fp8", two-level accumulation),
  // "fp8_tensor_core" (loses precision with length) or "16bit".
  std::string attention_math = "auto";
  std::string kv_cache_dtype = "auto";  // see docs/kv-cache.md
  std::string kv_cache_dtype_k,
      kv_cache_dtype_v;  // either operand on its own; empty: kv_cache_dtype
  std::vector<std::string> kv_cache_dtype_skip_layers;
  std::string kv_cache_scales;        // side-car file of calibrated scales; empty: the checkpoint's
  int64_t kv_cache_memory_bytes = 0;  // 0: what max_num_seqs * max_model_len tokens need, 4 GiB or
                                      // half of all at most; GPU: all left
  double gpu_memory_utilization = 0.9;  // of all memory, with weights and activations
  int64_t max_model_len = 0;            // tokens; 0: the model's max_position_embeddings
  // Sequences in one step, and tokens, to which prompts are cut. Absent: 16 and 512, on a GPU 256
  // and 8192.
  std::optional<int> max_num_seqs, max_num_batched_tokens;
  bool enable_prefix_caching = true;
  bool enforce_eager = false;    // on a GPU: no recorded graphs
  std::optional<uint64_t> seed;  // of the seeds of requests without one; absent: chance
  int threads = 0;               // 0: all cores
  // Bytes of weights that are on a GPU, of so many; called by Create, on its thread.
  std::function<void(int64_t done, int64_t all)> load_progress;
};

struct SamplingParams {
  int max_tokens = 16;
  float temperature = 1.0f;  // 0: greedy
  int top_k = 0;             // 0 or -1: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  std::optional<uint64_t>
      seed;  // same seed, same text, whatever else runs; without: a fresh one per request
  uint32_t choice = 0;  // which of several answers to one prompt: another one for the same seed
  std::vector<int32_t> stop_token_ids;  // besides the model's eos
  bool ignore_eos = false;
  // OpenAI's, over the output so far: a token's logit falls by presence_penalty if it occurred, and
  // by frequency_penalty for each time. Both in [-2, 2].
  float presence_penalty = 0, frequency_penalty = 0;
  std::map<int32_t, float> logit_bias;  // token id: [-100, 100], added to its logit
  int min_tokens = 0;                   // no eos and no stop token before these
  // Report log-probabilities of the prompt's tokens from this index on (at least 1); absent: none.
  std::optional<int64_t> prompt_logprobs_from;
  // With each token of the output, or each reported one of the prompt, its rank and this many of
  // the most probable tokens; absent: neither. All logits then visit the host.
  std::optional<int> top_logprobs, top_prompt_logprobs;
};

struct Request {
  std::vector<int32_t> prompt;  // token ids, at least one
  SamplingParams sampling;
};

using RequestId = uint64_t;

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled, kError };

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
};

struct Event {
  enum class Kind : uint8_t { kPromptLogprob, kToken, kFinished };
  RequestId request = 0;
  Kind kind = Kind::kToken;
  int32_t token =
      0;  // kToken: the new token (a stop token too); kPromptLogprob: the prompt's token
  float logprob = 0;     // of `token`, under the model's unmodified distribution
  bool is_top1 = false;  // `token` is the most probable one
  int32_t rank = 0;      // of `token`, from 1, if the request asks for top log-probabilities
  std::vector<TokenLogprob> top;  // the most probable tokens, best first, if it does
  int64_t position = 0;           // index of `token` in prompt + output
  FinishReason finish_reason = FinishReason::kNone;
  std::string error;          // kError
  int64_t cached_tokens = 0;  // kFinished: prompt tokens that came from the prefix cache
  // kFinished: from Submit to the first step, from there to the first token, from there to the
  // last; as far as it came.
  double queue_seconds = 0, prefill_seconds = 0, decode_seconds = 0;
};

// Bounds of a histogram of tokens per step: vLLM's.
inline constexpr int64_t kStepTokenBounds[] = {1,   8,    16,   32,   64,   128,  256,
                                               512, 1024, 2048, 4096, 8192, 16384};

struct EngineStats {
  int64_t steps = 0, prompt_tokens = 0, cached_tokens = 0, generated_tokens = 0, preemptions = 0;
  int64_t step_tokens = 0;                                                 // of all steps
  std::array<int64_t, std::size(kStepTokenBounds) + 1> steps_by_tokens{};  // the last: of more
  int64_t running = 0, waiting = 0;
  int64_t peak_running = 0;  // most sequences in one step since the start
  int64_t cache_bytes = 0, cache_bytes_used = 0;
  int64_t cache_tokens = 0;  // that fit, in sequences of max_model_len
  double model_seconds = 0;  // in the model: forward and sampling
  double loop_seconds = 0;   // in the engine's loop outside of it, while it has work
};

// Saturation counts and largest magnitudes since the start, per layer.
struct LayerCacheReport {
  std::string k_format, v_format, k_scale_source, v_scale_source;
  uint64_t k_saturated = 0, v_saturated = 0;
  float k_amax = 0, v_amax = 0;  // of x / scale; dynamic formats: of x
};

// Turns a stream of token ids into text, never emitting half a character. Not thread-safe.
class TextStream {
 public:
  ~TextStream();
  std::string Push(int32_t token);  // what is certain now
  std::string Flush();              // the rest

 private:
  friend class Engine;
  struct Impl;
  explicit TextStream(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// What engines of one model and device may share: the weights, which outlive any of them.
struct LoadedModel;

class Engine {
 public:
  using Callback = std::function<void(const Event&)>;

  // With the `model` of an engine of the same folder and device nothing is loaded again.
  static std::unique_ptr<Engine> Create(const EngineOptions& options,
                                        std::shared_ptr<const LoadedModel> model = nullptr);
  ~Engine();  // cancels what is left

  // Refuses an empty prompt, ids outside the vocabulary, prompts that the model or the cache cannot
  // hold, and parameters out of range.
  RequestId Submit(Request request, Callback callback);
  bool Cancel(RequestId id);  // false: not known, or finished
  // `callback` runs after the callbacks of a step (or of cancellations between two), by the same
  // rules: for whoever hands their events on together. To be set before the first Submit.
  void AfterCallbacks(std::function<void()> callback);

  // Text, by the model's tokenizer.json; throw if the model has none.
  // `add_special_tokens`: whether the tokenizer adds its own (<bos>); a chat template writes them.
  std::vector<int32_t> Encode(std::string_view text, bool add_special_tokens = true) const;
  // `skip_special_tokens`: what is special, as the end of a turn, leaves no text.
  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens = true) const;
  // The engine must outlive it.
  std::unique_ptr<TextStream> MakeTextStream(bool skip_special_tokens = true) const;

  std::shared_ptr<const LoadedModel> model() const;
  const EngineOptions& options() const;  // as given
  int64_t vocab_size() const;            // token ids are below it
  int64_t max_model_len() const;
  double cache_bytes_per_token()
      const;  // all full-attention layers and, while growing, the window layers
  std::vector<std::string> StartupReport() const;  // policy, scales and capacity, a line each
  EngineStats stats() const;
  std::vector<LayerCacheReport> CacheReport() const;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace octavo
