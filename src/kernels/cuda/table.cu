#include "kernels/cuda/table.h"

#include <vector>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/prefill.h"

namespace octavo::cuda {

std::span<const KernelEntry> KernelTable() {
  static const std::vector<KernelEntry> table = [] {
    std::vector<KernelEntry> rows;
    for (const auto& kernels :
         {DecodeKernels64(), DecodeKernels128(), DecodeKernels256(), PrefillFp8Kernels(),
          Prefill16BitKernels64(), Prefill16BitKernels128(), Prefill16BitKernels256()}) {
      rows.insert(rows.end(), kernels.begin(), kernels.end());
    }
    return rows;
  }();
  return table;
}

const KernelEntry* FindKernel(Phase phase, int head_dim, KvFormat k, KvFormat v, AttentionMath math,
                              bool soft_cap) {
  if (ElementSize(k) > 2 || ElementSize(v) > 2) return nullptr;  // float32 is the CPU's
  if (phase == Phase::kDecode) math = AttentionMath::k16Bit;
  const auto fits = [&](std::optional<KvFormat> row, KvFormat format) {
    return row ? *row == format : phase == Phase::kDecode || ElementSize(format) == 1;
  };
  for (const KernelEntry& entry : KernelTable()) {
    if (entry.phase == phase && entry.head_dim == head_dim && entry.math == math &&
        (entry.soft_cap || !soft_cap) && fits(entry.k, k) && fits(entry.v, v)) {
      return &entry;
    }
  }
  return nullptr;
}

}  // namespace octavo::cuda
