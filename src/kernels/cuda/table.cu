#include "kernels/cuda/table.h"

#include <vector>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/widen_pages.h"

namespace octavo::cuda {

std::span<const KernelEntry> KernelTable() {
  static const std::vector<KernelEntry> table = [] {
    std::vector<KernelEntry> rows;
    for (const auto& kernels : {DecodeKernels64(), DecodeKernels128(), DecodeKernels256(),
                                PrefillFp8Kernels(), Prefill16BitKernels()}) {
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
  if (phase == Phase::kPrefill && math == AttentionMath::k16Bit) {
    const std::optional<KvFormat> format = PrefillFormat(k, v);
    if (!format) return nullptr;
    k = v = *format;
  }
  const auto fits = [](std::optional<KvFormat> row, KvFormat format) {
    return !row || *row == format;
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
