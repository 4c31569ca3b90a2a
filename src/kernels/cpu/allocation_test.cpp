// In a steady state, the CPU backend's ops allocate nothing. (Scratch buffers grow, and attention's
// plan is a vector.)
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels/backend.h"
#include "kernels/test_tensors.h"

namespace {
std::atomic<int64_t> allocations{0};

void* Allocate(size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(bytes == 0 ? 1 : bytes)) return p;
  throw std::bad_alloc();
}
}  // namespace

void* operator new(size_t bytes) { return Allocate(bytes); }
void* operator new[](size_t bytes) { return Allocate(bytes); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return Allocate(bytes); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return Allocate(bytes); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }

namespace octavo {
namespace {

TEST(AllocationTest, SteadyStateAllocatesNothing) {
  constexpr int64_t kRows = 70, kHidden = 96, kVocab = 3000;
  constexpr int kExperts = 4, kTopK = 2;
  std::mt19937 random(1);
  const auto matrix = [&](DType dtype, int64_t rows, int64_t columns) {
    return TestTensor(dtype, rows, columns).Fill(random);
  };
  const TestTensor x = matrix(DType::kBF16, kRows, kHidden),
                   up = matrix(DType::kBF16, kRows, kHidden);
  const TestTensor out(DType::kBF16, kRows, kHidden), router(DType::kF32, kRows, kExperts);
  const TestTensor ids(DType::kI32, kRows, kTopK), weights(DType::kF32, kRows, kTopK);
  const TestTensor square = matrix(DType::kBF16, kHidden, kHidden),
                   head = matrix(DType::kBF16, kVocab, kHidden);
  const TestTensor gate = matrix(DType::kBF16, kExperts, kHidden),
                   norm = matrix(DType::kBF16, 1, kHidden);
  const TestTensor logits(DType::kF32, 4, kVocab);
  const std::vector<Expert> experts(kExperts, Expert{.gate = square, .up = square, .down = square});
  const std::vector<int32_t> tokens(kRows, 5), history = {1, 2, 3, 4, 5};
  std::vector<SampleRow> rows(4);
  rows[1] = {.temperature = 1, .repetition_penalty = 1.1f, .history = history};
  rows[2] = {.temperature = 1, .top_k = 40, .top_p = 0.9f};
  rows[3] = {.temperature = 1, .top_p = 0.99f, .min_p = 0.01f};
  std::vector<SampledToken> sampled(4);
  // One thread: with more, which thread's buffers grow when is chance.
  const auto backend = MakeCpuBackend(1);
  const auto step = [&] {
    backend->Gather(
        {.table = head, .ids = Tensor(tokens.data(), DType::kI32, {kRows}), .out = out});
    backend->Norm({.x = x, .weight = norm, .eps = 1e-5f, .out = out});
    backend->MatMul({.x = x, .weight = square, .bias = {}, .out = out});
    backend->GatedActivation({.gate = x, .up = up, .out = out});
    backend->MatMul({.x = x, .weight = gate, .bias = {}, .out = router});
    backend->Route({.logits = router, .top_k = kTopK, .ids = ids, .weights = weights});
    backend->Experts({.x = x, .ids = ids, .weights = weights, .experts = experts, .out = out});
    backend->MatMul({.x = x.tensor().Rows(0, 4), .weight = head, .bias = {}, .out = logits});
    backend->Sample({.logits = logits, .rows = rows, .out = sampled});
  };
  step();
  const int64_t before = allocations.load();
  for (int i = 0; i < 20; ++i) step();
  EXPECT_EQ(allocations.load(), before);
}

}  // namespace
}  // namespace octavo
