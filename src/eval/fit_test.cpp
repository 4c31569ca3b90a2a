#include "eval/fit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace octavo {
namespace {

TEST(Fit, FindsThePolynomialItself) {
  std::vector<Measurement> points;
  for (double x : {256.0, 1024.0, 32768.0, 131072.0})
    points.push_back({x, 0.003 + 2e-5 * x + 4e-10 * x * x});
  for (const bool relative : {false, true}) {
    const auto c = FitPolynomial(points, 2, relative);
    EXPECT_NEAR(c[0], 0.003, 1e-8);
    EXPECT_NEAR(c[1], 2e-5, 1e-12);
    EXPECT_NEAR(c[2], 4e-10, 1e-17);
  }
}

TEST(Fit, RelativeErrorsLetSmallMeasurementsCount) {
  // 1 % too much at the end is more than all of the first point.
  const std::vector<Measurement> points = {{1, 1}, {2, 2}, {1000, 1010}};
  EXPECT_NEAR(FitPolynomial(points, 1, true)[0], 0, 0.02);
  EXPECT_LT(FitPolynomial(points, 1, false)[0], -0.01);
}

TEST(Fit, IntervalsCoverTheTruthAndNarrowWithLessNoise) {
  std::mt19937 random(5);
  const auto interval = [&](double noise) {
    std::normal_distribution<double> normal(0, noise);
    std::vector<std::vector<Measurement>> groups;
    for (double x : {0.0, 1.0, 2.0, 3.0, 4.0}) {
      std::vector<Measurement>& group = groups.emplace_back();
      for (int i = 0; i < 20; ++i) group.push_back({x, 1 + 2 * x + normal(random)});
    }
    return Bootstrap(groups, [](std::span<const std::vector<Measurement>> drawn) {
      std::vector<Measurement> all;
      for (const auto& group : drawn) all.insert(all.end(), group.begin(), group.end());
      return FitPolynomial(all, 1, false)[1];
    });
  };
  const Interval wide = interval(1), narrow = interval(0.01);
  EXPECT_LT(wide.low, 2);
  EXPECT_GT(wide.high, 2);
  EXPECT_LT(narrow.low, 2.001);
  EXPECT_GT(narrow.high, 1.999);
  EXPECT_LT(narrow.high - narrow.low, (wide.high - wide.low) / 20);
}

}  // namespace
}  // namespace octavo
