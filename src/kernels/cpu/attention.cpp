#include "kernels/cpu/attention.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numbers>

#include "base/error.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/pairs.h"

namespace octavo::cpu {
namespace {

// As float32, e4m3 is read as float16 bits shifted, that is as 2^-8 of its value
// (attention_common-inl.h).
float DecodeFactor(KvFormat format, bool pairs) {
  return StorageDType(format) == DType::kF8E4M3 && !pairs ? 256.0f : 1.0f;
}

float StaticScale(KvFormat format, const float* scales, int head) {
  if (format != KvFormat::kFp8E4M3 && format != KvFormat::kFp8E5M2) return 1.0f;
  OCTAVO_CHECK(scales != nullptr, Name(format));
  return scales[head];
}

const int32_t* TokenOrder(KvFormat v_format) {
  using Order = std::array<int32_t, kPageSize>;
  auto make = [](KvFormat format) {
    Order order;
    for (int s = 0; s < kPageSize; ++s) order[s] = VToken(format, s);
    return order;
  };
  static const Order natural = make(KvFormat::kF32), eight_bits = make(KvFormat::kFp8E4M3);
  return ElementSize(v_format) == 1 ? eight_bits.data() : natural.data();
}

template <class Work>  // Item or Combine
AttentionBlock MakeBlock(const AttentionArgs& args, const Work& work) {
  const AttentionShape& shape = args.plan->shape();
  const BatchView& batch = *args.batch;
  const KvLayer& cache = args.cache;
  AttentionBlock block;
  block.args = &args;
  block.sequence = work.sequence;
  block.kv_head = work.kv_head;
  block.group = shape.heads / shape.kv_heads;
  block.rows = (work.token_end - work.token_begin) * block.group;
  block.head_dim = shape.head_dim;
  block.row_stride = AlignRow(shape.head_dim);
  block.first_token = batch.q_begin[work.sequence] + work.token_begin;
  block.first_position =
      batch.kv_len[work.sequence] - batch.q_begin[work.sequence + 1] + block.first_token;
  block.window = shape.window > 0 ? shape.window : std::numeric_limits<int>::max() / 2;
  // With a soft cap the change of base comes after it.
  const float base = args.soft_cap > 0 ? 1.0f : std::numbers::log2e_v<float>;
  const KvLayout& layout = cache.layout;
  block.order = TokenOrder(layout.v_format);
  if (UsesPairs(layout.k_format, layout.v_format, args.out.dtype))
    block.pairs = args.q.dtype == DType::kBF16 ? 1 : 2;
  block.score_factor = args.scale * StaticScale(layout.k_format, cache.k_scale, work.kv_head) *
                       DecodeFactor(layout.k_format, block.pairs > 0) * base;
  block.value_factor = StaticScale(layout.v_format, cache.v_scale, work.kv_head) *
                       DecodeFactor(layout.v_format, block.pairs > 0);
  return block;
}

// The scratch memory of one thread.
struct Scratch {
  float* q;
  AttentionState total, split;
  float* kernel;

