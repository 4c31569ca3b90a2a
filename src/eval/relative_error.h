// Relative L2 error, added up over pieces: |a - reference| / |reference|; 0 where both are 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

namespace octavo {

class RelativeError {
 public:
  // Of the elements both have: files may keep fewer logit rows than the prompt has tokens, then the
  // last ones.
  void Add(std::span<const float> a, std::span<const float> reference) {
    const size_t common = std::min(a.size(), reference.size());
    a = a.last(common);
    reference = reference.last(common);
    for (size_t i = 0; i < common; ++i) {
      difference_ += std::pow(double{a[i]} - reference[i], 2);
      norm_ += std::pow(double{reference[i]}, 2);
    }
  }
  double value() const { return difference_ == 0 ? 0 : std::sqrt(difference_ / norm_); }

 private:
  double difference_ = 0, norm_ = 0;
};

}  // namespace octavo
