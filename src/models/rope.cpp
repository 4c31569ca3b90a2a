#include "models/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <fmt/format.h>

namespace octavo {
namespace {

constexpr double kMostTheta = 1e15;
constexpr double kMostFactor = 1e6;
constexpr double kMostPositions = 1 << 30;

RopeType ReadType(const ConfigReader& dictionary) {
  const bool named = dictionary.Has("rope_type") || dictionary.Has("type");
  if (!named) {
    for (const auto& [key, value] : dictionary.json().items()) {
      if (key != "rope_theta" && key != "partial_rotary_factor" && !value.is_null()) {
        dictionary.FailExpected("rope_type", "a rope type", nullptr);
      }
    }
    return RopeType::kDefault;
  }
  const char* key = dictionary.Has("rope_type") ? "rope_type" : "type";
  const std::string type = dictionary.String(key);
  if (dictionary.Has("type") && dictionary.String("type") != type) {
    dictionary.Fail("type", fmt::format("{} contradicts rope_type {}",
                                        Quote(dictionary.String("type")), Quote(type)));
  }
  if (type == "default") return RopeType::kDefault;
  if (type == "linear") return RopeType::kLinear;
  if (type == "llama3") return RopeType::kLlama3;
  if (type == "yarn") return RopeType::kYarn;
  dictionary.Fail(key,
                  fmt::format("{} is not supported (default, linear, llama3, yarn)", Quote(type)),
                  ErrorCode::kUnsupported);
}

double YarnAttentionFactor(const ConfigReader& dictionary, double factor) {
  const auto given = dictionary.NullableNumber("attention_factor", 1e-6, 1e6);
  if (given) return *given;
  const auto scale = [factor](double mscale) {
    return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
  };
  const double mscale = dictionary.NullableNumber("mscale", 0, 1e6).value_or(0);
  const double mscale_all_dim = dictionary.NullableNumber("mscale_all_dim", 0, 1e6).value_or(0);
  if (mscale != 0 && mscale_all_dim != 0) return scale(mscale) / scale(mscale_all_dim);
  return scale(1);
}

// One dictionary; `theta` stands in for a missing rope_theta.
RopeParameters ReadRopeDictionary(const ConfigReader& dictionary, double theta,
                                  int64_t max_position_embeddings) {
  RopeParameters p;
  p.type = ReadType(dictionary);
  p.theta = dictionary.Number("rope_theta", 1 + 1e-6, kMostTheta, theta);
  if (dictionary.NullableNumber("partial_rotary_factor", 0, 1).value_or(1) != 1) {
    dictionary.Fail("partial_rotary_factor", "only 1 is supported", ErrorCode::kUnsupported);
  }
  if (p.type == RopeType::kDefault) return p;
  p.factor = dictionary.Number("factor", 1, kMostFactor);
  if (p.type == RopeType::kLinear) return p;
  const double original_missing = static_cast<double>(max_position_embeddings);
  p.original_max_position_embeddings =
      dictionary.Number("original_max_position_embeddings", 1, kMostPositions,
                        p.type == RopeType::kYarn ? std::optional(original_missing) : std::nullopt);
  if (p.type == RopeType::kLlama3) {
    p.low_freq_factor = dictionary.Number("low_freq_factor", 1e-6, 1e6);
    p.high_freq_factor = dictionary.Number("high_freq_factor", 1e-6, 1e6);
    if (p.high_freq_factor <= p.low_freq_factor) {
      dictionary.Fail("high_freq_factor",
                      fmt::format("expected more than low_freq_factor {:g}, found {:g}",
                                  p.low_freq_factor, p.high_freq_factor));
    }
    return p;
  }
  p.beta_fast = dictionary.NullableNumber("beta_fast", 1e-6, 1e6).value_or(32);
  p.beta_slow = dictionary.NullableNumber("beta_slow", 1e-6, 1e6).value_or(1);
  if (p.beta_fast < p.beta_slow) {
    dictionary.Fail("beta_fast", fmt::format("expected at least beta_slow {:g}, found {:g}",
                                             p.beta_slow, p.beta_fast));
  }
  p.attention_factor = YarnAttentionFactor(dictionary, p.factor);
  p.truncate = dictionary.Bool("truncate", true);
  return p;
}

// The same value may stand inside the dictionary and beside it.
void CheckTheta(const ConfigReader& config, double theta) {
  if (!config.Has("rope_theta")) return;
  const double beside = config.Number("rope_theta", 1 + 1e-6, kMostTheta);
  if (beside != theta) {
    config.Fail("rope_theta",
                fmt::format("{:g} contradicts the {:g} of its dictionary", beside, theta));
  }
}

// base^(2i / dim), as torch computes it: float32 throughout.
std::vector<float> PositionFrequencies(double theta, int dim) {
  std::vector<float> frequencies(dim / 2);
  for (int i = 0; i < dim / 2; ++i) {
    frequencies[i] =
        std::pow(static_cast<float>(theta), static_cast<float>(2 * i) / static_cast<float>(dim));
  }
  return frequencies;
}

// Long wavelengths are divided by the factor, short ones kept, those between interpolated.
void ScaleLlama3(const RopeParameters& p, std::vector<float>& inv_freq) {
  const float factor = static_cast<float>(p.factor);
  const float low = static_cast<float>(p.low_freq_factor);
  const float original = static_cast<float>(p.original_max_position_embeddings);
  const float longest = static_cast<float>(p.original_max_position_embeddings / p.low_freq_factor);
  const float shortest =
      static_cast<float>(p.original_max_position_embeddings / p.high_freq_factor);
  const float range = static_cast<float>(p.high_freq_factor - p.low_freq_factor);
  for (float& f : inv_freq) {
    // torch divides a number by a tensor as number * (1 / tensor).
    const float wavelength = static_cast<float>(2 * std::numbers::pi) * (1.0f / f);
    if (wavelength > longest) {
      f = f / factor;
    } else if (!(wavelength < shortest)) {
      const float smooth = (original * (1.0f / wavelength) - low) / range;
      f = (1.0f - smooth) * f / factor + smooth * f;
    }
  }
}

// Frequencies that turn often within the original context are kept, those that turn less than once
// are divided by the factor, with a linear ramp between.
void ScaleYarn(const RopeParameters& p, int dim, std::vector<float>& inv_freq,
               const std::vector<float>& position_frequencies) {
  const auto correction = [&](double rotations) {
    return dim * std::log(p.original_max_position_embeddings / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(p.theta));
  };
  double low = correction(p.beta_fast), high = correction(p.beta_slow);
  if (p.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
        1.0f);
    const float keep = 1.0f - ramp;
    const float interpolated = 1.0f / (static_cast<float>(p.factor) * position_frequencies[i]);
    inv_freq[i] = interpolated * (1.0f - keep) + inv_freq[i] * keep;
  }
}

}  // namespace

