#include "octavo/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <limits>
#include <mutex>
#include <random>
#include <thread>

#include <fmt/format.h>

#include "base/error.h"
#include "engine/executor.h"
#include "engine/scheduler.h"
#include "io/mapped_file.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace octavo {
namespace {

using Clock = std::chrono::steady_clock;

// 0 if either has not been.
double SecondsBetween(const Sequence::Time& begin, const Sequence::Time& end) {
  return begin && end ? std::chrono::duration<double>(*end - *begin).count() : 0;
}

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void CheckSampling(const SamplingParams& p, int64_t vocab) {
  Require(p.max_tokens >= 0, "max_tokens", "at least 0", p.max_tokens);
  Require(std::isfinite(p.temperature) && p.temperature >= 0, "temperature",
          "a number of at least 0", p.temperature);
  Require(p.top_k >= -1, "top_k", "-1 or 0 (all) or more", p.top_k);
  Require(p.top_p > 0 && p.top_p <= 1, "top_p", "a number in (0, 1]", p.top_p);
  Require(p.min_p >= 0 && p.min_p <= 1, "min_p", "a number in [0, 1]", p.min_p);
  Require(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0, "repetition_penalty",
          "a number above 0", p.repetition_penalty);
  for (const auto& [field, penalty] : {std::pair{"presence_penalty", p.presence_penalty},
                                       {"frequency_penalty", p.frequency_penalty}}) {
    Require(penalty >= -2 && penalty <= 2, field, "a number in [-2, 2]", penalty);
  }
  for (const auto& [id, bias] : p.logit_bias) {
    Require(id >= 0 && id < vocab, "logit_bias", fmt::format("token ids in [0, {})", vocab), id);
    Require(bias >= -100 && bias <= 100, "logit_bias", "numbers in [-100, 100]", bias);
  }
  for (const int32_t id : p.stop_token_ids) {
    Require(id >= 0 && id < vocab, "stop_token_ids", fmt::format("token ids in [0, {})", vocab),
            id);
  }
  Require(p.min_tokens >= 0 && p.min_tokens <= p.max_tokens, "min_tokens",
          fmt::format("0 to max_tokens, which is {}", p.max_tokens), p.min_tokens);
  Require(p.prompt_logprobs_from.value_or(1) >= 1, "prompt_logprobs_from", "at least 1",
          p.prompt_logprobs_from.value_or(1));
  for (const auto& [field, top] : {std::pair{"top_logprobs", p.top_logprobs},
                                   {"top_prompt_logprobs", p.top_prompt_logprobs}}) {
    Require(top.value_or(0) >= 0, field, "at least 0", top.value_or(0));
  }
}

}  // namespace

struct Engine::Impl {
  template <class... Model>  // none: the options' own
  explicit Impl(const EngineOptions& options, const Model&... model)
      : executor(options, model...),
        scheduler(executor.pool(), {executor.max_num_seqs(), executor.max_num_batched_tokens(),
                                    options.enable_prefix_caching}),
        batch(executor.MakeBatch()),
        options(options),
        model_folder(options.model) {
    if (!options.tokenizer.empty()) {
      LoadTokenizer(options.tokenizer);
    } else if (IsThere(model_folder / "tokenizer.json")) {
      LoadTokenizer(model_folder);
    }
    PublishStats();
    fresh_seed.seed(options.seed ? *options.seed : std::random_device{}());
    loop = std::thread([this] { Loop(); });
  }

