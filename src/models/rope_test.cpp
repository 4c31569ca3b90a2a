#include "models/rope.h"

#include <cmath>
#include <numbers>

#include <gtest/gtest.h>

namespace octavo {
namespace {

// Relative: float32 arithmetic against the formula in double.
void ExpectNear(float found, double expected, int i) {
  EXPECT_NEAR(found, expected, 4e-7 * expected) << i;
}

double Default(double theta, int i, int dim) { return std::pow(theta, -2.0 * i / dim); }

TEST(Rope, Default) {
  const RopeSpec rope = MakeRope({.theta = 1e6}, 128);
  ASSERT_EQ(rope.inv_freq.size(), 64u);
  EXPECT_EQ(rope.inv_freq[0], 1.0f);
  EXPECT_EQ(rope.scaling, 1.0f);
  for (int i = 0; i < 64; ++i) ExpectNear(rope.inv_freq[i], Default(1e6, i, 128), i);
}

TEST(Rope, Linear) {
  const RopeSpec rope = MakeRope({.type = RopeType::kLinear, .theta = 1e6, .factor = 8}, 256);
  for (int i = 0; i < 128; ++i) ExpectNear(rope.inv_freq[i], Default(1e6, i, 256) / 8, i);
}

TEST(Rope, Llama3) {
  // Llama 3.1: short wavelengths kept, long ones divided, and some between.
  const RopeSpec rope = MakeRope({.type = RopeType::kLlama3,
                                  .theta = 5e5,
                                  .factor = 8,
                                  .original_max_position_embeddings = 8192,
                                  .low_freq_factor = 1,
                                  .high_freq_factor = 4},
                                 128);
  int kept = 0, between = 0, divided = 0;
  for (int i = 0; i < 64; ++i) {
    const double f = Default(5e5, i, 128), wavelength = 2 * std::numbers::pi / f;
    double expected = f;
    if (wavelength > 8192) {
      expected = f / 8;
      ++divided;
    } else if (wavelength >= 2048) {
      const double smooth = (8192 / wavelength - 1) / 3;
      expected = (1 - smooth) * f / 8 + smooth * f;
      ++between;
    } else {
      ++kept;
    }
    EXPECT_NEAR(rope.inv_freq[i], expected, 2e-6 * expected) << i;
  }
  EXPECT_GT(kept, 20);
  EXPECT_GT(between, 3);
  EXPECT_GT(divided, 20);
}

// gpt-oss: the ramp's ends are not rounded.
TEST(Rope, YarnWithoutTruncation) {
  const RopeParameters parameters = {.type = RopeType::kYarn,
                                     .theta = 150000,
                                     .factor = 32,
                                     .original_max_position_embeddings = 4096,
                                     .beta_fast = 32,
                                     .beta_slow = 1,
                                     .attention_factor = 1.5,
                                     .truncate = false};
  const RopeSpec rope = MakeRope(parameters, 64);
  EXPECT_EQ(rope.scaling, 1.5f);
  const auto correction = [](double rotations) {
    return 64 * std::log(4096 / (rotations * 2 * std::numbers::pi)) / (2 * std::log(150000.0));
  };
  const double low = correction(32), high = correction(1);
  EXPECT_NEAR(low, 8.09, 0.01);
  EXPECT_NEAR(high, 17.40, 0.01);
  for (int i = 0; i < 32; ++i) {
    const double ramp = std::min(1.0, std::max(0.0, (i - low) / (high - low)));
    const double f = Default(150000, i, 64);
    const double expected = f / 32 * ramp + f * (1 - ramp);
    EXPECT_NEAR(rope.inv_freq[i], expected, 2e-6 * expected) << i;
  }
}

TEST(Rope, YarnTruncatesAndHasAnAttentionFactor) {
  const Json json = {{"max_position_embeddings", 32768},
                     {"rope_theta", 1e6},
                     {"rope_scaling", {{"type", "yarn"}, {"factor", 4.0}}}};
  const RopeParameters parameters = ReadRope(ConfigReader(json, "x"), "full_attention", {}, 32768);
  EXPECT_EQ(parameters.original_max_position_embeddings, 32768);
  EXPECT_DOUBLE_EQ(parameters.attention_factor, 0.1 * std::log(4.0) + 1);
  const RopeSpec rope = MakeRope(parameters, 128);
  // floor and ceil of 23.59... and 39.65...
  for (int i = 0; i < 64; ++i) {
    const double ramp = std::min(1.0, std::max(0.0, (i - 23.0) / (40.0 - 23.0)));
    const double f = Default(1e6, i, 128);
    const double expected = f / 4 * ramp + f * (1 - ramp);
    EXPECT_NEAR(rope.inv_freq[i], expected, 2e-6 * expected) << i;
  }
}

TEST(Rope, YarnMscale) {
  Json json = {{"rope_scaling",
                {{"type", "yarn"}, {"factor", 40.0}, {"mscale", 1.0}, {"mscale_all_dim", 1.0}}}};
  const auto factor = [&] {
    return ReadRope(ConfigReader(json, "x"), "", {}, 4096).attention_factor;
  };
  EXPECT_EQ(factor(), 1.0);
  json["rope_scaling"]["mscale_all_dim"] = 0.5;
  EXPECT_DOUBLE_EQ(factor(), (0.1 * std::log(40.0) + 1) / (0.05 * std::log(40.0) + 1));
  json["rope_scaling"]["attention_factor"] = 1.25;
  EXPECT_EQ(factor(), 1.25);
}

TEST(Rope, EqualTablesAreShared) {
  ModelSpec spec;
  EXPECT_EQ(AddRope(spec, MakeRope({.theta = 1e4}, 64)), 0);
  EXPECT_EQ(AddRope(spec, MakeRope({.theta = 1e6}, 64)), 1);
  EXPECT_EQ(AddRope(spec, MakeRope({.theta = 1e4}, 64)), 0);
  EXPECT_EQ(spec.ropes.size(), 2u);
}

}  // namespace
}  // namespace octavo
