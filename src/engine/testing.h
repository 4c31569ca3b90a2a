// For tests of the engine: options for a golden model or the shipped one, and a client that
// collects events.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "octavo/engine.h"

namespace octavo {

// A folder of tests/golden, or "needle": the shipped model.
inline std::string Model(const std::string& name) {
  return std::string(OCTAVO_SOURCE_DIR) +
         (name == "needle" ? "/checkpoints/needle" : "/tests/golden/" + name);
}

inline EngineOptions Options(const std::string& name = "llama") {
  return {.model = Model(name),
          .max_model_len = 512,
          .max_num_seqs = 8,
          .max_num_batched_tokens = 64,
          .threads = 2};
}

// Ids that every model has.
inline std::vector<int32_t> RandomPrompt(int length, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> prompt(length);
  for (int32_t& id : prompt) id = static_cast<int32_t>(random() % 256);
  return prompt;
}

struct Result {
  std::vector<Event> events;  // all but the last
  std::vector<int32_t> tokens;
  std::vector<float> logprobs, prompt_logprobs;
  FinishReason reason = FinishReason::kNone;
  std::string error;
  int64_t cached = 0;
  int finals = 0;
};

// Submits, collects, waits.
class Client {
 public:
  explicit Client(Engine& engine) : engine_(engine) {}
  ~Client() { Wait(); }

  RequestId Submit(Request request, std::function<void(const Event&)> also = nullptr) {
    {
      std::lock_guard lock(mutex_);
      ++pending_;
    }
    return engine_.Submit(std::move(request), [this, also](const Event& event) {
      if (also) also(event);
      std::lock_guard lock(mutex_);
      Result& r = results_[event.request];
      if (event.kind != Event::Kind::kFinished) r.events.push_back(event);
      if (event.kind == Event::Kind::kToken) {
        r.tokens.push_back(event.token);
        r.logprobs.push_back(event.logprob);
      } else if (event.kind == Event::Kind::kPromptLogprob) {
        r.prompt_logprobs.push_back(event.logprob);
      } else {
        r.reason = event.finish_reason;
        r.error = event.error;
        r.cached = event.cached_tokens;
        ++r.finals;
        if (--pending_ == 0) done_.notify_all();
      }
    });
  }

  void Wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

  Result Get(RequestId id) {
    Wait();
    return results_.at(id);
  }

 private:
  Engine& engine_;
  std::mutex mutex_;
  std::condition_variable done_;
  int pending_ = 0;
  std::map<RequestId, Result> results_;
};

}  // namespace octavo
