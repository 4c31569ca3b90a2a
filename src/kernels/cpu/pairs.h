// Pairs of bfloat16: what CPUs with AVX512_BF16 multiply, two neighbours to a lane.
#pragma once

namespace octavo::cpu {

// Whether this CPU, with the SIMD target in use, multiplies pairs (pairs-inl.h) and has VBMI.
bool MultipliesPairs();

}  // namespace octavo::cpu
