#include "kernels/cuda/table.h"

#include <vector>

#include "kernels/cuda/decode.h"

namespace octavo::cuda {

std::span<const KernelEntry> KernelTable() {
  static const std::vector<KernelEntry> table = [] {
    std::vector<KernelEntry> rows;
    for (const auto& kernels : {DecodeKernels64(), DecodeKernels128(), DecodeKernels256()}) {
      rows.insert(rows.end(), kernels.begin(), kernels.end());
    }
    return rows;
  }();
  return table;
}

const KernelEntry* FindKernel(Phase phase, int head_dim, KvFormat k, KvFormat v,
                              AttentionMath math) {
  if (phase == Phase::kDecode) math = AttentionMath::k16Bit;
  for (const KernelEntry& entry : KernelTable()) {
    if (entry.phase == phase && entry.head_dim == head_dim && entry.math == math &&
        entry.k.value_or(k) == k && entry.v.value_or(v) == v) {
      return &entry;
    }
  }
  return nullptr;
}

}  // namespace octavo::cuda