  ~Impl() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
    }
    wake.notify_one();
    loop.join();
  }

  void LoadTokenizer(const std::filesystem::path& folder) {
    tokenizer = Tokenizer::FromFolder(folder);
    Require(tokenizer->text_vocab_size() <= executor.spec().vocab,
            (folder / "tokenizer.json").string() + ": model.vocab",
            fmt::format("token ids below the model's vocab_size {}", executor.spec().vocab),
            tokenizer->text_vocab_size() - 1);
  }

  const Tokenizer& RequireTokenizer() const {
    if (!tokenizer)
      throw Error(ErrorCode::kUnsupported,
                  fmt::format("{}: no tokenizer.json", model_folder.string()));
    return *tokenizer;
  }

  void Loop();
  void RunStep();
  void RunStep(const Step& step);
  void TakeInbox();
  std::span<const LogitBias> BiasesOf(Sequence& sequence) const;
  void BuildBatch(const Step& step);
  // Reports one sampled row; true if the sequence ended.
  bool Deliver(Sequence& sequence, const SampledToken& token, Ranking ranking, bool is_prompt);
  void Finish(RequestId id, FinishReason reason, std::string error = {});
  void PublishStats();

  Executor executor;
  std::optional<Tokenizer> tokenizer;
  Scheduler scheduler;
  Batch batch;
  EngineStats totals;  // the loop's own copy
  Clock::time_point health_read{};
  struct Row {
    Sequence* sequence;  // gone once the request has ended
    RequestId id;
    bool is_prompt;
  };
  const EngineOptions options;
  const std::filesystem::path model_folder;
  std::vector<Row> rows;  // whom each sample of the batch belongs to

  struct Submission {
    RequestId id;
    Request request;
    Callback callback;
    Clock::time_point time;
  };
  mutable std::mutex mutex;  // guards what follows
  std::condition_variable wake;
  std::function<void()> after_callbacks;  // set before there is anything to call it for
  std::vector<Submission> submitted;
  std::vector<RequestId> cancelled;
  std::vector<RequestId> live;
  EngineStats stats;
  std::vector<LayerHealth> health;
  std::mt19937_64 fresh_seed;
  RequestId next_id = 1;
  bool stopping = false;

  std::thread loop;
};

void Engine::Impl::Loop() {
  for (;;) {
    {
      std::unique_lock lock(mutex);
      wake.wait(lock, [this] {
        return stopping || !submitted.empty() || !cancelled.empty() || !scheduler.idle();
      });
      if (stopping) break;
    }
    const Clock::time_point begin = Clock::now();
    const double model_seconds = totals.model_seconds;
    TakeInbox();
    if (!scheduler.idle()) RunStep();
    if (after_callbacks) after_callbacks();
    PublishStats();
    totals.loop_seconds += SecondsSince(begin) - (totals.model_seconds - model_seconds);
  }
  TakeInbox();
  for (RequestId id : scheduler.ids()) Finish(id, FinishReason::kCancelled);
  if (after_callbacks) after_callbacks();
}

void Engine::Impl::TakeInbox() {
  std::vector<Submission> arrived;
  std::vector<RequestId> leaving;
  {
    std::lock_guard lock(mutex);
    arrived.swap(submitted);
    leaving.swap(cancelled);
  }
  for (Submission& submission : arrived) {
    auto sequence = std::make_unique<Sequence>(executor.pool());
    sequence->id = submission.id;
    sequence->submitted = submission.time;
    sequence->sampling = std::move(submission.request.sampling);
    sequence->callback = std::move(submission.callback);
    sequence->tokens = std::move(submission.request.prompt);
    sequence->prompt_tokens = static_cast<int64_t>(sequence->tokens.size());
    sequence->next_prompt_logprob = sequence->next_reported =
        sequence->sampling.prompt_logprobs_from.value_or(sequence->prompt_tokens);
    scheduler.Add(std::move(sequence));
  }
  for (RequestId id : leaving) Finish(id, FinishReason::kCancelled);
}

