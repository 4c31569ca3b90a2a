// The arrays of one step: built on the host from chunks of sequences, copied to the backend at
// once, always to the same addresses.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kv/block_pool.h"
#include "models/decoder.h"

namespace octavo {

struct BatchLimits {
  int tokens = 0;
  int sequences = 0;
  int64_t pages = 0;  // of a sequence, in each group
};

class Batch {
 public:
  // The backend must outlive the batch.
  Batch(Backend& backend, int groups, const BatchLimits& limits);

  void Clear();

  // Rows for tokens [begin, begin + count) of a sequence, whose pages must reach that far. Returns
  // the first row.
  int Add(std::span<const int32_t> tokens, int64_t begin, int count, const SequencePages& pages);

  // Asks for the logits of a row, and what to sample from them; with `top`, also for the token's
  // ranking with so many others.
  void AddSample(int row, const SampleRow& sample, std::optional<int> top = std::nullopt);

  // Rows of padding, each a sequence of its own, until there are `tokens` rows, in a batch that
  // asks for the logits of every row.
  void PadTo(int tokens);

  int tokens() const { return tokens_; }
  int sequences() const { return static_cast<int>(kv_len_.size()); }
  const BatchLimits& limits() const { return limits_; }
  int32_t position(int row) const { return At<int32_t>(host_, positions_)[row]; }
  int32_t logit_row(size_t sample) const { return At<int32_t>(host_, logit_rows_)[sample]; }
  std::span<const SampleRow> samples() const { return samples_; }
  std::optional<int> top(size_t sample) const { return tops_[sample]; }

  // Copies the step to the backend. What it returns is valid until the next change.
  StepInput Upload();

 private:
  template <class T>
  static T* At(const Memory& memory, int64_t offset) {
    return reinterpret_cast<T*>(memory.data() + offset);
  }
  void AddRow(int32_t id, int32_t position);

  Backend& backend_;
  int groups_;
  BatchLimits limits_;
  // Byte offsets: ids, positions and logit rows, then each group's slots, then the block tables,
  // [sequences, groups, pages].
  int64_t ids_, positions_, logit_rows_, slots_, tables_;
  Memory host_, device_;
  int tokens_ = 0;
  std::vector<int32_t> q_begin_{0}, kv_len_;
  std::vector<SampleRow> samples_;
  std::vector<std::optional<int>> tops_;
};

}  // namespace octavo
