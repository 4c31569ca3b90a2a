#include "base/thread_pool.h"

#include <gtest/gtest.h>

namespace octavo {
namespace {

TEST(ThreadPoolTest, EveryIndexRunsOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int64_t count : {0, 1, 2, 7, 1000}) {
      for (int round = 0; round < 20; ++round) {
        std::vector<std::atomic<int>> seen(count);
        pool.ForEach(count, [&](int64_t i, int thread) {
          EXPECT_LT(thread, pool.threads());
          seen[i].fetch_add(1);
        });
        for (const auto& s : seen) EXPECT_EQ(s.load(), 1);
      }
    }
  }
}

}  // namespace
}  // namespace octavo
