#include "kernels/cuda/decode.cuh"

namespace octavo::cuda {

std::vector<KernelEntry> DecodeKernels256() {
  constexpr int kBF16 = static_cast<int>(KvFormat::kBF16);
  constexpr int kE4M3 = static_cast<int>(KvFormat::kFp8E4M3);
  constexpr int kInt8 = static_cast<int>(KvFormat::kInt8PerTokenHead);
  return {
      DecodeEntry<256, kBF16, kBF16>(),
      DecodeEntry<256, kE4M3, kE4M3>(),
      DecodeEntry<256, kInt8, kInt8>(),
      DecodeEntry<256, kAnyFormat, kAnyFormat>(),
  };
}

}  // namespace octavo::cuda
