#include "kernels/cuda/prefill_16bit.cuh"

namespace octavo::cuda {
namespace {

template <Operand kKeys, Operand kValues>
KernelEntry Entry() {
  // What is widened should serve many rows.
  if constexpr (kKeys == Operand::kWiden || kValues == Operand::kWiden) {
    return Prefill16BitEntry<64, 3, 64, 4, 4, kKeys, kValues>();
  } else {
    return Prefill16BitEntry<64, 2, 128, 4, 4, kKeys, kValues>();
  }
}

}  // namespace

std::vector<KernelEntry> Prefill16BitKernels64() {
  return {
      // Without a soft cap there are registers for three warpgroups.
      Prefill16BitEntry<64, 3, 128, 4, 0, Operand::kBF16, Operand::kBF16>(),
      Entry<Operand::kBF16, Operand::kBF16>(),
      Entry<Operand::kF16, Operand::kF16>(),
      Entry<Operand::kBF16, Operand::kWiden>(),
      Entry<Operand::kWiden, Operand::kBF16>(),
      Entry<Operand::kF16, Operand::kWiden>(),
      Entry<Operand::kWiden, Operand::kF16>(),
      Entry<Operand::kWiden, Operand::kWiden>(),
  };
}

}  // namespace octavo::cuda
