// Where a token stands among all: its rank, and the most probable tokens. From logits on the host,
// since few requests ask.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "octavo/engine.h"

namespace octavo {

struct Ranking {
  float logprob = 0;  // of the token
  int32_t rank = 0;   // 1: the most probable; of equals the lowest id comes first
  std::vector<TokenLogprob> top;
};

// `logits`: finite, before the soft-cap (0: none). `top` beyond all tokens means all.
Ranking RankToken(std::span<const float> logits, float soft_cap, int32_t token, int top);

}  // namespace octavo
