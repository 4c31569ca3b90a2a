#include "kernels/cpu/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "../tests/conformance/attention_cases.h"
#include "base/float_bits.h"
#include "kernels/cpu/append.h"
#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/pairs.h"
#include "kernels/reference/attention.h"
#include "kernels/simd_targets.h"

namespace octavo {
namespace {

using conformance::AttentionCase;
using conformance::AttentionOps;

AttentionOps ReferenceOps() {
  return {reference::Append,
          [](const AttentionShape& shape, const BatchView&) {
            return std::make_unique<reference::NoPlan>(shape);
          },
          reference::Attention};
}

std::unique_ptr<cpu::WorkPlan> PlanCpu(const AttentionShape& shape, const BatchView& batch,
                                       int threads) {
  auto plan = std::make_unique<cpu::WorkPlan>(shape, threads);
  plan->Make(batch);
  return plan;
}

// The CPU's operations on a pool of threads; `plan_threads` may promise more than there are, to
// force splits.
class CpuOps {
 public:
  explicit CpuOps(int threads, int plan_threads = 0)
      : pool_(threads), plan_threads_(plan_threads > 0 ? plan_threads : threads) {}
  AttentionOps ops() {
    return {[this](const AppendArgs& args) { cpu::Append(args, pool_); },
            [this](const AttentionShape& shape, const BatchView& batch) {
              return PlanCpu(shape, batch, plan_threads_);
            },
            [this](const AttentionArgs& args) { cpu::Attention(args, pool_, workspace_); }};
  }

 private:
  ThreadPool pool_;
  int plan_threads_;
  Buffer workspace_;
};

// Every test runs on each SIMD target that this machine has.
class AttentionTest : public testing::TestWithParam<SimdTarget> {
 protected:
  AttentionTest() : use_(GetParam()) {}

