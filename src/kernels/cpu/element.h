// The element types kernels read and write, as C++ types to overload and template on.
#pragma once

#include <cstdint>

namespace octavo::cpu {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
// Two neighbouring BF16, for CPUs that multiply such (pairs.h).
struct BF16Pair {
  uint32_t bits;
};

}  // namespace octavo::cpu
