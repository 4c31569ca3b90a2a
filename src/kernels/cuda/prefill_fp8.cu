#include "kernels/cuda/prefill_fp8.cuh"

namespace octavo::cuda {
namespace {

template <class Config>
KernelEntry Entry() {
  return {.phase = Phase::kPrefill,
          .head_dim = Config::kHeadDim,
          .k = KvFormat::kFp8E4M3,
          .v = KvFormat::kFp8E4M3,
          .math = Config::kTwoLevel ? AttentionMath::kFp8 : AttentionMath::kFp8TensorCore,
          .soft_cap = false,
          .function = reinterpret_cast<const void*>(prefill_fp8_kernel<Config>),
          .rows = Config::kRows,
          .tile_tokens = Config::kTileTokens,
          .threads = Config::kThreads,
          .shared_bytes = Config::kSharedBytes};
}

}  // namespace

// Shapes: what was fastest of those without spills (docs/kernels/prefill.md).
std::vector<KernelEntry> PrefillFp8Kernels() {
  return {
      Entry<PrefillFp8Config<64, 4, 192, 4, 1, true, true, 3>>(),
      Entry<PrefillFp8Config<128, 3, 192, 3, 1, true, true, 3>>(),
      Entry<PrefillFp8Config<256, 2, 192, 2, 2, false, true, 6>>(),
      Entry<PrefillFp8Config<64, 4, 192, 4, 1, false, false, 3>>(),
      Entry<PrefillFp8Config<128, 3, 192, 3, 1, false, false, 4>>(),
      Entry<PrefillFp8Config<256, 2, 192, 2, 1, false, false, 4>>(),
  };
}

}  // namespace octavo::cuda