 private:
  UseSimdTarget use_;
};
INSTANTIATE_TEST_SUITE_P(Targets, AttentionTest, testing::ValuesIn(SimdTargets()),
                         [](const auto& info) { return info.param.name; });

// The types of q and out between which kernels differ.
std::vector<DType> DTypes() {
  if (cpu::MultipliesPairs()) return {DType::kF32, DType::kBF16};
  return {DType::kF32};
}

// Each case in each such type, every other one of bfloat16 with q in float32.
std::vector<AttentionCase> InDTypes(const std::vector<AttentionCase>& cases) {
  std::vector<AttentionCase> all = cases;
  for (AttentionCase c : cases) {
    if (!cpu::MultipliesPairs()) break;
    c.wide_q = c.dtype == DType::kBF16 || all.size() % 2 == 0;
    c.dtype = DType::kBF16;
    all.push_back(c);
  }
  return all;
}

TEST_P(AttentionTest, AgreesWithTheReference) {
  CpuOps cpu(2);
  double worst[2] = {}, worst_row[2] = {};
  for (const AttentionCase& c : InDTypes(conformance::AttentionCases())) {
    const bool pairs = cpu::UsesPairs(c.k_format, c.v_format, c.dtype);
    const conformance::Outcome outcome = RunAttentionCase(c, ReferenceOps(), cpu.ops(), pairs);
    EXPECT_EQ(outcome.failure, "") << c.Name();
    const int i = c.dtype == DType::kBF16;
    worst[i] = std::max(worst[i], outcome.difference.nmse);
    worst_row[i] = std::max(worst_row[i], outcome.difference.worst_row);
  }
  std::printf("worst NMSE float32 %.2e (row %.2e), bfloat16 %.2e (row %.2e)\n", worst[0],
              worst_row[0], worst[1], worst_row[1]);
}

// ---- row invariance

using conformance::Pool;
using conformance::Step;
using conformance::TokenRange;

// The output rows of every token of every sequence, as bytes; sequences append and attend `chunk`
// tokens at a time, all sequences of the case in the same calls, or (alone) one after another.
using Prepare = std::function<void(const Step&, std::span<const TokenRange>)>;
std::vector<std::vector<std::byte>> RunInChunks(const AttentionCase& c, int chunk, bool alone,
                                                const AttentionOps& ops,
                                                const Prepare& prepare = {}) {
  Pool pool(c, Lengths(c));
  const int sequences = static_cast<int>(c.sequences.size());
  const int64_t row_bytes = int64_t{c.heads()} * c.head_dim * static_cast<int64_t>(SizeOf(c.dtype));
  std::vector<std::vector<std::byte>> result(sequences);
  auto run = [&](const std::vector<TokenRange>& ranges) {
    const Step step(c, pool, ranges);
    if (prepare) prepare(step, ranges);
    ops.append(step.Append(pool));
    const auto plan = ops.plan(c.shape(), step.view);
    ops.attention(step.Attention(pool, *plan));
    EXPECT_TRUE(step.intact() && pool.arena().intact()) << c.Name();
    int row = 0;
    for (const TokenRange& range : ranges) {
      for (int t = range.begin; t < range.end; ++t, ++row) {
        const std::byte* out =
            step.out.Row<std::byte>(0) + row * step.out.row_stride * int64_t(SizeOf(c.dtype));
        result[range.sequence].insert(result[range.sequence].end(), out, out + row_bytes);
      }
    }
  };
  const std::vector<int> lengths = Lengths(c);
  if (alone) {
    for (int s = 0; s < sequences; ++s) {
      for (int begin = 0; begin < lengths[s]; begin += chunk)
        run({{s, begin, std::min(lengths[s], begin + chunk)}});
    }
    return result;
  }
  for (int begin = 0; begin < *std::max_element(lengths.begin(), lengths.end()); begin += chunk) {
    std::vector<TokenRange> ranges;
    for (int s = 0; s < sequences; ++s) {
      if (begin < lengths[s]) ranges.push_back({s, begin, std::min(lengths[s], begin + chunk)});
    }
    run(ranges);
  }
  return result;
}

std::vector<AttentionCase> InvarianceCases() {
  std::vector<AttentionCase> cases;
  const std::vector<conformance::SequenceCase> sequences = {{0, 513}, {0, 7}, {0, 1}, {0, 64}};
  for (KvFormat format : conformance::kAllFormats) {
    cases.push_back({.k_format = format, .v_format = format, .sequences = sequences});
  }
  for (KvFormat format : {KvFormat::kBF16, KvFormat::kFp8PerTokenHead}) {
    cases.push_back({.k_format = format,
                     .v_format = format,
                     .dtype = DType::kBF16,
                     .window = 100,
                     .sinks = true,
                     .soft_cap = 5,
                     .sequences = sequences});
    cases.push_back({.k_format = format,
                     .v_format = format,
                     .group = 3,
                     .kv_heads = 1,
                     .head_dim = 24,
                     .sequences = sequences});
    cases.push_back({.k_format = format,
                     .v_format = format,
                     .group = 1,
                     .kv_heads = 1,
                     .head_dim = 128,
                     .window = 64,
                     .sequences = sequences});
    cases.push_back({.k_format = format,
                     .v_format = format,
                     .group = 16,
                     .kv_heads = 1,
                     .head_dim = 32,
                     .sequences = {{0, 140}, {0, 65}}});
    // A window that reaches over a cut and begins anywhere.
    cases.push_back({.k_format = format,
                     .v_format = format,
                     .kv_heads = 1,
                     .head_dim = 16,
                     .window = 1300,
                     .sequences = {{0, 2300}}});
    // More than two splits.
    cases.push_back({.k_format = format,
                     .v_format = format,
                     .kv_heads = 1,
                     .head_dim = 16,
                     .sequences = {{0, 2200}, {0, 1100}}});
  }
  for (size_t i = 0; i < cases.size(); ++i) cases[i].seed = 100 + i;
  return cases;
}

TEST_P(AttentionTest, ARowsBitsDoNotDependOnChunkNeighboursOrThreads) {
  for (const AttentionCase& c : InDTypes(InvarianceCases())) {
    CpuOps one(1);
    const auto expected = RunInChunks(c, 100000, true, one.ops());
    for (int chunk : {1, 3, 7, 64, 513, 100000}) {
      // The plan for 64 workers splits wherever it can.
      for (int plan_threads : {1, 2, 64}) {
        CpuOps cpu(3, plan_threads);
        for (bool alone : {false, true}) {
          if (alone && plan_threads != 2) continue;
          const auto actual = RunInChunks(c, chunk, alone, cpu.ops());
          EXPECT_TRUE(actual == expected) << c.Name() << ": chunk " << chunk << ", plan for "
                                          << plan_threads << (alone ? ", alone" : ", together");
        }
      }
    }
  }
}

// ---- NaN and Inf

void CheckWhatNoQuerySees(const AttentionCase& c) {
  Pool pool(c, Lengths(c));
  conformance::FillCache(c, pool, ReferenceOps());
  CpuOps cpu(1);
  const Step step(c, pool, conformance::CallRanges(c));
  const auto plan = cpu.ops().plan(c.shape(), step.view);
  std::vector<double> first;
  for (unsigned char fill : {0x00, 0xFF, 0x7F, 0x7C}) {
    for (int s = 0; s < 2; ++s) pool.FillUnseen(s, Lengths(c)[s], fill);
    cpu.ops().attention(step.Attention(pool, *plan));
    std::vector<double> out;
    for (int64_t row = 0; row < step.out.rows(); ++row) {
      for (int64_t i = 0; i < step.out.columns(); ++i) {
        out.push_back(conformance::Element(step.out, row, i));
        ASSERT_TRUE(std::isfinite(out.back())) << c.Name() << " " << int{fill};
      }
    }
    if (first.empty()) first = out;
    ASSERT_TRUE(out == first) << c.Name();
  }
}

TEST_P(AttentionTest, WhatNoQuerySeesNeverLeaks) {
  for (KvFormat k : conformance::kAllFormats) {
    for (KvFormat v : conformance::kAllFormats) {
      for (int tokens : {1, 3, 40}) {
        for (DType dtype : DTypes()) {
          CheckWhatNoQuerySees({.k_format = k,
                                .v_format = v,
                                .dtype = dtype,
                                .window = tokens == 3 ? 50 : 0,
                                .sequences = {{130, tokens}, {10, tokens}},
                                .seed = 200});
        }
      }
    }
  }
}

// A NaN or infinity in K or V of one token: queries before it (and, with a window, long after it)
// are untouched to the bit; those that see it are finite where the reference is.
void CheckWhatAQuerySees(const AttentionCase& c, int where, bool in_k, float bad) {
  const int length = c.sequences[0].tokens;
  const Prepare spoil = [&](const Step& step, std::span<const TokenRange> ranges) {
    const int row = where - ranges[0].begin;
    if (row < 0 || where >= ranges[0].end) return;
    conformance::SetElement(in_k ? step.k : step.v, row, 3, bad);  // of kv head 0
  };
  CpuOps cpu(2);
  const auto clean = RunInChunks(c, length, true, cpu.ops());
  const auto expected = RunInChunks(c, length, true, ReferenceOps(), spoil);
  const Tensor expected_out(expected[0].data(), c.dtype, {length, c.heads() * c.head_dim});
  const size_t row_bytes = clean[0].size() / length;
  for (int chunk : {1, 7, length}) {
    const auto actual = RunInChunks(c, chunk, true, cpu.ops(), spoil);
    const Tensor out(actual[0].data(), c.dtype, {length, c.heads() * c.head_dim});
    EXPECT_TRUE(conformance::Compare(out, expected_out, c.head_dim).finite_alike)
        << c.Name() << " " << bad << in_k;
    for (int t = 0; t < length; ++t) {
      if (t >= where && (c.window == 0 || t < where + c.window)) continue;
      ASSERT_EQ(std::memcmp(&actual[0][t * row_bytes], &clean[0][t * row_bytes], row_bytes), 0)
          << c.Name() << " token " << t << " chunk " << chunk << " value " << bad;
    }
  }
}

TEST_P(AttentionTest, WhatAQuerySeesShowsAsInTheReference) {
  const float inf = std::numeric_limits<float>::infinity(),
              nan = std::numeric_limits<float>::quiet_NaN();
  for (KvFormat format : conformance::kAllFormats) {
    for (int window : {0, 40}) {
      for (bool in_k : {true, false}) {
        for (float bad : {nan, inf, -inf}) {
          for (DType dtype : DTypes()) {
            CheckWhatAQuerySees({.k_format = format,
                                 .v_format = format,
                                 .dtype = dtype,
                                 .window = window,
                                 .sequences = {{0, 150}},
                                 .seed = 300},
                                70, in_k, bad);
          }
        }
      }
    }
  }
}

// ---- formats

// A query that sees one token returns that token's V: every code of the 8-bit formats, in both
// kernels.
void CheckEveryCode(KvFormat format, DType dtype, int tokens) {
  AttentionCase c{.k_format = KvFormat::kBF16,
                  .v_format = format,
                  .dtype = dtype,
                  .group = 1,
                  .kv_heads = 1,
                  .head_dim = 256,
                  .window = 1,
                  .sequences = {{0, tokens}},
                  .seed = 400};
  Pool pool(c, Lengths(c));
  conformance::FillCache(c, pool, ReferenceOps());
  const KvLayer layer = pool.Layer();
  std::byte* claim = layer.Claim(pool.page(0, 0));
  for (int t = 0; t < tokens; ++t) {
    for (int code = 0; code < 256; ++code) {
      const int d = (code + t) % 256;
      claim[layer.layout.VOffset(0) + d * kPageSize + VPosition(format, t)] =
          static_cast<std::byte>(code);
    }
    const float one = 1.0f;
    if (HasTokenScales(format)) std::memcpy(claim + layer.layout.VScaleOffset(0) + 4 * t, &one, 4);
  }
  CpuOps cpu(1);
  const Step step(c, pool, conformance::CallRanges(c));
  const auto plan = cpu.ops().plan(c.shape(), step.view);
  cpu.ops().attention(step.Attention(pool, *plan));
  const float scale = HasTokenScales(format) ? 1.0f : layer.v_scale[0];
  for (int t = 0; t < tokens; ++t) {
    for (int code = 0; code < 256; ++code) {
      if (format == KvFormat::kInt8PerTokenHead && code == 0x80) continue;  // -128 is never stored
      const auto value = static_cast<float>(conformance::Element(step.out, t, (code + t) % 256));
      float expected =
          scale * (StorageDType(format) == DType::kF8E4M3   ? Fp8E4M3::Decode(code)
                   : StorageDType(format) == DType::kF8E5M2 ? Fp8E5M2::Decode(code)
                                                            : static_cast<int8_t>(code));
      if (dtype == DType::kBF16) expected = BF16ToFloat(FloatToBF16(expected));
      if (std::isfinite(expected)) {
        ASSERT_EQ(value, expected) << Name(format) << " " << code;
      } else {
        ASSERT_FALSE(std::isfinite(value)) << Name(format) << " " << code;
      }
    }
  }
}

TEST_P(AttentionTest, DecodesEveryCode) {
  for (KvFormat format : {KvFormat::kFp8E4M3, KvFormat::kFp8E5M2, KvFormat::kFp8PerTokenHead,
                          KvFormat::kInt8PerTokenHead}) {
    for (DType dtype : DTypes()) {
      for (int tokens : {1, 64}) CheckEveryCode(format, dtype, tokens);  // few rows, many rows
    }
  }
}

TEST_P(AttentionTest, AQueryThatSeesNothingYieldsZeros) {
  const AttentionCase c{.sequences = {{0, 3}}, .seed = 500};
  Pool pool(c, Lengths(c));
  conformance::FillCache(c, pool, ReferenceOps());
  CpuOps cpu(1);
  Step step(c, pool, conformance::CallRanges(c));
  const int32_t kv_len[] = {2};  // fewer than the queries: the first stands before the sequence
  step.view.kv_len = kv_len;
  const auto plan = cpu.ops().plan(c.shape(), step.view);
  cpu.ops().attention(step.Attention(pool, *plan));
  for (int64_t i = 0; i < step.out.columns(); ++i) {
    EXPECT_EQ(step.out.Row<float>(0)[i], 0.0f);
    EXPECT_NE(step.out.Row<float>(1)[i], 0.0f);
  }
}

// A sink takes part in the maximum: far above every score it takes all the probability, far below
// none.
TEST_P(AttentionTest, SinksMayBeFarFromTheScores) {
  for (int tokens : {1, 64}) {  // few rows, many rows
    const AttentionCase c{.sequences = {{0, tokens}}, .seed = 600};
    Pool pool(c, Lengths(c));
    conformance::FillCache(c, pool, ReferenceOps());
    CpuOps cpu(1);
    const Step step(c, pool, conformance::CallRanges(c));
    const auto plan = cpu.ops().plan(c.shape(), step.view);
    auto run = [&](float sink) {
      const std::vector<float> sinks(c.heads(), sink);
      AttentionArgs args = step.Attention(pool, *plan);
      if (sink != 0) args.sinks = Tensor(sinks.data(), DType::kF32, {c.heads()});
      cpu.ops().attention(args);
      const float* out = step.out.Row<float>(0);
      return std::vector<float>(out, out + step.out.columns());
    };
    const std::vector<float> none = run(0);
    EXPECT_EQ(run(-500.0f), none);
    EXPECT_EQ(run(500.0f), std::vector<float>(none.size(), 0.0f));
  }
}

// ---- plan

TEST(AttentionPlan, CoversEveryQueryAndPageOnce) {
  for (const AttentionCase& c : conformance::AttentionCases()) {
    Pool pool(c, Lengths(c));
    const Step step(c, pool, conformance::CallRanges(c));
    for (int threads : {1, 2, 64}) {
      const auto plan = PlanCpu(c.shape(), step.view, threads);
      std::vector<std::vector<int>> pages(step.view.tokens *
                                          c.kv_heads);  // seen by a query token and kv head
      for (const AttentionWork::Item& item : plan->work().items) {
        for (int t = item.token_begin; t < item.token_end; ++t) {
          auto& seen = pages[(step.view.q_begin[item.sequence] + t) * c.kv_heads + item.kv_head];
          for (int page = item.page_begin; page < item.page_end; ++page) seen.push_back(page);
        }
      }
      for (int s = 0; s < step.view.sequences(); ++s) {
        const int tokens = step.view.q_begin[s + 1] - step.view.q_begin[s];
        for (int t = 0; t < tokens; ++t) {
          const int position = step.view.kv_len[s] - tokens + t;
          const int begin = c.window > 0 ? std::max(0, position - c.window + 1) : 0;
          for (int head = 0; head < c.kv_heads; ++head) {
            std::vector<int> seen = pages[(step.view.q_begin[s] + t) * c.kv_heads + head];
            std::sort(seen.begin(), seen.end());
            EXPECT_TRUE(std::adjacent_find(seen.begin(), seen.end()) == seen.end())
                << "twice: " << c.Name();
            for (int page = begin / kPageSize; page <= position / kPageSize; ++page) {
              EXPECT_TRUE(std::binary_search(seen.begin(), seen.end(), page)) << c.Name();
            }
          }
        }
      }
      if (threads == 1) {
        EXPECT_EQ(plan->work().combines.size(), 0u);
      }
    }
  }
}

}  // namespace
}  // namespace octavo
