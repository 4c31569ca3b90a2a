// A completion request under way: what the engine is asked, and its events as what the client is
// sent. No sockets.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "octavo/engine.h"
#include "server/metrics.h"
#include "server/openai.h"
#include "server/stop_matcher.h"

namespace octavo {

class Generation {
 public:
  using Clock = std::chrono::steady_clock;
  // What the worker makes of a body.
  struct Prepared {
    openai::CompletionRequest request;
    std::vector<openai::EncodedPrompt> prompts;
    std::vector<Request> engine_requests;  // one for each answer, in their order
    Clock::time_point arrival = Clock::now();
  };

  // `engine` has accepted the requests; it and `metrics` must outlive the generation.
  Generation(const Engine& engine, const Prepared& prepared, std::string id, std::string model,
             int64_t created, Metrics& metrics);

  std::string Begin() const { return answer_.Begin(); }
  // What is to be sent after an event of a choice; see openai::Answer.
  std::string Push(Event event, size_t choice);
  bool stopped(size_t choice) const { return choices_[choice].stops.stopped(); }  // by its text
  bool finished() const { return finished_ == choices_.size(); }
  const std::string& error() const { return error_; }  // not streaming: why there is no answer

 private:
  struct Choice {
    std::unique_ptr<TextStream> text;
    StopMatcher stops;
    int64_t prompt_tokens = 0;
    Clock::time_point last_token;
    int64_t tokens = 0;
  };
  std::string Finish(Event event, size_t index);

  struct Prompt {
    int open;  // choices
    int64_t most_tokens = 0;
  };

  Metrics& metrics_;
  const Clock::time_point arrival_;
  bool stream_;
  int n_, min_tokens_, max_tokens_;
  openai::Answer answer_;
  std::vector<Choice> choices_;
  std::vector<Prompt> prompts_;
  size_t finished_ = 0;
  std::string error_;
};

}  // namespace octavo
