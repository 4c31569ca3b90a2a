#include "eval/fit.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "base/error.h"

namespace octavo {

std::array<double, 3> FitPolynomial(std::span<const Measurement> points, int degree,
                                    bool relative) {
  OCTAVO_CHECK(degree >= 0 && degree <= 2 && std::ssize(points) > degree, degree, points.size());
  // Normal equations in x / largest, so that powers stay near one.
  double largest = 0;
  for (const Measurement& p : points) largest = std::max(largest, std::fabs(p.x));
  const int n = degree + 1;
  double a[3][4] = {};
  for (const Measurement& p : points) {
    const double weight = relative ? 1 / (p.y * p.y) : 1;
    const double x = largest > 0 ? p.x / largest : 0;
    const double powers[] = {1, x, x * x};
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) a[i][j] += weight * powers[i] * powers[j];
      a[i][3] += weight * powers[i] * p.y;
    }
  }
  for (int i = 0; i < n; ++i) {  // Gauss-Jordan with pivoting
    int pivot = i;
    for (int r = i; r < n; ++r) {
      if (std::fabs(a[r][i]) > std::fabs(a[pivot][i])) pivot = r;
    }
    std::swap(a[i], a[pivot]);
    for (int r = 0; r < n; ++r) {
      if (r == i) continue;
      const double factor = a[r][i] / a[i][i];
      for (int c = 0; c < 4; ++c) a[r][c] -= factor * a[i][c];
    }
  }
  std::array<double, 3> c{};
  for (int i = 0; i < n; ++i) c[i] = a[i][3] / a[i][i] / std::pow(largest, i);
  return c;
}

Interval Bootstrap(
    std::span<const std::vector<Measurement>> groups,
    const std::function<double(std::span<const std::vector<Measurement>>)>& statistic, int draws) {
  std::mt19937 random(1);
  std::vector<double> values;
  std::vector<std::vector<Measurement>> drawn(groups.begin(), groups.end());
  for (int i = 0; i < draws; ++i) {
    for (size_t g = 0; g < groups.size(); ++g) {
      std::uniform_int_distribution<size_t> any(0, groups[g].size() - 1);
      for (Measurement& m : drawn[g]) m = groups[g][any(random)];
    }
    const double value = statistic(drawn);
    values.push_back(std::isnan(value) ? std::numeric_limits<double>::infinity() : value);
  }
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
  };
  return {at(0.025), at(0.975)};
}

}  // namespace octavo
