// Fork-join over a fixed set of threads. The caller takes part, so ThreadPool(1) starts no thread.
//
// ForEach may be called from one thread at a time and not from inside itself. The function must not
// throw. Which thread runs which index is not fixed: results must depend on the index alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace octavo {

class ThreadPool {
 public:
  // threads <= 0: as many as the machine has. Throws std::system_error if they cannot be had.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(index, thread) for every index in [0, count), thread in [0, threads()); returns when
  // all are done.
  void ForEach(int64_t count, const std::function<void(int64_t index, int thread)>& f);

 private:
  void Stop();
  void Work(int thread);
  void Drain(int thread);

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int64_t, int)>* function_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  uint64_t round_ = 0;  // which ForEach the workers should be in
  int running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace octavo
