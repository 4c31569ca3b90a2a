#include "kernels/cuda/prefill_16bit.cuh"

namespace octavo::cuda {

// Shapes: docs/kernels/prefill.md. At head_dim 64 there are registers for a third warpgroup where
// there is no soft cap.
std::vector<KernelEntry> Prefill16BitKernels() {
  constexpr WgmmaType kBF16 = WgmmaType::kBF16, kF16 = WgmmaType::kF16;
  return {
      Prefill16BitEntry<kBF16, 64, 3, 128, 4, 0>(),  Prefill16BitEntry<kF16, 64, 3, 128, 4, 0>(),
      Prefill16BitEntry<kBF16, 64, 2, 128, 4, 4>(),  Prefill16BitEntry<kF16, 64, 2, 128, 4, 4>(),
      Prefill16BitEntry<kBF16, 128, 2, 128, 2, 8>(), Prefill16BitEntry<kF16, 128, 2, 128, 2, 8>(),
      Prefill16BitEntry<kBF16, 256, 2, 64, 2, 0>(),  Prefill16BitEntry<kF16, 256, 2, 64, 2, 0>(),
  };
}

}  // namespace octavo::cuda