void Engine::Impl::RunStep() {
  const Step step = scheduler.Schedule();
  totals.preemptions += step.preempted;
  totals.peak_running = std::max(totals.peak_running, scheduler.running());
  if (step.stuck) {
    Finish(
        step.stuck->id, FinishReason::kError,
        fmt::format(
            "the KV cache is too small for a sequence of {} tokens; raise --kv-cache-memory-bytes",
            step.stuck->tokens.size()));
    if (step.chunks.empty()) return;
  }
  try {
    RunStep(step);
  } catch (const std::exception&
               error) {  // out of memory, most likely: these requests fail, the others go on
    for (const Chunk& chunk : step.chunks) Finish(chunk.id, FinishReason::kError, error.what());
  }
}

void Engine::Impl::RunStep(const Step& step) {
  BuildBatch(step);
  const Clock::time_point begin = Clock::now();
  int64_t tokens = 0;
  for (const Chunk& chunk : step.chunks) {
    tokens += chunk.count;
    if (!chunk.sequence->scheduled) chunk.sequence->scheduled = begin;
  }
  std::vector<Ranking> rankings;
  const std::vector<SampledToken> sampled = executor.Execute(batch, &rankings);
  totals.model_seconds += SecondsSince(begin);
  scheduler.Complete(step);
  ++totals.steps;
  totals.step_tokens += tokens;
  ++totals.steps_by_tokens[std::ranges::lower_bound(kStepTokenBounds, tokens) - kStepTokenBounds];

  RequestId ended = 0;  // rows of one request are adjacent
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    if (row.id == ended) continue;
    if (!sampled[i].finite) {
      const size_t position = batch.position(batch.logit_row(i));
      Finish(row.id, FinishReason::kError,
             fmt::format("the logits after token {} are not finite", position));
      ended = row.id;
    } else if (Deliver(*row.sequence, sampled[i], std::move(rankings[i]), row.is_prompt)) {
      ended = row.id;
    }
  }
}

std::span<const LogitBias> Engine::Impl::BiasesOf(Sequence& s) const {
  const SamplingParams& p = s.sampling;
  std::map<int32_t, float> add = p.logit_bias;
  for (const auto& [id, count] : s.output_counts)
    add[id] -= p.presence_penalty + p.frequency_penalty * static_cast<float>(count);
  if (s.generated() < p.min_tokens) {
    for (const std::vector<int32_t>* ends : {&p.stop_token_ids, &executor.spec().eos_token_ids}) {
      for (int32_t id : *ends) {
        if (id >= 0 && id < executor.spec().vocab)
          add[id] = -std::numeric_limits<float>::infinity();
      }
    }
  }
  s.biases.clear();
  for (const auto& [id, bias] : add) s.biases.push_back({id, bias});
  return s.biases;
}

void Engine::Impl::BuildBatch(const Step& step) {
  batch.Clear();
  rows.clear();
  for (const Chunk& chunk : step.chunks) {
    Sequence& s = *chunk.sequence;
    const int first = batch.Add(s.tokens, chunk.begin, chunk.count, s.pages);
    const int64_t end = chunk.begin + chunk.count;
    for (int64_t p = std::max(chunk.begin + 1, s.next_prompt_logprob);
         p <= end && p < s.prompt_tokens; ++p) {
      batch.AddSample(first + static_cast<int>(p - 1 - chunk.begin), {.target = s.tokens[p]},
                      s.sampling.top_prompt_logprobs);
      rows.push_back({&s, s.id, true});
      s.next_prompt_logprob = p + 1;
    }
    if (end == static_cast<int64_t>(s.tokens.size())) {
      batch.AddSample(first + chunk.count - 1,
                      {.temperature = s.sampling.temperature,
                       .top_k = std::max(0, s.sampling.top_k),
                       .top_p = s.sampling.top_p,
                       .min_p = s.sampling.min_p,
                       .repetition_penalty = s.sampling.repetition_penalty,
                       .history = s.tokens,
                       .biases = BiasesOf(s),
                       .seed = *s.sampling.seed,
                       .choice = s.sampling.choice,
                       .token_index = static_cast<uint32_t>(s.generated())},
                      s.sampling.top_logprobs);
      rows.push_back({&s, s.id, false});
    }
    const int64_t prompt_done = std::min(end, s.prompt_tokens);
    totals.prompt_tokens += std::max<int64_t>(0, prompt_done - std::max(s.prompt_done, *s.cached));
    s.prompt_done =
        std::max(s.prompt_done, prompt_done);  // recomputation after preemption does not count
  }
}