RopeParameters ReadRope(const ConfigReader& config, std::string_view layer_type,
                        const RopeParameters& missing, int64_t max_position_embeddings) {
  if (config.NullableNumber("partial_rotary_factor", 0, 1).value_or(1) != 1) {
    config.Fail("partial_rotary_factor", "only 1 is supported", ErrorCode::kUnsupported);
  }
  const double theta = config.Number("rope_theta", 1 + 1e-6, kMostTheta, missing.theta);
  if (config.Has("rope_parameters") && config.Has("rope_scaling") &&
      *config.Find("rope_parameters") != *config.Find("rope_scaling")) {
    config.Fail("rope_parameters", "contradicts rope_scaling");
  }
  auto dictionary =
      config.Object(config.Has("rope_parameters") ? "rope_parameters" : "rope_scaling");
  if (!dictionary) {
    RopeParameters p = missing;
    p.theta = theta;
    return p;
  }
  if (dictionary->Has("full_attention") || dictionary->Has("sliding_attention")) {
    auto nested = dictionary->Object(layer_type);
    if (!nested) dictionary->FailExpected(layer_type, "an object", dictionary->Find(layer_type));
    return ReadRopeDictionary(*nested, missing.theta, max_position_embeddings);
  }
  const RopeParameters p = ReadRopeDictionary(*dictionary, theta, max_position_embeddings);
  CheckTheta(config, p.theta);
  return p;
}

RopeSpec MakeRope(const RopeParameters& parameters, int head_dim) {
  RopeSpec rope;
  const std::vector<float> frequencies = PositionFrequencies(parameters.theta, head_dim);
  for (const float f : frequencies) rope.inv_freq.push_back(1.0f / f);
  switch (parameters.type) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
      for (float& f : rope.inv_freq) f /= static_cast<float>(parameters.factor);
      break;
    case RopeType::kLlama3:
      ScaleLlama3(parameters, rope.inv_freq);
      break;
    case RopeType::kYarn:
      ScaleYarn(parameters, head_dim, rope.inv_freq, frequencies);
      rope.scaling = static_cast<float>(parameters.attention_factor);
      break;
  }
  return rope;
}

int AddRope(ModelSpec& spec, RopeSpec rope) {
  const auto it = std::find(spec.ropes.begin(), spec.ropes.end(), rope);
  if (it != spec.ropes.end()) return static_cast<int>(it - spec.ropes.begin());
  spec.ropes.push_back(std::move(rope));
  return static_cast<int>(spec.ropes.size()) - 1;
}

}  // namespace octavo
