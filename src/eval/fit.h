// Polynomials through measurements, and how sure one may be of what is read off them.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace octavo {

struct Measurement {
  double x = 0, y = 0;
};

// c[0] + c[1] x + ... + c[degree] x^degree, degree at most 2, least squares of (fit - y), or of
// (fit - y) / y where `relative`, for measurements that span orders of magnitude. At least
// degree + 1 different x.
std::array<double, 3> FitPolynomial(std::span<const Measurement> points, int degree, bool relative);

struct Interval {
  double low = 0, high = 0;
};

// The middle 95 % of what `statistic` gives for samples drawn with replacement from each group of
// measurements (those of one x), `draws` times with a fixed seed. NaN ranks last.
Interval Bootstrap(
    std::span<const std::vector<Measurement>> groups,
    const std::function<double(std::span<const std::vector<Measurement>>)>& statistic,
    int draws = 1000);

}  // namespace octavo
