// The attention cases that every backend must pass against kernels/reference, and what is needed to
// run one: seeded inputs, a page pool in random order that starts as 0xFF, outputs between guard
// bytes. Plain C++, so that it builds wherever kernels do; a test framework, or a main, walks
// AttentionCases() and prints Name() of what fails.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "base/float_bits.h"
#include "base/tensor.h"
#include "kernels/backend.h"

namespace octavo::conformance {

// What a backend is asked for. A backend with its own memory copies in and out behind these.
struct AttentionOps {
  std::function<void(const AppendArgs&)> append;
  std::function<std::unique_ptr<AttentionPlan>(const AttentionShape&, const BatchView&)> plan;
  std::function<void(const AttentionArgs&)> attention;
};

inline AttentionOps OpsOf(Backend& backend) {
  return {[&](const AppendArgs& args) { backend.Append(args); },
          [&](const AttentionShape& shape, const BatchView& batch) {
            auto plan = backend.PlanAttention({.shape = shape});
            plan->Make(batch);
            return plan;
          },
          [&](const AttentionArgs& args) { backend.Attention(args); }};
}

struct SequenceCase {
  int cached, tokens;  // in the cache before the call; queries of the call
};

struct AttentionCase {
  KvFormat k_format = KvFormat::kBF16, v_format = KvFormat::kBF16;
  DType dtype = DType::kF32;
  bool wide_q = false;  // float32 whatever dtype is, as where a model routes
  int group = 2, kv_heads = 2, head_dim = 64;
  int window = 0;
  bool sinks = false;
  float soft_cap = 0;
  std::vector<SequenceCase> sequences;
  uint64_t seed = 0;

  int heads() const { return group * kv_heads; }
  AttentionShape shape() const { return {heads(), kv_heads, head_dim, window}; }
  std::string Name() const {
    std::ostringstream name;
    name << octavo::Name(k_format) << '/' << octavo::Name(v_format) << ' ' << octavo::Name(dtype)
         << " heads " << heads() << '/' << kv_heads << " head_dim " << head_dim;
    if (wide_q) name << " float32 q";
    if (window > 0) name << " window " << window;
    if (sinks) name << " sinks";
    if (soft_cap > 0) name << " soft_cap " << soft_cap;
    for (const SequenceCase& s : sequences) name << ' ' << s.cached << '+' << s.tokens;
    name << " seed " << seed;
    return name.str();
  }
};

inline constexpr KvFormat kAllFormats[] = {KvFormat::kF32,
                                           KvFormat::kF16,
                                           KvFormat::kBF16,
                                           KvFormat::kFp8E4M3,
                                           KvFormat::kFp8E5M2,
                                           KvFormat::kFp8PerTokenHead,
                                           KvFormat::kInt8PerTokenHead};

inline std::vector<AttentionCase> AttentionCases() {
  using Batch = std::vector<SequenceCase>;
  const Batch decodes = {
      {0, 1}, {kPageSize - 2, 1}, {kPageSize - 1, 1}, {kPageSize, 1}, {5 * kPageSize + 17, 1}};
  const Batch prompts = {
      {0, 1}, {0, kPageSize - 1}, {0, kPageSize}, {0, kPageSize + 1}, {0, 2 * kPageSize + 3}};
  const Batch mixed = {{100, 37}, {70, 1}, {0, 5}, {kPageSize, kPageSize}, {200, 2}};
  const Batch split = {{2500, 1}, {1100, 20}, {1023, 1}};  // beyond 1024 and 2048 tokens

  std::vector<AttentionCase> cases;
  auto add = [&](AttentionCase c) {
    c.seed = 1000 + cases.size();
    cases.push_back(c);
  };
  for (KvFormat format : kAllFormats) {
    for (const Batch& batch : {decodes, prompts, mixed, split}) {
      add({.k_format = format, .v_format = format, .sequences = batch});
    }
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      for (int head_dim : {64, 128, 256}) {
        add({.k_format = format,
             .v_format = format,
             .dtype = dtype,
             .group = 4,
             .head_dim = head_dim,
             .sequences = mixed});
      }
    }
    for (int group : {1, 2, 4, 8, 16}) {
      add({.k_format = format, .v_format = KvFormat::kBF16, .group = group, .sequences = decodes});
      add({.k_format = KvFormat::kFp8E4M3, .v_format = format, .group = group, .sequences = mixed});
    }
  }
  for (KvFormat format : {KvFormat::kBF16, KvFormat::kFp8E4M3, KvFormat::kInt8PerTokenHead}) {
    for (int window : {1, 16, 63, 64, 65, 200}) {
      for (const Batch& batch : {decodes, prompts, mixed, split}) {
        add({.k_format = format,
             .v_format = format,
             .window = window,
             .sinks = window == 64,
             .sequences = batch});
      }
    }
    for (const Batch& batch : {decodes, mixed, split}) {
      add({.k_format = format, .v_format = format, .sinks = true, .sequences = batch});
      add({.k_format = format, .v_format = format, .soft_cap = 20, .sequences = batch});
      add({.k_format = format,
           .v_format = format,
           .window = 65,
           .sinks = true,
           .soft_cap = 2,
           .sequences = batch});
    }
  }
  // Head dimensions that are no whole number of vectors.
  for (int head_dim : {8, 16, 24, 32, 80, 120}) {
    add({.k_format = KvFormat::kFp8E4M3,
         .v_format = KvFormat::kBF16,
         .head_dim = head_dim,
         .sequences = mixed});
    add({.k_format = KvFormat::kBF16,
         .v_format = KvFormat::kInt8PerTokenHead,
         .head_dim = head_dim,
         .sequences = decodes});
  }
  return cases;
}

