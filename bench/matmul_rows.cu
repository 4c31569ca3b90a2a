// The matmul rows of attention_bench: what one layer of Llama-3.1-8B multiplies, and its lm_head.
#include <memory>

#include "kernels/cuda/ops.h"
#include "rows.h"

namespace octavo::bench {
namespace {

struct MatMulWork {
  int64_t rows, k;
  std::vector<int64_t> outs;
  cuda::MatMuls matmuls;
  struct Set {
    DeviceMemory x, weight, out;
  };
  std::vector<Set> sets;

  MatMulWork(int64_t rows_, int64_t k_, std::vector<int64_t> outs_)
      : rows(rows_), k(k_), outs(std::move(outs_)) {
    for (int64_t i = 0; i < std::min<int64_t>(kColdBytes / (All() * k * 2) + 2, 32); ++i) {
      Set set{.x = DeviceMemory(rows * k * 2),
              .weight = DeviceMemory(All() * k * 2),
              .out = DeviceMemory(rows * All() * 4)};
      FillNormal(set.x.as(), Element::kBF16, rows * k, 1, 40 + i);
      FillNormal(set.weight.as(), Element::kBF16, All() * k, 50, 80 + i);
      sets.push_back(std::move(set));
    }
  }
  int64_t All() const {
    int64_t all = 0;
    for (int64_t n : outs) all += n;
    return all;
  }
  void Run(int index, void* stream) {
    const Set& set = sets[index];
    const Tensor weight(set.weight.as(), DType::kBF16, {All(), k});
    const Tensor out(set.out.as(), DType::kF32, {rows, All()});
    std::vector<Projection> parts;
    int64_t begin = 0;
    for (int64_t n : outs) {
      parts.push_back({weight.Rows(begin, begin + n), {}, out.Columns(begin, begin + n)});
      begin += n;
    }
    matmuls.Project(Tensor(set.x.as(), DType::kBF16, {rows, k}), parts,
                    static_cast<cudaStream_t>(stream));
  }
};

}  // namespace

std::vector<Row> MatMulRows(int rows) {
  const struct {
    const char* name;
    int64_t k;
    std::vector<int64_t> outs;
  } shapes[] = {{"q|k|v", 4096, {4096, 1024, 1024}},
                {"o", 4096, {4096}},
                {"gate|up", 4096, {14336, 14336}},
                {"down", 14336, {4096}},
                {"lm_head", 4096, {128256}}};
  std::vector<Row> list;
  for (const auto& shape : shapes) {
    if (rows > 64 && shape.outs[0] == 128256) continue;  // of the last token only
    const auto work = std::make_shared<MatMulWork>(rows, shape.k, shape.outs);
    const double all = static_cast<double>(work->All()), k = static_cast<double>(shape.k);
    list.push_back({.group = "matmul",
                    .name = std::to_string(rows) + " rows, " + shape.name,
                    .format = "bf16",
                    .bytes = 2 * all * k + rows * (2 * k + 4 * all),
                    .flops = rows > 64 ? 2 * rows * all * k : 0,
                    .sets = static_cast<int>(work->sets.size()),
                    .call = [work](int set, void* stream) { work->Run(set, stream); }});
  }
  return list;
}

}  // namespace octavo::bench
