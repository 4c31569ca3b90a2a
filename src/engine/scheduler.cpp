#include "engine/scheduler.h"

#include <algorithm>

namespace octavo {

Step Scheduler::Schedule() {
  Step step;
  for (size_t i = 0; i < running_.size() && step.tokens < limits_.max_num_batched_tokens; ++i) {
    Sequence& sequence = *running_[i];
    const int64_t left = static_cast<int64_t>(sequence.tokens.size()) - sequence.pages.written();
    const int count =
        static_cast<int>(std::min<int64_t>(left, limits_.max_num_batched_tokens - step.tokens));
    if (!MakeRoom(i, count, step)) break;
    step.chunks.push_back({&sequence, sequence.id, sequence.pages.written(), count});
    step.tokens += count;
  }
  // Nobody joins while others had to leave for lack of pages.
  while (step.preempted == 0 && !step.stuck && Admit(step)) {
  }
  return step;
}

bool Scheduler::MakeRoom(size_t i, int count, Step& step) {
  Sequence& sequence = *running_[i];
  while (!sequence.pages.Extend(sequence.pages.written() + count)) {
    if (running_.size() == 1) {
      step.stuck = &sequence;
      return false;
    }
    const bool itself = i + 1 == running_.size();
    Preempt(step);
    if (itself) return false;
  }
  return true;
}

void Scheduler::Preempt(Step& step) {
  std::unique_ptr<Sequence> victim = std::move(running_.back());
  running_.pop_back();
  victim->pages.Free();
  ++step.preempted;
  waiting_.push_front(std::move(victim));
}

bool Scheduler::Admit(Step& step) {
  const int budget = limits_.max_num_batched_tokens - step.tokens;
  if (waiting_.empty() || budget <= 0 || static_cast<int>(running_.size()) >= limits_.max_num_seqs)
    return false;
  Sequence& sequence = *waiting_.front();
  // The logits of a prompt token that is to be reported come from the token before it, so that one
  // must run.
  std::span<const int32_t> reusable = sequence.tokens;
  if (sequence.next_prompt_logprob < sequence.prompt_tokens)
    reusable = reusable.first(sequence.next_prompt_logprob);
  if (limits_.prefix_caching) sequence.pages = pool_.Acquire(reusable);
  const int64_t prefix = sequence.pages.written();
  const int count = static_cast<int>(
      std::min<int64_t>(static_cast<int64_t>(sequence.tokens.size()) - prefix, budget));
  if (!sequence.pages.Extend(prefix + count)) {
    sequence.pages.Free();
    if (running_.empty()) step.stuck = &sequence;
    return false;
  }
  if (!sequence.cached) sequence.cached = prefix;
  step.chunks.push_back({&sequence, sequence.id, prefix, count});
  step.tokens += count;
  running_.push_back(std::move(waiting_.front()));
  waiting_.pop_front();
  return true;
}

void Scheduler::Complete(const Step& step) {
  for (const Chunk& chunk : step.chunks) {
    Sequence& sequence = *chunk.sequence;
    sequence.pages.Publish(sequence.tokens, chunk.begin + chunk.count);
    sequence.pages.ReleaseBehindWindows();
  }
}

std::unique_ptr<Sequence> Scheduler::Remove(RequestId id) {
  const auto take = [id](auto& queue) {
    const auto it =
        std::find_if(queue.begin(), queue.end(), [id](const auto& s) { return s->id == id; });
    std::unique_ptr<Sequence> found;
    if (it != queue.end()) {
      found = std::move(*it);
      queue.erase(it);
      found->pages.Free();
    }
    return found;
  };
  std::unique_ptr<Sequence> found = take(running_);
  return found ? std::move(found) : take(waiting_);
}

std::vector<RequestId> Scheduler::ids() const {
  std::vector<RequestId> ids;
  for (const auto& sequence : running_) ids.push_back(sequence->id);
  for (const auto& sequence : waiting_) ids.push_back(sequence->id);
  return ids;
}

}  // namespace octavo