// ---- inputs

// Any element of any input is a function of the seed and its place: chunks of a prompt see the same
// numbers.
inline float Normal(uint64_t seed, uint64_t stream, uint64_t index) {
  auto mix = [](uint64_t z) {  // splitmix64
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  };
  const uint64_t bits = mix(mix(mix(seed) + stream) + index);
  const double u = (static_cast<double>(bits >> 32) + 0.5) * 0x1p-32,
               v = static_cast<double>(bits & 0xFFFFFFFF) * 0x1p-32;
  return static_cast<float>(std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v));
}

inline float Element(const Tensor& tensor, int64_t row, int64_t column) {
  return tensor.dtype == DType::kF32 ? tensor.Row<float>(row)[column]
                                     : BF16ToFloat(tensor.Row<uint16_t>(row)[column]);
}

inline void SetElement(const Tensor& tensor, int64_t row, int64_t column, float x) {
  if (tensor.dtype == DType::kF32) {
    tensor.Row<float>(row)[column] = x;
  } else {
    tensor.Row<uint16_t>(row)[column] = FloatToBF16(x);
  }
}

// Memory with a margin on both sides that must stay what it was.
class GuardedBuffer {
 public:
  GuardedBuffer() = default;
  explicit GuardedBuffer(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kMargin) {
    std::memset(memory_.data(), kFill, memory_.size());
  }
  std::byte* data() const { return memory_.data() + kMargin; }
  size_t size() const { return bytes_; }
  bool intact() const {
    auto filled = [](const std::byte* p) {
      return std::all_of(p, p + kMargin, [](std::byte b) { return b == std::byte{kFill}; });
    };
    return filled(memory_.data()) && filled(data() + bytes_);
  }

 private:
  static constexpr size_t kMargin = 256;
  static constexpr unsigned char kFill = 0xFF;
  size_t bytes_ = 0;
  Buffer memory_;
};

