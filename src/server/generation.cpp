#include "server/generation.h"

#include <algorithm>
#include <utility>

namespace octavo {

Generation::Generation(const Engine& engine, const Prepared& prepared, std::string id,
                       std::string model, int64_t created, Metrics& metrics)
    : metrics_(metrics),
      arrival_(prepared.arrival),
      stream_(prepared.request.stream),
      n_(prepared.request.n),
      min_tokens_(prepared.request.sampling.min_tokens),
      max_tokens_(prepared.request.sampling.max_tokens),
      answer_(prepared.request, std::move(id), std::move(model), created, prepared.prompts,
              [&engine](std::span<const int32_t> tokens, bool skip_special) {
                return engine.Decode(tokens, skip_special);
              }) {
  const openai::CompletionRequest& request = prepared.request;
  for (const openai::EncodedPrompt& prompt : prepared.prompts) {
    for (int n = 0; n < request.n; ++n) {
      choices_.push_back({.text = engine.MakeTextStream(request.skip_special_tokens),
                          .stops = StopMatcher(request.stop, request.include_stop_str_in_output),
                          .prompt_tokens = std::ssize(prompt.tokens),
                          .last_token = arrival_});
    }
  }
  prompts_.resize(prepared.prompts.size(), {.open = n_});
}

std::string Generation::Push(Event event, size_t index) {
  Choice& choice = choices_[index];
  if (event.kind == Event::Kind::kFinished) return Finish(std::move(event), index);
  if (event.kind == Event::Kind::kPromptLogprob) {
    answer_.PromptToken(event, index);
    return "";
  }
  if (choice.stops.stopped()) return "";
  const Clock::time_point now = Clock::now();
  const std::chrono::duration<double> waited = now - std::exchange(choice.last_token, now);
  if (choice.tokens++ == 0) {
    metrics_.FirstToken(waited.count());
  } else {
    metrics_.NextToken(waited.count());
  }
  std::string text = choice.text->Push(event.token);
  text = choice.tokens > min_tokens_ ? choice.stops.Push(text) : choice.stops.Flush() + text;
  return answer_.Token(event, text, index);
}

std::string Generation::Finish(Event event, size_t index) {
  Choice& choice = choices_[index];
  ++finished_;
  const bool stopped = choice.stops.stopped();
  if (stopped) event.finish_reason = FinishReason::kStop;
  const char* reason = event.finish_reason == FinishReason::kStop     ? "stop"
                       : event.finish_reason == FinishReason::kLength ? "length"
                       : event.finish_reason == FinishReason::kError  ? "error"
                                                                      : "abort";
  const std::chrono::duration<double> all = Clock::now() - arrival_;
  metrics_.Count({.reason = reason,
                  .seconds = all.count(),
                  .queue_seconds = event.queue_seconds,
                  .prefill_seconds = event.prefill_seconds,
                  .decode_seconds = event.decode_seconds,
                  .prompt_tokens = choice.prompt_tokens,
                  .cached_tokens = event.cached_tokens,
                  .output_tokens = choice.tokens,
                  .max_tokens = max_tokens_});
  Prompt& prompt = prompts_[index / n_];
  prompt.most_tokens = std::max(prompt.most_tokens, choice.tokens);
  if (--prompt.open == 0) metrics_.CountPrompt(n_, prompt.most_tokens);
  if (event.finish_reason == FinishReason::kError && !stream_) error_ = event.error;
  if (!error_.empty()) return "";
  const std::string rest =
      stopped ? "" : choice.stops.Push(choice.text->Flush()) + choice.stops.Flush();
  return answer_.Finish(event, rest, index);
}

}  // namespace octavo