bool Engine::Impl::Deliver(Sequence& s, const SampledToken& token, Ranking ranking,
                           bool is_prompt) {
  Event event{.request = s.id,
              .token = token.id,
              .logprob = ranking.rank > 0 ? ranking.logprob : token.logprob,
              .is_top1 = token.top1 == token.id,
              .rank = ranking.rank,
              .top = std::move(ranking.top)};
  if (is_prompt) {
    event.kind = Event::Kind::kPromptLogprob;
    event.position = s.next_reported++;
    event.token = s.tokens[event.position];
    event.is_top1 = token.top1 == event.token;
    s.callback(event);
    return false;
  }
  const SamplingParams& p = s.sampling;
  if (p.max_tokens > 0) {
    event.position = static_cast<int64_t>(s.tokens.size());
    s.tokens.push_back(token.id);
    if (p.presence_penalty != 0 || p.frequency_penalty != 0) ++s.output_counts[token.id];
    ++totals.generated_tokens;
    s.last_token = Clock::now();
    if (!s.first_token) s.first_token = s.last_token;
    s.callback(event);
    const std::vector<int32_t>& eos = executor.spec().eos_token_ids;
    const bool stop = std::count(p.stop_token_ids.begin(), p.stop_token_ids.end(), token.id) ||
                      (!p.ignore_eos && std::count(eos.begin(), eos.end(), token.id));
    if (stop) {
      Finish(s.id, FinishReason::kStop);
      return true;
    }
  }
  if (s.generated() >= p.max_tokens ||
      static_cast<int64_t>(s.tokens.size()) >= executor.max_model_len()) {
    Finish(s.id, FinishReason::kLength);
    return true;
  }
  return false;
}

void Engine::Impl::Finish(RequestId id, FinishReason reason, std::string error) {
  const std::unique_ptr<Sequence> sequence = scheduler.Remove(id);
  if (!sequence) return;  // finished before its cancellation arrived
  {
    std::lock_guard lock(mutex);
    std::erase(live, id);
  }
  const int64_t cached = sequence->cached.value_or(0);
  if (!sequence->scheduled) sequence->scheduled = Clock::now();  // it waited until now
  totals.cached_tokens += cached;
  PublishStats();  // before the last event, so that whoever waits for it sees its own tokens
                   // counted
  sequence->callback(
      {.request = id,
       .kind = Event::Kind::kFinished,
       .finish_reason = reason,
       .error = std::move(error),
       .cached_tokens = cached,
       .queue_seconds = SecondsBetween(sequence->submitted, sequence->scheduled),
       .prefill_seconds = SecondsBetween(sequence->scheduled, sequence->first_token),
       .decode_seconds = SecondsBetween(sequence->first_token, sequence->last_token)});
}

void Engine::Impl::PublishStats() {
  totals.running = scheduler.running();
  totals.waiting = scheduler.waiting();
  totals.cache_bytes = executor.cache_bytes();
  totals.cache_bytes_used = executor.cache_bytes_used();
  totals.cache_tokens = executor.cache_tokens();
  // A GPU would be waited for: not after every step.
  const Clock::time_point now = Clock::now();
  std::optional<std::vector<LayerHealth>> fresh;
  if (scheduler.idle() || now - health_read > std::chrono::milliseconds(250)) {
    fresh = executor.ReadHealth();
    health_read = now;
  }
  std::lock_guard lock(mutex);
  stats = totals;
  if (fresh) health = std::move(*fresh);
}

