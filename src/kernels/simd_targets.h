// Running a test once per SIMD target that this build and machine have.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hwy/highway.h"

namespace octavo {

struct SimdTarget {
  int64_t bit;
  std::string name;
};

inline std::vector<SimdTarget> SimdTargets() {
  std::vector<SimdTarget> targets;
  for (int64_t rest = hwy::SupportedTargets() & HWY_TARGETS; rest != 0; rest &= rest - 1) {
    const int64_t bit = rest & -rest;
    targets.push_back({bit, hwy::TargetName(bit)});
  }
  return targets;
}

// Every dispatch chooses this target while the object lives.
class UseSimdTarget {
 public:
  explicit UseSimdTarget(const SimdTarget& target) { Choose(target.bit); }
  ~UseSimdTarget() { Choose(0); }

 private:
  static void Choose(int64_t bit) {
    hwy::SetSupportedTargetsForTest(bit);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

}  // namespace octavo
