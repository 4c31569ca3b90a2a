// What the tensor cores keep of a sum, found by adding products of known size to a known start. The
// FP8 kernels' two levels rest on it (docs/kernels/accumulation.md).
#include <cmath>
#include <cstdint>

#include "cuda_memory.h"
#include "kernels/cuda/wgmma.cuh"

namespace octavo::conformance {
namespace {

using cuda::WgmmaType;

// `start`, then `repeats` times + a b once, or + a b for each of the instruction's K.
struct Sum {
  float start;
  uint32_t a, b;  // codes
  bool every_k = false;
  int repeats = 1;
};

template <WgmmaType kType>
constexpr int kCodeBits = kType == WgmmaType::kE4M3 ? 8 : 16;

// One warpgroup. b is the same everywhere, so neither its layout nor its swizzle matters; a is zero
// but for column 0, which is the lowest code in the first registers of every fourth lane.
template <WgmmaType kType>
__global__ void AddUp(Sum sum, float* result) {
  constexpr int kN = 64;
  constexpr uint32_t kAll = kCodeBits<kType> == 8 ? 0x01010101 : 0x00010001;
  __shared__ alignas(1024) uint32_t b[kN * 128 / 4];
  for (int i = threadIdx.x; i < kN * 128 / 4; i += blockDim.x) b[i] = sum.b * kAll;
  cuda::FenceProxyAsync();
  __syncthreads();
  uint32_t first = threadIdx.x % 4 == 0 ? sum.a : 0, second = 0;
  if (sum.every_k) first = second = sum.a * kAll;
  float d[kN / 2];
  for (float& x : d) x = sum.start;
  for (int repeat = 0; repeat < sum.repeats; ++repeat) {
    cuda::WgmmaFence();
    cuda::Wgmma<kType, kN>::RS(d, first, first, second, second, cuda::WgmmaOperand<128>(b).At(0),
                               1);
    cuda::WgmmaCommit();
    cuda::WgmmaWait<0>();
  }
  if (threadIdx.x == 0) *result = d[0];
}

// Of +-2^exponent * eighths / 8, eighths in [8, 16), |exponent| <= 6.
template <WgmmaType kType>
uint32_t Code(int exponent, int eighths = 8, bool negative = false) {
  constexpr int kMantissa = kType == WgmmaType::kE4M3 ? 3 : kType == WgmmaType::kBF16 ? 7 : 10;
  constexpr int kBias = kType == WgmmaType::kE4M3 ? 7 : kType == WgmmaType::kBF16 ? 127 : 15;
  const int magnitude = ((exponent + kBias) * 8 + eighths - 8) << (kMantissa - 3);
  return static_cast<uint32_t>(magnitude) | (negative ? 1u << (kCodeBits<kType> - 1) : 0);
}

template <WgmmaType kType>
class Accumulator {
 public:
  Accumulator() {
    for (bits_ = -1; bits_ < kMostBits; ++bits_) {
      if (Relative(bits_ + 1) != std::ldexp(1.0f, -(bits_ + 1))) break;
    }
  }

  // Fraction bits: 2^-bits of a sum survives being added to it, 2^-(bits + 1) does not.
  int bits() const { return bits_; }
  // What is left of 1.75, +-0.875 and of K times 0.5, in units of the last bit.
  float OfLarge() const { return Relative(bits_, 14) / Unit(); }
  float OfSmall() const { return Relative(bits_ + 1, 14) / Unit(); }
  float OfNegative() const { return Relative(bits_ + 1, 14, true) / Unit(); }
  float OfMany() const { return Relative(bits_ + 1, 8, false, true) / Unit(); }
  // Whether a start of 20 fraction bits is the same after adding zero.
  bool KeepsStart() const {
    const float start = 1 + 0x1p-20f;
    return Run({.start = start, .a = 0, .b = Code<kType>(0)}) == start;
  }
  // Where adding 1 over and over stops; 2^17 if it does not.
  float Ones() const {
    return Run({.start = 0, .a = Code<kType>(0), .b = Code<kType>(0), .repeats = 1 << 17});
  }

 private:
  static constexpr int kMostBits = 23;  // float32's
  static constexpr int kStart = 12;     // exponent

  float Unit() const { return std::ldexp(1.0f, -bits_); }

  // (sum - start) / start after adding start * 2^-below * eighths / 8.
  static float Relative(int below, int eighths = 8, bool negative = false, bool every_k = false) {
    const int exponent = kStart - below, a = exponent / 2, b = exponent - a;
    const float start = std::ldexp(1.0f, kStart);
    const Sum sum{.start = start,
                  .a = Code<kType>(a, eighths, negative),
                  .b = Code<kType>(b),
                  .every_k = every_k};
    return (Run(sum) - start) / start;
  }

  static float Run(const Sum& sum) {
    const DeviceBuffer result(sizeof(float));
    AddUp<kType><<<1, 128>>>(sum, result.as<float>());
    OCTAVO_CUDA(cudaGetLastError());
    return result.Download<float>()[0];
  }

  int bits_;
};

template <WgmmaType kType>
void Report(const char* name, int least, Tally& tally) {
  const Accumulator<kType> sum;
  std::printf(
      "accumulator %s: %d fraction bits; of 1.75 units of the last bit %g are left, of 0.875 %g, "
      "of "
      "-0.875 %g, of 0.5 added at every k %g; a start of 20 bits is %s; ones add up to %.0f\n",
      name, sum.bits(), sum.OfLarge(), sum.OfSmall(), sum.OfNegative(), sum.OfMany(),
      sum.KeepsStart() ? "kept" : "cut", sum.Ones());
  tally.Count(std::string("accumulator ") + name,
              sum.bits() >= least ? "" : "fewer bits than the kernels count on");
}

}  // namespace

void CheckAccumulator(bool, Tally& tally) {
  Report<WgmmaType::kE4M3>("e4m3", 13, tally);
  Report<WgmmaType::kBF16>("bf16", 22, tally);
  Report<WgmmaType::kF16>("f16", 22, tally);
}

}  // namespace octavo::conformance
