// The product of pairs, per SIMD target: Highway 1.0.3 has none for AVX512_BF16, hence the
// instruction by name. OCTAVO_PAIRS is 1 for the targets that can have it; whether this CPU does,
// MultipliesPairs tells.

#if defined(OCTAVO_KERNELS_CPU_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef OCTAVO_KERNELS_CPU_PAIRS_INL_H_
#undef OCTAVO_KERNELS_CPU_PAIRS_INL_H_
#else
#define OCTAVO_KERNELS_CPU_PAIRS_INL_H_
#endif

#include "hwy/highway.h"

#undef OCTAVO_PAIRS
#define OCTAVO_PAIRS (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3)

#if OCTAVO_PAIRS
HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {

using PairLanes = hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::ScalableTag<float>>;

// sum + both products of each lane's pairs; subnormals count as zero.
HWY_INLINE PairLanes MulAddPairs(PairLanes x, PairLanes y, PairLanes sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(x.raw), "v"(y.raw));
  return sum;
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // OCTAVO_PAIRS

#endif  // per-target include guard
