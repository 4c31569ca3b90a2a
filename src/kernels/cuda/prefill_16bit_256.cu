#include "kernels/cuda/prefill_16bit.cuh"

namespace octavo::cuda {
namespace {

template <Operand kKeys, Operand kValues>
KernelEntry Entry() {
  return Prefill16BitEntry<256, 2, 64, 2, 0, kKeys, kValues>();
}

}  // namespace

std::vector<KernelEntry> Prefill16BitKernels256() {
  return {
      Entry<Operand::kBF16, Operand::kBF16>(),   Entry<Operand::kF16, Operand::kF16>(),
      Entry<Operand::kBF16, Operand::kWiden>(),  Entry<Operand::kWiden, Operand::kBF16>(),
      Entry<Operand::kF16, Operand::kWiden>(),   Entry<Operand::kWiden, Operand::kF16>(),
      Entry<Operand::kWiden, Operand::kWiden>(),
  };
}

}  // namespace octavo::cuda