  static int64_t Floats(int rows, int64_t row_stride) {
    return rows * row_stride + 2 * AttentionState::Floats(rows, row_stride) +
           ManyRowsScratchFloats(rows, row_stride);
  }
  static Scratch At(float* p, int rows, int64_t row_stride) {
    Scratch scratch;
    scratch.q = p;
    p += rows * row_stride;
    scratch.total = AttentionState::At(p, rows);
    p += AttentionState::Floats(rows, row_stride);
    scratch.split = AttentionState::At(p, rows);
    scratch.kernel = p + AttentionState::Floats(rows, row_stride);
    return scratch;
  }
};

const AttentionWork& WorkOf(const AttentionArgs& args) {
  return static_cast<const WorkPlan*>(args.plan)->work();
}

void RunItem(const AttentionArgs& args, const AttentionWork::Item& item, float* partials,
             float* memory) {
  AttentionBlock block = MakeBlock(args, item);
  const Scratch scratch = Scratch::At(memory, block.rows, block.row_stride);
  LoadQueries(block, scratch.q);
  block.q = scratch.q;
  block.page_end = item.page_end;
  auto attend = [&](int page_begin, int page_end, const AttentionState& state) {
    if (block.rows <= kFewRows) {
      AttendFewRows(block, page_begin, page_end, state, scratch.kernel);
    } else {
      AttendManyRows(block, page_begin, page_end, state, scratch.kernel);
    }
  };
  if (item.partial >= 0) {
    attend(item.page_begin, item.page_end,
           AttentionState::At(partials + item.partial * WorkOf(args).partial_stride, block.rows));
    return;
  }
  int page = item.page_begin;
  do {
    const int end = std::min(item.page_end, (page / kSplitPages + 1) * kSplitPages);
    const bool first = page == item.page_begin;
    attend(page, end, first ? scratch.total : scratch.split);
    if (!first) Merge(block, scratch.total, scratch.split);
    page = end;
  } while (page < item.page_end);
  Finish(block, scratch.total);
}

void RunCombine(const AttentionArgs& args, const AttentionWork::Combine& combine, float* partials) {
  const AttentionBlock block = MakeBlock(args, combine);
  auto partial = [&](int i) {
    return AttentionState::At(partials + i * WorkOf(args).partial_stride, block.rows);
  };
  const AttentionState total = partial(combine.partial_begin);
  for (int i = combine.partial_begin + 1; i < combine.partial_end; ++i)
    Merge(block, total, partial(i));
  Finish(block, total);
}

void CheckShapes(const AttentionArgs& args) {
  const AttentionShape& shape = args.plan->shape();
  const KvLayout& layout = args.cache.layout;
  OCTAVO_CHECK(layout.kv_heads == shape.kv_heads, layout.kv_heads, shape.kv_heads);
  OCTAVO_CHECK(layout.head_dim == shape.head_dim && shape.head_dim % 8 == 0, layout.head_dim,
               shape.head_dim);
  for (const Tensor* tensor : {&args.q, &args.out}) {
    OCTAVO_CHECK(tensor->columns() == int64_t{shape.heads} * shape.head_dim &&
                     tensor->rows() >= args.batch->tokens,
                 ShapeString(*tensor), shape.heads, shape.head_dim, args.batch->tokens);
    OCTAVO_CHECK(tensor->dtype == DType::kF32 || tensor->dtype == DType::kBF16,
                 ShapeString(*tensor));
  }
  OCTAVO_CHECK(!args.sinks || args.sinks.size() == shape.heads, ShapeString(args.sinks),
               shape.heads);
}

}  // namespace

bool UsesPairs(KvFormat k_format, KvFormat v_format, DType out) {
  auto fits = [](KvFormat format) {
    return ElementSize(format) == 1 || StorageDType(format) == DType::kBF16;
  };
  return out == DType::kBF16 && fits(k_format) && fits(v_format) && MultipliesPairs();
}

void WorkPlan::Make(const BatchView& batch) {
  work_ = MakeAttentionWork(shape(), batch,
                            {.block_rows = kBlockRows,
                             .split_pages = kSplitPages,
                             .workers = threads_,
                             .dim_align = kDimAlign});
}

void Attention(const AttentionArgs& args, ThreadPool& pool, Buffer& workspace) {
  CheckShapes(args);
  const AttentionWork& work = WorkOf(args);
  const AttentionShape& shape = args.plan->shape();
  int rows = 1;
  for (const AttentionWork::Item& item : work.items) {
    rows = std::max(rows, (item.token_end - item.token_begin) * (shape.heads / shape.kv_heads));
  }
  const int64_t thread_floats = AlignRow(Scratch::Floats(rows, AlignRow(shape.head_dim)));
  const size_t bytes =
      static_cast<size_t>(work.partial_floats + pool.threads() * thread_floats) * sizeof(float);
  if (workspace.size() < bytes) workspace = Buffer(bytes);
  float* partials = reinterpret_cast<float*>(workspace.data());
  float* scratch = partials + work.partial_floats;

  pool.ForEach(static_cast<int64_t>(work.items.size()), [&](int64_t i, int thread) {
    RunItem(args, work.items[i], partials, scratch + thread * thread_floats);
  });
  pool.ForEach(static_cast<int64_t>(work.combines.size()),
               [&](int64_t i, int) { RunCombine(args, work.combines[i], partials); });
}

}  // namespace octavo::cpu
