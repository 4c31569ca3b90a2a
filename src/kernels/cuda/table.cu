#include "kernels/cuda/table.h"

#include <vector>

namespace octavo::cuda {

std::span<const KernelEntry> KernelTable() {
  static const std::vector<KernelEntry> table;
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
