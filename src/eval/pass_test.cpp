#include "eval/pass.h"

#include <gtest/gtest.h>

#include <numeric>

#include "io/testing.h"
#include "models/testing.h"

namespace octavo {
namespace {

// Rows of logits then lie further apart than they are long.
TEST(PassTest, RowsOfAnOddVocabularyAreTheSameTogetherAndAlone) {
  const TempFolder folder;
  Json config = SmallConfig("llama");
  config["vocab_size"] = 33;
  folder.Write("config.json", config.dump());
  Executor executor({.model = folder.path().string(),
                     .load_format = "dummy",
                     .kv_cache_memory_bytes = 1 << 20,
                     .max_model_len = 64,
                     .max_num_seqs = 1,
                     .max_num_batched_tokens = 64,
                     .threads = 1});
  std::vector<int32_t> ids(20);
  std::iota(ids.begin(), ids.end(), 5);
  std::vector<float> together, alone;
  Pass(executor).Run(ids, 20, 20, &together);
  Pass one(executor);
  for (int i = 0; i < 20; ++i) one.Run(std::span(ids).first(i + 1), 1, 1, &alone);
  EXPECT_EQ(together.size(), 20u * 33);
  EXPECT_EQ(together, alone);
}

}  // namespace
}  // namespace octavo