// A layer's cache in pages of random order. Everything is 0xFF at first: NaN in every float format.
class Pool {
 public:
  Pool(const AttentionCase& c, std::span<const int> lengths)
      : layout_{c.k_format, c.v_format, c.kv_heads, c.head_dim},
        sequences_(static_cast<int>(lengths.size())) {
    // Another layer's claim stands before and behind this one's.
    page_bytes_ = layout_.ClaimBytes() + 2 * kPageUnit;
    int pages = 0;
    for (int length : lengths) {
      pages += (length + kPageSize - 1) / kPageSize;
      max_pages_ = std::max(max_pages_, (length + kPageSize - 1) / kPageSize);
    }
    std::vector<uint32_t> order(static_cast<size_t>(pages) + 3);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = order.size(); i > 1; --i) {
      const float x = Normal(c.seed, 77, i);
      std::swap(order[i - 1], order[static_cast<size_t>(std::abs(x) * 1e6f) % i]);
    }
    arena_ = GuardedBuffer(order.size() * static_cast<size_t>(page_bytes_));
    table_.assign(static_cast<size_t>(sequences_) * max_pages_, kNoPage);
    size_t next = 0;
    for (int s = 0; s < sequences_; ++s) {
      for (int p = 0; p * kPageSize < lengths[s]; ++p) {
        table_[s * max_pages_ + p] = order[next++] * static_cast<uint32_t>(page_bytes_ / kPageUnit);
      }
    }
    for (int head = 0; head < c.kv_heads; ++head) {
      k_scale_.push_back(0.01f * (1 + 0.3f * head));
      v_scale_.push_back(0.008f * (1 + 0.5f * head));
    }
  }

  KvLayer Layer() {
    return {.layout = layout_,
            .arena = arena_.data(),
            .claim_offset = kPageUnit,
            .k_scale = k_scale_.data(),
            .v_scale = v_scale_.data(),
            .saturated = saturated,
            .amax = amax};
  }
  uint32_t page(int sequence, int index) const { return table_[sequence * max_pages_ + index]; }
  // Rows of the block table for the given sequences. Pages wholly behind the window of the first
  // query are left out.
  std::vector<uint32_t> TableRow(int sequence, int first_page) const {
    std::vector<uint32_t> row(table_.begin() + sequence * max_pages_,
                              table_.begin() + (sequence + 1) * max_pages_);
    std::fill_n(row.begin(), std::min(first_page, max_pages_), kNoPage);
    return row;
  }
  int max_pages() const { return max_pages_; }
  const GuardedBuffer& arena() const { return arena_; }

  // Sets what no query may see of a sequence's last page, behind its `length` tokens, to `byte`.
  void FillUnseen(int sequence, int length, unsigned char byte) {
    std::byte* claim = Layer().Claim(page(sequence, (length - 1) / kPageSize));
    const int k_row = layout_.head_dim * ElementSize(layout_.k_format),
              v_size = ElementSize(layout_.v_format);
    for (int head = 0; head < layout_.kv_heads; ++head) {
      for (int place = (length - 1) % kPageSize + 1; place < kPageSize; ++place) {
        std::memset(claim + layout_.KOffset(head) + place * k_row, byte, k_row);
        for (int d = 0; d < layout_.head_dim; ++d) {
          const int64_t element = int64_t{d} * kPageSize + VPosition(layout_.v_format, place);
          std::memset(claim + layout_.VOffset(head) + element * v_size, byte, v_size);
        }
        if (HasTokenScales(layout_.k_format))
          std::memset(claim + layout_.KScaleOffset(head) + 4 * place, byte, 4);
        if (HasTokenScales(layout_.v_format))
          std::memset(claim + layout_.VScaleOffset(head) + 4 * place, byte, 4);
      }
    }
  }
  int64_t page_bytes() const { return page_bytes_; }

  uint64_t saturated[2] = {};
  float amax[2] = {};

 private:
  KvLayout layout_;
  int sequences_, max_pages_ = 0;
  int64_t page_bytes_;
  GuardedBuffer arena_;
  std::vector<uint32_t> table_;
  std::vector<float> k_scale_, v_scale_;
};

struct TokenRange {
  int sequence, begin, end;
};

