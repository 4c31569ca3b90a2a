// The ops of kernels/backend.h on a CUDA device, but for attention and append (octavo/attention.h).
// Tensors are device memory, weights bfloat16, T bfloat16 or float32; rows may be strided where
// backend.h says so. Nothing here allocates or waits after construction, so all but Sampler may be
// captured in a graph; limits are those of construction.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <span>

#include "kernels/backend.h"

namespace octavo::cuda {

// What is still to be added to `out`: a row of it is owed `count` rows of `terms`. Whoever reads it
// first pays.
struct Owed {
  const float* terms = nullptr;  // [rows * count, columns]; null: nothing
  int count = 0;
  Tensor out;
  bool accumulate = false;  // else `out` is the sum
};
void Settle(const Owed& owed, cudaStream_t stream);

void Gather(const GatherArgs& args, cudaStream_t stream);
// x is float32; what it is owed, with `accumulate`, is added to it first.
void Norm(const NormArgs& args, cudaStream_t stream, const Owed& owed = {});
void GatedActivation(const GatedActivationArgs& args, cudaStream_t stream);
// Both products and the activation in one launch; false, and nothing done, if there are more than a
// few rows.
bool GatedProject(const Tensor& x, const Projection& gate, const Projection& up,
                  const GatedActivationArgs& args, cudaStream_t stream);
void RopeTable(const RopeTableArgs& args, cudaStream_t stream);
void Route(const RouteArgs& args, cudaStream_t stream);

// Few rows by a kernel that streams the weights once; more by cuBLASLt.
class MatMuls {
 public:
  MatMuls();
  ~MatMuls();
  // x is bfloat16, or float32 for few outputs; outputs bfloat16 or float32. One launch for all
  // where their weights (and outputs) stand next to each other.
  void Project(const Tensor& x, std::span<const Projection> projections, cudaStream_t stream,
               bool accumulate = false);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Experts of a layer stand at equal distances in memory, as do their biases. args.out is owed what
// Run returns, which is there until the next Run.
class Experts {
 public:
  struct Limits {
    int rows = 0, experts = 0, top_k = 0;
    int64_t hidden = 0, intermediate = 0;
  };
  explicit Experts(const Limits& limits);
  ~Experts();
  Owed Run(const ExpertsArgs& args, cudaStream_t stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

class Sampler {
 public:
  Sampler(int max_rows, int64_t vocab);
  ~Sampler();
  void Run(const SampleArgs& args, cudaStream_t stream);  // waits for the results

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace octavo::cuda
