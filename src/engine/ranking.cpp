#include "engine/ranking.h"

#include <algorithm>
#include <cmath>

namespace octavo {

Ranking RankToken(std::span<const float> logits, float soft_cap, int32_t token, int top) {
  const size_t count = std::min<size_t>(top, logits.size());
  // The cap keeps the order but may make neighbours equal, so all but the sum is done before it.
  Ranking ranking{.rank = 1};
  std::vector<TokenLogprob>& best = ranking.top;  // logits for now
  const auto by_logit = [](float logit, const TokenLogprob& other) {
    return logit > other.logprob;  // what comes later has a higher id
  };
  for (size_t i = 0; i < logits.size(); ++i) {
    const int32_t id = static_cast<int32_t>(i);
    const float logit = logits[i];
    ranking.rank += logit > logits[token] || (logit == logits[token] && id < token);
    if (best.size() == count && (count == 0 || logit <= best.back().logprob)) continue;
    if (best.size() == count) best.pop_back();
    best.insert(std::upper_bound(best.begin(), best.end(), logit, by_logit), {id, logit});
  }
  const auto capped = [&](float logit) {
    return soft_cap > 0 ? soft_cap * std::tanh(double{logit} / soft_cap) : double{logit};
  };
  const double max = capped(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(capped(logit) - max);
  const auto logprob = [&](float logit) {
    return static_cast<float>(capped(logit) - max - std::log(sum));
  };
  for (TokenLogprob& one : best) one.logprob = logprob(one.logprob);
  ranking.logprob = logprob(logits[token]);
  return ranking;
}

}  // namespace octavo
