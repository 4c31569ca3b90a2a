// The arrays of one step, as the decoder reads them: built on the host from chunks of sequences.
#pragma once

#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kv/block_pool.h"

namespace octavo {

class Batch {
 public:
  explicit Batch(int groups) : groups_(groups) {}

  void Clear();

  // Rows for tokens [begin, begin + count) of a sequence, whose pages must reach that far. Returns
  // the first row.
  int Add(std::span<const int32_t> tokens, int64_t begin, int count, const SequencePages& pages);

  // Asks for the logits of a row, and what to sample from them.
  void AddSample(int row, const SampleRow& sample);

  int tokens() const { return static_cast<int>(ids_.size()); }
  std::span<const int32_t> ids() const { return ids_; }
  std::span<const int32_t> positions() const { return positions_; }
  std::span<const int32_t> logit_rows() const { return logit_rows_; }
  std::span<const SampleRow> samples() const { return samples_; }

  // Valid until the next change.
  std::vector<BatchView> Views();

 private:
  struct Group {
    std::vector<int64_t> slots;
    std::vector<std::vector<uint32_t>> tables;  // of each sequence
    std::vector<uint32_t> block_table;          // the same as one rectangle
  };

  std::vector<int32_t> ids_, positions_, q_begin_{0}, kv_len_;
  std::vector<Group> groups_;
  std::vector<int32_t> logit_rows_;
  std::vector<SampleRow> samples_;
};

}  // namespace octavo
