// Warpgroup matrix products: d[64, N] (+)= a[64, K] b[N, K]^T, K being 32 bytes, b (and a, unless
// in registers) K-major in swizzled shared memory, accumulators of float32 or pairs of float16.
//
// Accumulator register 4 j + i of a thread holds row 16 * warp + lane / 4 + 8 * (i / 2), column
// 8 j + 2 * (lane % 4) + i % 2. Pairs: register 2 j + i holds row ... + 8 * i, that column of i = 0
// and the next.
//
// Between WgmmaFence() and the WgmmaWait() that covers them, no other instruction may touch the
// registers of a product: ptxas serialises what does not keep to that (warning C7514).
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace octavo::cuda {

__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// K-major operands: rows of kRowBytes (128 or 64), which is also the swizzle, in groups of eight.
template <int kRowBytes>
class WgmmaOperand {
 public:
  __device__ explicit WgmmaOperand(const void* p) : low_((SharedAddress(p) >> 4) | (1u << 16)) {}

  // The descriptor of what lies `bytes` further; the next 32 bytes of K are at + 32. Made anew
  // where it stands: sums of descriptors and constants, kept in registers across a loop, would not
  // leave enough for the accumulators.
  __device__ __forceinline__ uint64_t At(int bytes) const {
    uint32_t low = low_;
    asm volatile("" : "+r"(low));
    return (uint64_t{kHigh} << 32) | (low + bytes / 16);
  }

 private:
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  static constexpr uint32_t kHigh = (8 * kRowBytes >> 4) | ((kRowBytes == 128 ? 1u : 2u) << 30);
  uint32_t low_;
};

enum class WgmmaType { kE4M3, kE4M3ToF16, kBF16, kF16 };

// SS: both operands in shared memory, RS: a in registers. accumulate 0: d starts from zero.
template <WgmmaType kType, int kN>
struct Wgmma;

// Operand lists: %0 ... of the assembler text, and the registers they stand for, by their number;
// c: "+f" or "+r".
#define OCTAVO_TEXT_0                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OCTAVO_TEXT_32                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OCTAVO_TEXT_64                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define OCTAVO_TEXT_96                                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %1" \
  "23, %124, %125, %126, %127"
#define OCTAVO_REGS_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define OCTAVO_REGS_16(c, d, i)                                                   \
  OCTAVO_REGS_4(c, d, i), OCTAVO_REGS_4(c, d, i + 4), OCTAVO_REGS_4(c, d, i + 8), \
      OCTAVO_REGS_4(c, d, i + 12)
#define OCTAVO_REGS_32(c, d, i) OCTAVO_REGS_16(c, d, i), OCTAVO_REGS_16(c, d, i + 16)
#define OCTAVO_TEXT_OF_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OCTAVO_REGS_OF_16(c, d) OCTAVO_REGS_16(c, d, 0)
#define OCTAVO_TEXT_OF_32 OCTAVO_TEXT_0
#define OCTAVO_REGS_OF_32(c, d) OCTAVO_REGS_32(c, d, 0)
#define OCTAVO_TEXT_OF_36 OCTAVO_TEXT_0 ", %32, %33, %34, %35"
#define OCTAVO_REGS_OF_36(c, d) OCTAVO_REGS_32(c, d, 0), OCTAVO_REGS_4(c, d, 32)
#define OCTAVO_TEXT_OF_48 \
  OCTAVO_TEXT_0           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define OCTAVO_REGS_OF_48(c, d) OCTAVO_REGS_32(c, d, 0), OCTAVO_REGS_16(c, d, 32)
#define OCTAVO_TEXT_OF_64 OCTAVO_TEXT_0 ", " OCTAVO_TEXT_32
#define OCTAVO_REGS_OF_64(c, d) OCTAVO_REGS_32(c, d, 0), OCTAVO_REGS_32(c, d, 32)
#define OCTAVO_TEXT_OF_128 OCTAVO_TEXT_0 ", " OCTAVO_TEXT_32 ", " OCTAVO_TEXT_64 ", " OCTAVO_TEXT_96
#define OCTAVO_REGS_OF_128(c, d) \
  OCTAVO_REGS_OF_64(c, d), OCTAVO_REGS_32(c, d, 64), OCTAVO_REGS_32(c, d, 96)

// kRegisters of type kRegister; kI0 ... kI5: the indices of the operands behind them.
#define OCTAVO_WGMMA(kType, kN, kRegister, kConstraint, kRegisters, kInstruction, kTransposeSS,   \
                     kTransposeRS, kI0, kI1, kI2, kI3, kI4, kI5)                                  \
  template <>                                                                                     \
  struct Wgmma<WgmmaType::kType, kN> {                                                            \
    static __device__ __forceinline__ void SS(kRegister (&d)[kRegisters], uint64_t a, uint64_t b, \
                                              int accumulate) {                                   \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #kI2                                        \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #kN kInstruction                           \
                   " {" OCTAVO_TEXT_OF_##kRegisters "}, %" #kI0 ", %" #kI1                        \
                                                    ", p, 1, 1" kTransposeSS "; }"                \
                   : OCTAVO_REGS_OF_##kRegisters(kConstraint, d)                                  \
                   : "l"(a), "l"(b), "r"(accumulate));                                            \
    }                                                                                             \
    static __device__ __forceinline__ void RS(kRegister (&d)[kRegisters], uint32_t a0,            \
                                              uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,  \
                                              int accumulate) {                                   \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #kI5                                        \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #kN kInstruction                           \
                   " {" OCTAVO_TEXT_OF_##kRegisters "}, {%" #kI0 ", %" #kI1 ", %" #kI2 ", %" #kI3 \
                                                    "}, %" #kI4 ", p, 1, 1" kTransposeRS "; }"    \
                   : OCTAVO_REGS_OF_##kRegisters(kConstraint, d)                                  \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));                \
    }                                                                                             \
  };
