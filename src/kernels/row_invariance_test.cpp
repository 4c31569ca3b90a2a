// A row's bits do not depend on how many rows share the call, on where it stands, or on the number
// of threads.
#include <gtest/gtest.h>

#include <memory>

#include "kernels/backend.h"
#include "kernels/mxfp4_testing.h"
#include "kernels/simd_targets.h"
#include "kernels/test_tensors.h"

namespace octavo {
namespace {

constexpr int64_t kRows = 513;
constexpr int64_t kHidden = 150;

class RowInvarianceTest : public testing::Test {
 protected:
  // op(backend, begin, end, out) computes rows [begin, end) of the inputs into rows 0.. of out.
  template <class F>
  void Check(DType t, int64_t columns, const F& op) {
    for (const SimdTarget& target : SimdTargets()) {
      const UseSimdTarget use(target);
      TestTensor all(t, kRows, columns);
      op(*MakeCpuBackend(1), 0, kRows, all);
      for (int threads : {1, 2, 3}) {
        const auto backend = MakeCpuBackend(threads);
        for (int64_t count : {1, 7, 64, 513}) {
          for (int64_t begin : {int64_t{0}, int64_t{5}, kRows - count}) {
            if (begin + count > kRows) continue;
            TestTensor part(t, count, columns);
            op(*backend, begin, begin + count, part);
            for (int64_t r = 0; r < count; ++r) {
              ASSERT_TRUE(part.SameRow(r, all, begin + r))
                  << target.name << ", threads " << threads << ", rows " << begin << " + " << count
                  << ", row " << r;
            }
          }
        }
      }
    }
  }

  TestTensor Random(DType dtype, int64_t rows, int64_t columns, double scale = 1) {
    return TestTensor(dtype, rows, columns).Fill(random_, scale);
  }

  std::mt19937 random_{7};
};

TEST_F(RowInvarianceTest, MatMul) {
  for (DType t : {DType::kF32, DType::kBF16}) {
    // The last is long enough for several panels and, with 513 rows, for several work items.
    for (const auto& [columns, outs] :
         {std::pair<int64_t, int64_t>{kHidden, 37}, {16, 300}, {1000, 20}, {2100, 40}}) {
      const TestTensor x = Random(t, kRows, columns), weight = Random(DType::kBF16, outs, columns);
      Check(
          t, outs,
          [&, w = weight.tensor()](Backend& backend, int64_t begin, int64_t end,
                                   const TestTensor& out) {
            backend.MatMul({.x = x.tensor().Rows(begin, end), .weight = w, .bias = {}, .out = out});
          });
    }
  }
}

TEST_F(RowInvarianceTest, Norm) {
  for (DType t : {DType::kF32, DType::kBF16}) {
    const TestTensor x = Random(t, kRows, kHidden), weight = Random(DType::kF32, 1, kHidden);
    Check(t, kHidden, [&](Backend& backend, int64_t begin, int64_t end, const TestTensor& out) {
      backend.Norm({.x = x.tensor().Rows(begin, end), .weight = weight, .eps = 1e-6f, .out = out});
    });
  }
}

TEST_F(RowInvarianceTest, GatedActivation) {
  for (DType t : {DType::kF32, DType::kBF16}) {
    const TestTensor gate = Random(t, kRows, kHidden), up = Random(t, kRows, kHidden);
    Check(t, kHidden, [&](Backend& backend, int64_t begin, int64_t end, const TestTensor& out) {
      backend.GatedActivation(
          {.gate = gate.tensor().Rows(begin, end), .up = up.tensor().Rows(begin, end), .out = out});
    });
  }
}

TEST_F(RowInvarianceTest, RouteAndExperts) {
  constexpr int kExperts = 12, kTopK = 3;
  const auto check = [&](int64_t hidden, const std::vector<Expert>& experts) {
    for (DType t : {DType::kF32, DType::kBF16}) {
      const TestTensor x = Random(t, kRows, hidden), logits = Random(DType::kF32, kRows, kExperts);
      Check(t, hidden, [&](Backend& backend, int64_t begin, int64_t end, const TestTensor& out) {
        TestTensor ids(DType::kI32, end - begin, kTopK), weights(DType::kF32, end - begin, kTopK);
        backend.Route({.logits = logits.tensor().Rows(begin, end),
                       .top_k = kTopK,
                       .normalize = false,
                       .ids = ids,
                       .weights = weights});
        backend.Experts({.x = x.tensor().Rows(begin, end),
                         .ids = ids,
                         .weights = weights,
                         .experts = experts,
                         .out = out});
      });
    }
  };
  std::vector<Expert> experts(kExperts);
  std::vector<TestTensor> memory;
  memory.reserve(3 * kExperts);
  const auto bf16 = [&](int64_t outs, int64_t in) {
    return memory.emplace_back(Random(DType::kBF16, outs, in, 0.1)).tensor();
  };
  for (Expert& e : experts) {
    e.gate = bf16(70, kHidden);
    e.up = bf16(70, kHidden);
    e.down = bf16(kHidden, 70);
  }
  check(kHidden, experts);
  // Few rows read MXFP4 as it is, many have it widened.
  std::vector<std::vector<uint8_t>> packed;
  packed.reserve(3 * kExperts);
  const auto mxfp4 = [&](int64_t outs, int64_t in) {
    packed.push_back(mxfp4::RandomMatrix(outs, in, 0.1, random_));
    return Tensor(packed.back().data(), DType::kMxfp4, {outs, in});
  };
  for (Expert& e : experts) {
    e.gate = mxfp4(96, 1056);
    e.up = mxfp4(96, 1056);
    e.down = mxfp4(1056, 96);
  }
  check(1056, experts);
}

}  // namespace
}  // namespace octavo
