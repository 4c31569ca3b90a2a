// What every backend's Sample must agree on to the bit: the random number, and which tokens are
// kept.
//
// Sampling is an exponential race: every kept token draws v in (0, 1) from (seed, choice,
// token_index, id) and scores l - log(-log(1 - v)), l its logit after penalty and temperature; the
// highest score wins, which happens with probability softmax(l). Unlike inverting a cumulative sum,
// no token's draw depends on an order of summation or on the other tokens, so backends whose logits
// differ in the last place still agree, and a GPU needs one maximum.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "base/philox.h"
#include "kernels/backend.h"

namespace octavo {

// At and below, a temperature means greedy (as in vLLM).
inline constexpr float kGreedyTemperature = 1e-5f;

// The words of tokens 4 * quad ... 4 * quad + 3.
constexpr std::array<uint32_t, 4> SampleWords(uint32_t quad, uint64_t seed, uint32_t choice,
                                              uint32_t token_index) {
  return Philox({quad, token_index, choice, 0},
                {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

inline double SampleUniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

inline double RaceScore(float logit, uint32_t word) {
  return double{logit} - std::log(-std::log1p(-SampleUniform(word)));
}

// Hugging Face's: every token of the history once, whatever its count.
inline float Penalize(float logit, float penalty) {
  return logit > 0 ? logit / penalty : logit * penalty;
}

// min_p keeps logits (after temperature) with logit - max >= this.
inline double MinPMargin(float min_p) { return min_p >= 1 ? 0.0 : std::log(double{min_p}); }

}  // namespace octavo
