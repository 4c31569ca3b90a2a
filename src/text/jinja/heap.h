// What one rendering of a template may use, and the faults it may end in.
//
// Heap counts work and live bytes and throws a Fault when either passes its limit, so that no
// template can hang or exhaust the process. Objects (value.h) report what they hold to the heap
// that made them, and no value outlives it. One thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace octavo::jinja {

struct Limits {
  size_t max_source_bytes = 1 << 20;
  uint64_t max_work = 300'000'000;  // about one per node evaluated or 4 bytes touched; 2 to 4 s
  size_t max_live_bytes = size_t{512} << 20;
  size_t max_output_bytes = size_t{128} << 20;
};

// Expressions and statements within each other, in the source and in what a rendering evaluates;
// and values within values. What recurses over them needs less than 8 MiB of stack for these, even
// with sanitizers.
inline constexpr int kMaxSourceDepth = 200;
inline constexpr int kMaxTreeHeight = 500;
inline constexpr int kMaxEvaluationDepth = 1200;
inline constexpr int kMaxValueDepth = 500;

// Values within one value: see Object::weight.
inline constexpr uint64_t kMaxWeight = uint64_t{1} << 27;

// An error of the template: what Python would raise, by type and message, or a limit passed. Turned
// into octavo::Error, with name and line, by Template.
class Fault : public std::exception {
 public:
  // kError: Python raises it too; kLimit: one of ours; kUnsupported: Python can, we cannot.
  enum class Kind { kError, kLimit, kUnsupported };

  Fault(std::string type, std::string message, Kind kind = Kind::kError)
      : kind_(kind), text_(type + ": " + message), type_(std::move(type)) {}

  Kind kind() const { return kind_; }
  const std::string& type() const { return type_; }
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  Kind kind_;
  std::string text_, type_;
};

[[noreturn]] void ThrowTypeError(std::string message);
[[noreturn]] void ThrowValueError(std::string message);
[[noreturn]] void ThrowLimit(std::string message);
[[noreturn]] void ThrowUnsupported(std::string message);

class Object;
class Mutable;

class Heap {
 public:
  // `abandoned`, unless null: set by another thread when nobody waits for the text any more.
  explicit Heap(const Limits& limits, const std::atomic<bool>* abandoned = nullptr);
  ~Heap();
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  const Limits& limits() const { return limits_; }

  void Work(uint64_t units) {
    work_ += units;
    if (work_ > next_check_) CheckWork();
  }
  void WorkOnBytes(size_t bytes) { Work(1 + bytes / 4); }

  // Throws before anything of that size is made.
  void Reserve(size_t bytes) const {
    if (bytes > limits_.max_live_bytes - live_bytes_) FailBytes();
  }
  void Claim(size_t bytes) {
    Reserve(bytes);
    live_bytes_ += bytes;
  }
  void Release(size_t bytes) { live_bytes_ -= bytes; }

  // Keeps `object` until the heap dies; objects that come earlier die later.
  template <typename T>
  T* Own(std::unique_ptr<T> object) {
    T* pointer = object.get();
    owned_.push_back(std::move(object));
    return pointer;
  }

 private:
  friend class Object;
  friend class Mutable;

  void Bury(Object* object);
  void Register(Mutable* object);
  void Unregister(Mutable* object);

  void CheckWork();
  [[noreturn]] void FailBytes() const;

  Limits limits_;
  const std::atomic<bool>* const abandoned_;
  uint64_t work_ = 0, next_check_ = 0;
  size_t live_bytes_ = 0;
  std::vector<std::unique_ptr<Object>> owned_;
  std::vector<Mutable*> mutables_;
  std::vector<Object*> buried_;  // to be deleted
  bool burying_ = false;
};

}  // namespace octavo::jinja
