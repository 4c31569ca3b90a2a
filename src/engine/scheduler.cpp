#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace octavo {

namespace {

// Of the budget, what a prompt of more than one step leaves to others.
constexpr int kShortShare = 4;

int64_t Left(const Sequence& sequence) {
  return static_cast<int64_t>(sequence.tokens.size()) - sequence.pages.written();
}

// What a prefix may hold. The logits of a prompt token that is to be reported come from the token
// before it, so that one must run.
std::span<const int32_t> Reusable(const Sequence& sequence) {
  const std::span<const int32_t> tokens = sequence.tokens;
  return sequence.next_prompt_logprob < sequence.prompt_tokens
             ? tokens.first(sequence.next_prompt_logprob)
             : tokens;
}

}  // namespace

Step Scheduler::Schedule() {
  Step step;
  const int budget = limits_.max_num_batched_tokens;
  auto decodes = static_cast<int>(
      std::ranges::count_if(running_, [](const auto& s) { return Left(*s) == 1; }));
  const int share = budget / kShortShare - decodes;  // those who overtook included
  bool cut = false;
  std::optional<size_t> next_short;
  for (size_t i = 0; i < running_.size() && step.tokens < budget; ++i) {
    Sequence& sequence = *running_[i];
    const int64_t left = Left(sequence);
    if (left == 1) --decodes;
    int64_t room = budget - step.tokens - (left > 1 ? decodes : 0);
    if (left > room) {
      if (!std::exchange(cut, true)) next_short = FindShort(0, share);
      if (next_short) room -= share;
      room = std::max<int64_t>(room, i == 0);
    }
    const auto count = static_cast<int>(std::min(left, room));
    if (count <= 0) continue;
    if (!MakeRoom(i, count, step)) break;
    step.chunks.push_back({&sequence, sequence.id, sequence.pages.written(), count});
    step.tokens += count;
  }
  // Nobody joins while others had to leave for lack of pages.
  if (step.preempted > 0 || step.stuck) return step;
  while (next_short && Admit(*next_short, step))
    next_short = FindShort(*next_short, std::min(share, budget - step.tokens));
  for (Chunk& chunk : step.chunks) {
    const int64_t left = Left(*chunk.sequence) - chunk.count;
    const auto more = static_cast<int>(std::min<int64_t>(left, budget - step.tokens));
    if (more <= 0 || !chunk.sequence->pages.Extend(chunk.begin + chunk.count + more)) continue;
    chunk.count += more;
    step.tokens += more;
  }
  while (Admit(0, step)) {
  }
  return step;
}

int64_t Scheduler::Uncached(size_t i) const {
  const Sequence& sequence = *waiting_[i];
  const auto tokens = static_cast<int64_t>(sequence.tokens.size());
  return limits_.prefix_caching ? tokens - pool_.Lookup(Reusable(sequence)) : tokens;
}

std::optional<size_t> Scheduler::FindShort(size_t from, int64_t most) const {
  if (static_cast<int>(running_.size()) >= limits_.max_num_seqs) return std::nullopt;
  for (size_t i = from; i < waiting_.size(); ++i) {
    if (Uncached(i) <= most) return i;
  }
  return std::nullopt;
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

bool Scheduler::Admit(size_t i, Step& step) {
  const int budget = limits_.max_num_batched_tokens - step.tokens;
  if (i >= waiting_.size() || budget <= 0 ||
      static_cast<int>(running_.size()) >= limits_.max_num_seqs)
    return false;
  Sequence& sequence = *waiting_[i];
  if (limits_.prefix_caching) sequence.pages = pool_.Acquire(Reusable(sequence));
  const int64_t prefix = sequence.pages.written();
  const auto count = static_cast<int>(std::min<int64_t>(Left(sequence), budget));
  if (!sequence.pages.Extend(prefix + count)) {
    sequence.pages.Free();
    if (running_.empty()) step.stuck = &sequence;
    return false;
  }
  if (!sequence.cached) sequence.cached = prefix;
  step.chunks.push_back({&sequence, sequence.id, prefix, count});
  step.tokens += count;
  running_.push_back(std::move(waiting_[i]));
  waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
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
