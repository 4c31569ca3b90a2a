#include "kernels/cpu/bandwidth.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "base/tensor.h"

namespace octavo::cpu {

int64_t ColdBytes() {
  const long last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return 4 * std::clamp<int64_t>(last_level, int64_t{8} << 20, int64_t{512} << 20);
}

double ReadBandwidth(ThreadPool& pool, double seconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t words = std::max<int64_t>(ColdBytes(), int64_t{256} << 20) / 8;
  Buffer buffer(words * 8);
  std::memset(buffer.data(), 1, buffer.size());
  const uint64_t* data = reinterpret_cast<const uint64_t*>(buffer.data());
  std::vector<uint64_t> sums(pool.threads());
  const int64_t share = words / pool.threads();
  std::vector<double> times;
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                   std::chrono::duration<double>(seconds));
  while (times.size() < 3 || Clock::now() < end) {
    const Clock::time_point start = Clock::now();
    pool.ForEach(pool.threads(), [&](int64_t i, int) {
      uint64_t sum = 0;
      for (int64_t w = i * share; w < (i + 1) * share; ++w) sum += data[w];
      sums[i] = sum;
    });
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  OCTAVO_CHECK(sums[0] ==
               0x0101010101010101u * static_cast<uint64_t>(share));  // the reads happened
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return 8.0 * static_cast<double>(share * pool.threads()) / times[times.size() / 2];
}

}  // namespace octavo::cpu
