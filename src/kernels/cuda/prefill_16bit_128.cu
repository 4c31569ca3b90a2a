#include "kernels/cuda/prefill_16bit.cuh"

namespace octavo::cuda {
namespace {

template <Operand kKeys, Operand kValues>
KernelEntry Entry() {
  // What is widened should serve many rows.
  if constexpr (kKeys == Operand::kWiden || kValues == Operand::kWiden) {
    return Prefill16BitEntry<128, 3, 64, 4, 0, kKeys, kValues>();
  } else {
    return Prefill16BitEntry<128, 2, 128, 2, 8, kKeys, kValues>();
  }
}

}  // namespace

std::vector<KernelEntry> Prefill16BitKernels128() {
  return {
      Entry<Operand::kBF16, Operand::kBF16>(),   Entry<Operand::kF16, Operand::kF16>(),
      Entry<Operand::kBF16, Operand::kWiden>(),  Entry<Operand::kWiden, Operand::kBF16>(),
      Entry<Operand::kF16, Operand::kWiden>(),   Entry<Operand::kWiden, Operand::kF16>(),
      Entry<Operand::kWiden, Operand::kWiden>(),
  };
}

}  // namespace octavo::cuda