// The tensors and the batch of one call that appends, and asks for, the given tokens.
class Step {
 public:
  Step(const AttentionCase& c, const Pool& pool, std::span<const TokenRange> ranges) : case_(c) {
    q_begin_.push_back(0);
    for (const TokenRange& range : ranges) {
      q_begin_.push_back(q_begin_.back() + range.end - range.begin);
      kv_len_.push_back(range.end);
      const int first_page = c.window > 0 ? std::max(0, range.begin - c.window + 1) / kPageSize : 0;
      const std::vector<uint32_t> row = pool.TableRow(range.sequence, first_page);
      table_.insert(table_.end(), row.begin(), row.end());
      for (int t = range.begin; t < range.end; ++t) {
        slots_.push_back(int64_t{pool.page(range.sequence, t / kPageSize)} * kPageSize +
                         t % kPageSize);
      }
    }
    const int tokens = q_begin_.back();
    view = {.tokens = tokens,
            .q_begin = q_begin_,
            .kv_len = kv_len_,
            .slots = Tensor(slots_.data(), DType::kI64, {static_cast<int64_t>(slots_.size())}),
            .block_table = Tensor(table_.data(), DType::kI32, {view_rows(), pool.max_pages()})};
    q = Make(q_memory_, c.wide_q ? DType::kF32 : c.dtype, tokens, c.heads(), 8);
    k = Make(k_memory_, c.dtype, tokens, c.kv_heads, 0);
    v = Make(v_memory_, c.dtype, tokens, c.kv_heads, 0);
    out = Make(out_memory_, c.dtype, tokens, c.heads(), 8);
    int row = 0;
    for (const TokenRange& range : ranges) {
      for (int t = range.begin; t < range.end; ++t, ++row) {
        Fill(q, row, range.sequence, t, 1);
        Fill(k, row, range.sequence, t, 2);
        Fill(v, row, range.sequence, t, 3);
      }
    }
    for (int head = 0; head < c.heads(); ++head) sinks_.push_back(Normal(c.seed, 5, head));
  }
  Step(const Step&) = delete;

  AppendArgs Append(Pool& pool) const {
    AppendArgs args;
    args.q = q;
    args.k = k;
    args.v = v;
    args.heads = case_.heads();
    args.batch = &view;
    args.cache = pool.Layer();
    return args;
  }
  AttentionArgs Attention(Pool& pool, const AttentionPlan& plan) const {
    AttentionArgs args;
    args.q = q;
    args.out = out;
    args.batch = &view;
    args.plan = &plan;
    args.cache = pool.Layer();
    args.scale = 1.0f / std::sqrt(static_cast<float>(case_.head_dim));
    args.soft_cap = case_.soft_cap;
    if (case_.sinks) args.sinks = Tensor(sinks_.data(), DType::kF32, {case_.heads()});
    return args;
  }
  bool intact() const {
    return q_memory_.intact() && k_memory_.intact() && v_memory_.intact() && out_memory_.intact();
  }

  BatchView view;
  Tensor q, k, v, out;

 private:
  int64_t view_rows() const { return static_cast<int64_t>(kv_len_.size()); }

  // Rows are `gap` elements apart.
  Tensor Make(GuardedBuffer& memory, DType dtype, int tokens, int heads, int gap) {
    const int64_t columns = int64_t{heads} * case_.head_dim;
    memory = GuardedBuffer(static_cast<size_t>(tokens * (columns + gap)) * SizeOf(dtype));
    Tensor tensor(memory.data(), dtype, {tokens, columns});
    tensor.row_stride = columns + gap;
    return tensor;
  }
  void Fill(const Tensor& tensor, int row, int sequence, int token, uint64_t stream) {
    for (int64_t i = 0; i < tensor.columns(); ++i) {
      const float x = Normal(case_.seed, stream + 16 * sequence, token * tensor.columns() + i);
      SetElement(tensor, row, i, x);
    }
  }

  AttentionCase case_;
  GuardedBuffer q_memory_, k_memory_, v_memory_, out_memory_;
  std::vector<int32_t> q_begin_, kv_len_;
  std::vector<int64_t> slots_;
  std::vector<uint32_t> table_;
  std::vector<float> sinks_;
};

inline std::vector<int> Lengths(const AttentionCase& c) {
  std::vector<int> lengths;
  for (const SequenceCase& s : c.sequences) lengths.push_back(s.cached + s.tokens);
  return lengths;
}

// Appends what the case has in the cache before the call, one sequence at a time, then the call's
// own tokens.
inline void FillCache(const AttentionCase& c, Pool& pool, const AttentionOps& ops) {
  for (int s = 0; s < static_cast<int>(c.sequences.size()); ++s) {
    const TokenRange range{s, 0, c.sequences[s].cached + c.sequences[s].tokens};
    ops.append(Step(c, pool, std::span(&range, 1)).Append(pool));
  }
}