std::unique_ptr<Engine> Engine::Create(const EngineOptions& options,
                                       std::shared_ptr<const LoadedModel> model) {
  auto impl =
      model ? std::make_unique<Impl>(options, std::move(model)) : std::make_unique<Impl>(options);
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

RequestId Engine::Submit(Request request, Callback callback) {
  const Executor& executor = impl_->executor;
  CheckSampling(request.sampling, executor.spec().vocab);
  const int64_t length = static_cast<int64_t>(request.prompt.size());
  Require(length > 0, "prompt", "at least one token", length);
  if (length > executor.max_model_len() - (request.sampling.max_tokens > 0 ? 1 : 0)) {
    throw Error(
        ErrorCode::kResourceExhausted,
        fmt::format(
            "prompt: {} tokens and room for an answer do not fit in max_model_len, which is {}{}",
            length, executor.max_model_len(),
            executor.bound_by_cache()
                ? ", as many as the cache holds; raise --kv-cache-memory-bytes"
                : ""));
  }
  const int64_t room = executor.max_model_len() - length;
  Require(request.sampling.min_tokens <= room, "min_tokens",
          fmt::format("at most the {} that max_model_len leaves", room),
          request.sampling.min_tokens);
  const auto unknown =
      std::find_if(request.prompt.begin(), request.prompt.end(),
                   [vocab = executor.spec().vocab](int32_t id) { return id < 0 || id >= vocab; });
  if (unknown != request.prompt.end()) {
    Require(false, "prompt", fmt::format("token ids in [0, {})", executor.spec().vocab), *unknown);
  }

  std::lock_guard lock(impl_->mutex);
  const RequestId id = impl_->next_id++;
  if (!request.sampling.seed) request.sampling.seed = impl_->fresh_seed();
  impl_->live.push_back(id);
  impl_->submitted.push_back({id, std::move(request), std::move(callback), Clock::now()});
  impl_->wake.notify_one();
  return id;
}

bool Engine::Cancel(RequestId id) {
  std::lock_guard lock(impl_->mutex);
  if (!std::count(impl_->live.begin(), impl_->live.end(), id)) return false;
  impl_->cancelled.push_back(id);
  impl_->wake.notify_one();
  return true;
}

void Engine::AfterCallbacks(std::function<void()> callback) {
  const std::lock_guard lock(impl_->mutex);
  impl_->after_callbacks = std::move(callback);
}

std::vector<int32_t> Engine::Encode(std::string_view text, bool add_special_tokens) const {
  return impl_->RequireTokenizer().Encode(text, add_special_tokens);
}
std::string Engine::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  return impl_->RequireTokenizer().Decode(ids, skip_special_tokens);
}

struct TextStream::Impl {
  Detokenizer detokenizer;
};
TextStream::TextStream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TextStream::~TextStream() = default;
std::string TextStream::Push(int32_t token) { return impl_->detokenizer.Push(token); }
std::string TextStream::Flush() { return impl_->detokenizer.Flush(); }

std::unique_ptr<TextStream> Engine::MakeTextStream(bool skip_special_tokens) const {
  return std::unique_ptr<TextStream>(new TextStream(std::make_unique<TextStream::Impl>(
      Detokenizer(impl_->RequireTokenizer(), skip_special_tokens))));
}

std::shared_ptr<const LoadedModel> Engine::model() const { return impl_->executor.model(); }
const EngineOptions& Engine::options() const { return impl_->options; }
int64_t Engine::vocab_size() const { return impl_->executor.spec().vocab; }
int64_t Engine::max_model_len() const { return impl_->executor.max_model_len(); }
double Engine::cache_bytes_per_token() const { return impl_->executor.cache_bytes_per_token(); }
std::vector<std::string> Engine::StartupReport() const { return impl_->executor.StartupReport(); }

EngineStats Engine::stats() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->stats;
}

std::vector<LayerCacheReport> Engine::CacheReport() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->executor.CacheReport(impl_->health);
}

}  // namespace octavo
