#include "engine/batch.h"

#include <algorithm>

#include "base/error.h"

namespace octavo {

void Batch::Clear() {
  ids_.clear();
  positions_.clear();
  q_begin_.assign(1, 0);
  kv_len_.clear();
  logit_rows_.clear();
  samples_.clear();
  for (Group& group : groups_) {
    group.slots.clear();
    group.tables.clear();
  }
}

int Batch::Add(std::span<const int32_t> tokens, int64_t begin, int count,
               const SequencePages& pages) {
  const int first_row = this->tokens();
  const int64_t end = begin + count;
  OCTAVO_CHECK(count > 0 && end <= static_cast<int64_t>(tokens.size()), begin, count,
               tokens.size());
  ids_.insert(ids_.end(), tokens.begin() + begin, tokens.begin() + end);
  for (int64_t position = begin; position < end; ++position)
    positions_.push_back(static_cast<int32_t>(position));
  q_begin_.push_back(this->tokens());
  kv_len_.push_back(static_cast<int32_t>(end));

  const size_t used = (end + kPageSize - 1) / kPageSize;
  for (size_t g = 0; g < groups_.size(); ++g) {
    const int group = static_cast<int>(g);
    for (int64_t position = begin; position < end; ++position) {
      groups_[g].slots.push_back(int64_t{pages.PageForWrite(group, position)} * kPageSize +
                                 position % kPageSize);
    }
    const std::span<const uint32_t> table = pages.table(group);
    groups_[g].tables.emplace_back(table.begin(), table.begin() + used);
  }
  return first_row;
}

void Batch::AddSample(int row, const SampleRow& sample) {
  logit_rows_.push_back(row);
  samples_.push_back(sample);
}

std::vector<BatchView> Batch::Views() {
  std::vector<BatchView> views;
  for (Group& group : groups_) {
    size_t widest = 1;
    for (const auto& table : group.tables) widest = std::max(widest, table.size());
    group.block_table.assign(group.tables.size() * widest, kNoPage);
    for (size_t i = 0; i < group.tables.size(); ++i) {
      std::copy(group.tables[i].begin(), group.tables[i].end(),
                group.block_table.begin() + i * widest);
    }
    views.push_back({.tokens = tokens(),
                     .q_begin = q_begin_,
                     .kv_len = kv_len_,
                     .slots = group.slots,
                     .block_table = Tensor(group.block_table.data(), DType::kI32,
                                           {static_cast<int64_t>(group.tables.size()),
                                            static_cast<int64_t>(widest)})});
  }
  return views;
}

}  // namespace octavo
