#include "engine/batch.h"

#include <algorithm>

#include "base/error.h"

namespace octavo {

Batch::Batch(Backend& backend, int groups, const BatchLimits& limits)
    : backend_(backend), groups_(groups), limits_(limits) {
  constexpr int64_t kWord = sizeof(int32_t);
  ids_ = 0;
  positions_ = ids_ + limits.tokens * kWord;
  logit_rows_ = positions_ + limits.tokens * kWord;
  slots_ = (logit_rows_ + limits.tokens * kWord + 7) / 8 * 8;
  tables_ = slots_ + groups * limits.tokens * int64_t{sizeof(int64_t)};
  const int64_t bytes = tables_ + limits.sequences * groups * limits.pages * kWord;
  host_ = backend.AllocateHost(bytes);
  device_ = backend.Allocate(bytes);
  if (!host_.data() || !device_.data()) {
    throw Error(ErrorCode::kResourceExhausted,
                "out of memory for the arrays of a step; lower --max-num-seqs or --max-model-len");
  }
}

void Batch::Clear() {
  tokens_ = 0;
  q_begin_.assign(1, 0);
  kv_len_.clear();
  samples_.clear();
  tops_.clear();
}

void Batch::AddRow(int32_t id, int32_t position) {
  OCTAVO_CHECK(tokens_ < limits_.tokens, tokens_, limits_.tokens);
  At<int32_t>(host_, ids_)[tokens_] = id;
  At<int32_t>(host_, positions_)[tokens_] = position;
  ++tokens_;
}

int Batch::Add(std::span<const int32_t> tokens, int64_t begin, int count,
               const SequencePages& pages) {
  const int first_row = tokens_;
  const int64_t end = begin + count;
  OCTAVO_CHECK(count > 0 && end <= static_cast<int64_t>(tokens.size()), begin, count,
               tokens.size());
  const size_t used = (end + kPageSize - 1) / kPageSize;
  OCTAVO_CHECK(sequences() < limits_.sequences && static_cast<int64_t>(used) <= limits_.pages,
               sequences(), limits_.sequences, used, limits_.pages);
  for (int64_t position = begin; position < end; ++position)
    AddRow(tokens[position], static_cast<int32_t>(position));
  for (int group = 0; group < groups_; ++group) {
    int64_t* slots = At<int64_t>(host_, slots_) + int64_t{group} * limits_.tokens + first_row;
    for (int64_t position = begin; position < end; ++position) {
      *slots++ = int64_t{pages.PageForWrite(group, position)} * kPageSize + position % kPageSize;
    }
    uint32_t* table =
        At<uint32_t>(host_, tables_) + (sequences() * groups_ + group) * limits_.pages;
    std::ranges::copy(pages.table(group).first(used), table);
  }
  q_begin_.push_back(tokens_);
  kv_len_.push_back(static_cast<int32_t>(end));
  return first_row;
}

void Batch::AddSample(int row, const SampleRow& sample, std::optional<int> top) {
  At<int32_t>(host_, logit_rows_)[samples_.size()] = row;
  samples_.push_back(sample);
  tops_.push_back(top);
}

void Batch::PadTo(int tokens) {
  OCTAVO_CHECK(std::ssize(samples_) == tokens_, samples_.size(), tokens_);
  while (tokens_ < tokens) {
    for (int group = 0; group < groups_; ++group)
      At<int64_t>(host_, slots_)[int64_t{group} * limits_.tokens + tokens_] = -1;
    At<int32_t>(host_, logit_rows_)[tokens_] = 0;
    AddRow(0, 0);
    q_begin_.push_back(tokens_);
    kv_len_.push_back(0);
  }
}

StepInput Batch::Upload() {
  const int64_t pages = groups_ * limits_.pages;
  backend_.Upload(device_.data(), host_.data(),
                  tables_ + sequences() * pages * int64_t{sizeof(uint32_t)});
  const auto words = [&](int64_t offset, int64_t count) {
    return Tensor(At<int32_t>(device_, offset), DType::kI32, {count});
  };
  StepInput input{.ids = words(ids_, tokens_),
                  .positions = words(positions_, tokens_),
                  .logit_rows = words(logit_rows_, limits_.tokens),
                  .groups = {}};
  for (int group = 0; group < groups_; ++group) {
    Tensor table(At<uint32_t>(device_, tables_) + group * limits_.pages, DType::kI32,
                 {sequences(), limits_.pages});
    table.row_stride = pages;
    input.groups.push_back(
        {.tokens = tokens_,
         .q_begin = q_begin_,
         .kv_len = kv_len_,
         .slots = Tensor(At<int64_t>(device_, slots_) + int64_t{group} * limits_.tokens,
                         DType::kI64, {tokens_}),
         .block_table = table});
  }
  return input;
}

}  // namespace octavo
