#include "eval/pass.h"

#include <cmath>

#include <fmt/format.h>

#include "base/error.h"

namespace octavo {

Pass::Pass(Executor& executor)
    : executor_(executor), batch_(executor.MakeBatch()), pages_(executor.pool().Acquire({})) {}

void Pass::Run(std::span<const int32_t> ids, int count, int rows, std::vector<float>* logits,
               const StepObserver& observer) {
  const int64_t begin = written(), end = begin + count;
  if (!pages_.Extend(end)) {
    throw Error(ErrorCode::kResourceExhausted,
                fmt::format("a prompt of {} tokens does not fit in the cache", ids.size()));
  }
  batch_.Clear();
  batch_.Add(ids, begin, count, pages_);
  for (int row = count - rows; row < count; ++row) batch_.AddSample(row, {});
  const float cap = executor_.spec().final_soft_cap;
  const auto take = [&](size_t, const Tensor& some) {
    const size_t before = logits->size(), columns = some.columns();
    logits->resize(before + some.size());
    for (int64_t row = 0; row < some.rows(); ++row) {
      executor_.backend().Download(logits->data() + before + row * columns, some.Row<float>(row),
                                   columns * sizeof(float));
    }
    for (size_t i = before; cap > 0 && i < logits->size(); ++i)
      (*logits)[i] = cap * std::tanh((*logits)[i] / cap);
  };
  executor_.Run(batch_, take, observer);
  pages_.Publish(ids, end);
  pages_.ReleaseBehindWindows();
}

}  // namespace octavo