#define OCTAVO_WGMMA_FP8(kN, kRegisters, ...) \
  OCTAVO_WGMMA(kE4M3, kN, float, "+f", kRegisters, "k32.f32.e4m3.e4m3", "", "", __VA_ARGS__)
#define OCTAVO_WGMMA_FP8_TO_F16(kN, kRegisters, ...) \
  OCTAVO_WGMMA(kE4M3ToF16, kN, uint32_t, "+r", kRegisters, "k32.f16.e4m3.e4m3", "", "", __VA_ARGS__)
#define OCTAVO_WGMMA_16BIT(kN, kRegisters, ...)                                          \
  OCTAVO_WGMMA(kBF16, kN, float, "+f", kRegisters, "k16.f32.bf16.bf16", ", 0, 0", ", 0", \
               __VA_ARGS__)                                                              \
  OCTAVO_WGMMA(kF16, kN, float, "+f", kRegisters, "k16.f32.f16.f16", ", 0, 0", ", 0", __VA_ARGS__)

OCTAVO_WGMMA_FP8(64, 32, 32, 33, 34, 35, 36, 37)
OCTAVO_WGMMA_FP8(72, 36, 36, 37, 38, 39, 40, 41)
OCTAVO_WGMMA_FP8(128, 64, 64, 65, 66, 67, 68, 69)
OCTAVO_WGMMA_FP8(256, 128, 128, 129, 130, 131, 132, 133)
OCTAVO_WGMMA_FP8_TO_F16(192, 48, 48, 49, 50, 51, 52, 53)
OCTAVO_WGMMA_16BIT(32, 16, 16, 17, 18, 19, 20, 21)
OCTAVO_WGMMA_16BIT(64, 32, 32, 33, 34, 35, 36, 37)
OCTAVO_WGMMA_16BIT(128, 64, 64, 65, 66, 67, 68, 69)
OCTAVO_WGMMA_16BIT(256, 128, 128, 129, 130, 131, 132, 133)

}  // namespace octavo::cuda
