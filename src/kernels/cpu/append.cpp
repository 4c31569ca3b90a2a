#include "kernels/cpu/append.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/float_bits.h"
#include "kernels/cpu/append_kernels.h"

namespace octavo::cpu {
namespace {

constexpr int kQueryRows = 16;  // rows of q in one piece of work

std::vector<AppendRun> FindRuns(const BatchView& batch) {
  std::vector<AppendRun> runs;
  for (int row = 0; row < batch.tokens; ++row) {
    const int64_t slot = batch.slots.Row<int64_t>(0)[row];
    if (slot < 0) continue;
    const uint32_t page = static_cast<uint32_t>(slot / kPageSize);
    const int place = static_cast<int>(slot % kPageSize);
    if (!runs.empty()) {
      AppendRun& last = runs.back();
      if (last.row + last.count == row && last.page == page && last.place + last.count == place) {
        ++last.count;
        continue;
      }
    }
    runs.push_back({row, 1, page, place});
  }
  return runs;
}

std::vector<float> NormWeight(const Tensor& weight, float offset) {
  std::vector<float> out(static_cast<size_t>(weight.size()));
  for (size_t i = 0; i < out.size(); ++i) {
    const float w = weight.dtype == DType::kF32   ? weight.Row<float>(0)[i]
                    : weight.dtype == DType::kF16 ? Float16::Decode(weight.Row<uint16_t>(0)[i])
                                                  : BF16ToFloat(weight.Row<uint16_t>(0)[i]);
    out[i] = w + offset;
  }
  return out;
}

void CheckShapes(const AppendArgs& args) {
  const KvLayout& layout = args.cache.layout;
  OCTAVO_CHECK(layout.head_dim % 8 == 0 && layout.head_dim <= kMaxHeadDim, layout.head_dim);
  const int64_t kv_columns = int64_t{layout.kv_heads} * layout.head_dim;
  OCTAVO_CHECK(args.q.columns() == int64_t{args.heads} * layout.head_dim, ShapeString(args.q),
               args.heads);
  const Tensor& q_out = args.q_out ? args.q_out : args.q;
  OCTAVO_CHECK(q_out.columns() == args.q.columns(), ShapeString(q_out));
  OCTAVO_CHECK(args.k.columns() == kv_columns, ShapeString(args.k), kv_columns);
  OCTAVO_CHECK(args.v.columns() == kv_columns, ShapeString(args.v), kv_columns);
  for (const Tensor* tensor : {&args.q, &args.k, &args.v, &q_out}) {
    OCTAVO_CHECK(tensor->rows() >= args.batch->tokens, ShapeString(*tensor), args.batch->tokens);
    OCTAVO_CHECK(tensor->dtype == DType::kF32 || tensor->dtype == DType::kBF16,
                 ShapeString(*tensor));
  }
  OCTAVO_CHECK(!args.cos_sin ||
                   (args.cos_sin.columns() <= layout.head_dim && args.cos_sin.columns() % 2 == 0 &&
                    args.cos_sin.rows() >= args.batch->tokens),
               ShapeString(args.cos_sin), layout.head_dim);
  OCTAVO_CHECK(!args.q_norm || args.q_norm.size() == layout.head_dim, ShapeString(args.q_norm));
  OCTAVO_CHECK(!args.k_norm || args.k_norm.size() == layout.head_dim, ShapeString(args.k_norm));
}

}  // namespace

void RopeTable(const RopeTableArgs& args, ThreadPool& pool) {
  const int64_t half = args.inv_freq.size();
  pool.ForEach(args.positions.size(), [&](int64_t row, int) {
    float* cos = args.cos_sin.Row<float>(row);
    for (int64_t j = 0; j < half; ++j) {
      const float angle =
          static_cast<float>(args.positions.Row<int32_t>(0)[row]) * args.inv_freq.Row<float>(0)[j];
      cos[j] = std::cos(angle) * args.scaling;
      cos[half + j] = std::sin(angle) * args.scaling;
    }
  });
}

void Append(const AppendArgs& args, ThreadPool& pool) {
  CheckShapes(args);
  AppendJob job;
  job.args = &args;
  job.runs = FindRuns(*args.batch);
  if (args.q_norm) job.q_weight = NormWeight(args.q_norm, args.norm_offset);
  if (args.k_norm) job.k_weight = NormWeight(args.k_norm, args.norm_offset);

  const int64_t kv_heads = args.cache.layout.kv_heads;
  const int64_t kv_work = static_cast<int64_t>(job.runs.size()) * kv_heads;
  const int64_t q_work = (args.batch->tokens + kQueryRows - 1) / kQueryRows;
  pool.ForEach(kv_work + q_work, [&](int64_t i, int) {
    if (i < kv_work) {
      AppendKeysAndValues(job, job.runs[i / kv_heads], static_cast<int>(i % kv_heads));
    } else {
      const int begin = static_cast<int>(i - kv_work) * kQueryRows;
      AppendQueries(job, begin, std::min(args.batch->tokens, begin + kQueryRows));
    }
  });
}

}  // namespace octavo::cpu
