// What is sent and when: see bench_serve.h.
#include <cmath>
#include <random>

#include <fmt/format.h>

#include "base/error.h"
#include "server/bench_serve.h"

namespace octavo {
namespace {

std::uniform_int_distribution<int64_t> Lengths(const char* flag, int64_t mean, double ratio) {
  const int64_t least = static_cast<int64_t>(std::floor(static_cast<double>(mean) * (1 - ratio)));
  const int64_t most = static_cast<int64_t>(std::ceil(static_cast<double>(mean) * (1 + ratio)));
  if (least < 1 || most > 1 << 30) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("{}: expected lengths of 1 to 2^30, found {} to {}", flag, least, most));
  }
  return std::uniform_int_distribution<int64_t>(least, most);
}

}  // namespace

std::vector<RandomPrompt> RandomPrompts(const ServeBenchOptions& o, int count, int32_t vocab) {
  auto input = Lengths("--random-input-len", o.random_input_len, o.random_range_ratio);
  auto output = Lengths("--random-output-len", o.random_output_len, o.random_range_ratio);
  std::uniform_int_distribution<int32_t> id(0, vocab - 1);
  std::mt19937_64 random(o.seed);
  std::vector<RandomPrompt> prompts(count);
  for (RandomPrompt& prompt : prompts) {
    prompt.ids.resize(input(random));
    prompt.output_len = output(random);
    for (int32_t& one : prompt.ids) one = id(random);
  }
  return prompts;
}

std::vector<double> ArrivalTimes(int count, double rate, double burstiness, uint64_t seed) {
  std::vector<double> times(count);
  if (std::isinf(rate)) return times;
  std::gamma_distribution<double> gap(burstiness, 1 / (rate * burstiness));
  std::mt19937_64 random(seed);
  double sum = 0;
  for (double& time : times) time = sum += gap(random);
  if (sum > 0) {
    for (double& time : times) time *= count / rate / sum;
  }
  return times;
}

}  // namespace octavo
