#include "text/jinja/heap.h"

#include <fmt/format.h>

#include "text/jinja/value.h"

namespace octavo::jinja {

void ThrowTypeError(std::string message) { throw Fault("TypeError", std::move(message)); }

void ThrowValueError(std::string message) { throw Fault("ValueError", std::move(message)); }

void ThrowLimit(std::string message) {
  throw Fault("limit", std::move(message), Fault::Kind::kLimit);
}

void ThrowUnsupported(std::string message) {
  throw Fault("unsupported", std::move(message), Fault::Kind::kUnsupported);
}

Heap::Heap(const Limits& limits, const std::atomic<bool>* abandoned)
    : limits_(limits), abandoned_(abandoned) {}

Heap::~Heap() {
  while (!owned_.empty()) owned_.pop_back();
  // What is left holds itself.
  while (!mutables_.empty()) {
    Mutable* object = mutables_.back();
    const Value keep(Kind::kNamespace, object);
    object->Clear();
    Unregister(object);
  }
}

void Heap::Register(Mutable* object) {
  object->place_ = mutables_.size();
  mutables_.push_back(object);
}

void Heap::Unregister(Mutable* object) {
  if (object->place_ == Mutable::kNowhere) return;
  mutables_.back()->place_ = object->place_;
  mutables_[object->place_] = mutables_.back();
  mutables_.pop_back();
  object->place_ = Mutable::kNowhere;
}

void Heap::Bury(Object* object) {
  buried_.push_back(object);
  if (burying_) return;
  burying_ = true;
  while (!buried_.empty()) {
    Object* next = buried_.back();
    buried_.pop_back();
    delete next;
  }
  burying_ = false;
}

void Heap::CheckWork() {
  constexpr uint64_t kBetweenChecks = 1'000'000;  // some 10 ms
  if (work_ > limits_.max_work)
    ThrowLimit(fmt::format("the template did not finish within {} steps", limits_.max_work));
  if (abandoned_ && *abandoned_) ThrowLimit("nobody waits for the text any more");
  next_check_ = std::min(limits_.max_work, work_ + kBetweenChecks);
}

void Heap::FailBytes() const {
  ThrowLimit(fmt::format("the template's values need more than {} bytes", limits_.max_live_bytes));
}

}  // namespace octavo::jinja