inline std::vector<TokenRange> CallRanges(const AttentionCase& c) {
  std::vector<TokenRange> ranges;
  for (int s = 0; s < static_cast<int>(c.sequences.size()); ++s) {
    ranges.push_back({s, c.sequences[s].cached, c.sequences[s].cached + c.sequences[s].tokens});
  }
  return ranges;
}

// ---- comparing

// Normalised mean square error over everything, and the worst of any row and head.
struct Difference {
  double nmse = 0, worst_row = 0;
  bool finite_alike = true;  // an element is finite exactly where the expected one is
};

inline Difference Compare(const Tensor& actual, const Tensor& expected, int head_dim) {
  Difference difference;
  double error = 0, power = 0;
  for (int64_t row = 0; row < expected.rows(); ++row) {
    for (int64_t first = 0; first < expected.columns(); first += head_dim) {
      double row_error = 0, row_power = 0;
      for (int64_t i = first; i < first + head_dim; ++i) {
        const double a = Element(actual, row, i), e = Element(expected, row, i);
        if (std::isfinite(a) != std::isfinite(e)) difference.finite_alike = false;
        if (!std::isfinite(a) || !std::isfinite(e)) continue;
        row_error += (a - e) * (a - e);
        row_power += e * e;
      }
      error += row_error;
      power += row_power;
      if (row_error > 0)
        difference.worst_row = std::max(difference.worst_row, row_error / row_power);
    }
  }
  difference.nmse = error > 0 ? error / power : 0;
  return difference;
}

// The stored bytes are the same for both sides, so that the limits are those of the arithmetic,
// whatever the format: float32 sums, or the rounding of a bfloat16 output (uniform within half a
// unit, 2^-8 of the value) and, where they are, of bfloat16 probabilities.
struct Limits {
  double nmse, worst_row;
};
inline Limits LimitsOf(DType dtype, bool rounds_probabilities) {
  if (dtype == DType::kF32) return {1e-12, 1e-11};
  return rounds_probabilities ? Limits{8e-6, 2.4e-5} : Limits{4e-6, 8e-6};
}

struct Outcome {
  std::string failure;  // empty: passed
  Difference difference;
};

// Fills a cache with the reference, runs attention on both sides and compares.
inline Outcome RunAttentionCase(const AttentionCase& c, const AttentionOps& reference,
                                const AttentionOps& ops, bool rounds_probabilities) {
  Pool pool(c, Lengths(c));
  FillCache(c, pool, reference);
  const std::vector<TokenRange> ranges = CallRanges(c);
  AttentionCase wide = c;  // the reference's output is not rounded to bfloat16
  const Step expected(wide, pool, ranges), actual(c, pool, ranges);
  Buffer wide_memory(static_cast<size_t>(expected.out.size()) * sizeof(float));
  Tensor wide_out(wide_memory.data(), DType::kF32, {expected.out.rows(), expected.out.columns()});
  const auto reference_plan = reference.plan(c.shape(), expected.view);
  AttentionArgs args = expected.Attention(pool, *reference_plan);
  args.out = wide_out;
  reference.attention(args);
  const auto plan = ops.plan(c.shape(), actual.view);
  ops.attention(actual.Attention(pool, *plan));

  Outcome outcome;
  outcome.difference = Compare(actual.out, wide_out, c.head_dim);
  const Limits limits = LimitsOf(c.dtype, rounds_probabilities);
  if (!actual.intact() || !pool.arena().intact()) outcome.failure = "wrote outside its output";
  if (!outcome.difference.finite_alike)
    outcome.failure = "finite where the reference is not, or the reverse";
  if (!(outcome.difference.nmse <= limits.nmse) ||
      !(outcome.difference.worst_row <= limits.worst_row)) {
    outcome.failure = "NMSE " + std::to_string(outcome.difference.nmse / limits.nmse) +
                      " of the limit, worst row " +
                      std::to_string(outcome.difference.worst_row / limits.worst_row);
  }
  return outcome;
}

}  // namespace octavo::conformance
