#include "server/bench_serve.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "io/json.h"

namespace octavo {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(SummariseTest, PercentilesAreInterpolated) {
  const std::vector<double> asked = {0, 25, 90, 99.9, 100};
  const Summary summary = Summarise({4, 1, 3, 2, 10}, asked);  // by hand
  EXPECT_DOUBLE_EQ(summary.mean, 4);
  EXPECT_DOUBLE_EQ(summary.median, 3);
  EXPECT_DOUBLE_EQ(summary.std, std::sqrt(10.0));
  ASSERT_EQ(summary.percentiles.size(), 5u);
  const double expected[] = {1, 2, 7.6, 9.976, 10};
  for (size_t i = 0; i < 5; ++i) EXPECT_NEAR(summary.percentiles[i], expected[i], 1e-12) << i;
  EXPECT_DOUBLE_EQ(Summarise({1, 2}, {}).median, 1.5);
  EXPECT_THAT(Summarise({7}, asked).percentiles, ElementsAre(7, 7, 7, 7, 7));
  EXPECT_THAT(Summarise({}, asked).percentiles, ElementsAre(0, 0, 0, 0, 0));
}

std::vector<double> Gaps(std::vector<double> times) {
  std::adjacent_difference(times.begin(), times.end(), times.begin());
  return times;
}

TEST(ArrivalTimesTest, MeanAndVariationAreAsAsked) {
  constexpr int kCount = 50'000;
  constexpr double kRate = 20;
  for (const double burstiness : {0.25, 1.0, 4.0}) {
    const std::vector<double> times = ArrivalTimes(kCount, kRate, burstiness, 3);
    EXPECT_TRUE(std::is_sorted(times.begin(), times.end()));
    EXPECT_NEAR(times.back(), kCount / kRate, 1e-6);
    const Summary gaps = Summarise(Gaps(times), {});
    EXPECT_NEAR(gaps.mean, 1 / kRate, 1e-9);
    EXPECT_NEAR(std::pow(gaps.std / gaps.mean, 2), 1 / burstiness, 0.06 / burstiness);
  }
  // A Poisson process: gaps longer than t with probability exp(-t * rate).
  std::vector<double> gaps = Gaps(ArrivalTimes(kCount, kRate, 1, 4));
  for (const double t : {0.01, 0.05, 0.15}) {
    const auto longer = std::count_if(gaps.begin(), gaps.end(), [&](double g) { return g > t; });
    EXPECT_NEAR(static_cast<double>(longer) / kCount, std::exp(-t * kRate), 0.01) << t;
  }
}

TEST(ArrivalTimesTest, TheSeedDecides) {
  EXPECT_EQ(ArrivalTimes(100, 5, 1, 7), ArrivalTimes(100, 5, 1, 7));
  EXPECT_NE(ArrivalTimes(100, 5, 1, 7), ArrivalTimes(100, 5, 1, 8));
  EXPECT_EQ(ArrivalTimes(3, INFINITY, 1, 7), std::vector<double>(3, 0.0));
  EXPECT_TRUE(ArrivalTimes(0, 5, 1, 7).empty());
}

TEST(RandomPromptsTest, LengthsAndIdsStayInRangeAndReachItsEnds) {
  const ServeBenchOptions options{
      .random_input_len = 10, .random_output_len = 6, .random_range_ratio = 0.5, .seed = 9};
  const std::vector<RandomPrompt> prompts = RandomPrompts(options, 2000, 300);
  ASSERT_EQ(prompts.size(), 2000u);
  size_t shortest = 99, longest = 0;
  int64_t least = 99, most = 0;
  int32_t lowest = 999, highest = -1;
  for (const RandomPrompt& prompt : prompts) {
    shortest = std::min(shortest, prompt.ids.size());
    longest = std::max(longest, prompt.ids.size());
    least = std::min(least, prompt.output_len);
    most = std::max(most, prompt.output_len);
    for (const int32_t id : prompt.ids) {
      lowest = std::min(lowest, id);
      highest = std::max(highest, id);
    }
  }
  EXPECT_EQ(shortest, 5u);
  EXPECT_EQ(longest, 15u);
  EXPECT_EQ(least, 3);
  EXPECT_EQ(most, 9);
  EXPECT_EQ(lowest, 0);
  EXPECT_EQ(highest, 299);
  EXPECT_EQ(RandomPrompts(options, 3, 300)[2].ids, prompts[2].ids);
  EXPECT_NE(RandomPrompts({.random_input_len = 10, .seed = 1}, 1, 300)[0].ids,
            RandomPrompts({.random_input_len = 10, .seed = 2}, 1, 300)[0].ids);
  EXPECT_THROW(RandomPrompts({.random_input_len = 0}, 1, 300), Error);
  EXPECT_THROW(RandomPrompts({.random_output_len = 1, .random_range_ratio = 0.9}, 1, 300), Error);
}

TEST(ServerCostTest, IsOctavosOwn) {
  const std::string metrics =
      "# TYPE octavo:engine_steps_total counter\noctavo:engine_steps_total{model_name=\"a} 9\"} "
      "12\n"
      "octavo:engine_model_seconds_total{model_name=\"m\"} 1.5\n"
      "octavo:engine_loop_seconds_total{model_name=\"m\"} 0.25\n"
      "octavo:server_cpu_seconds_total{model_name=\"m\"} 2e-05\n";
  const auto cost = ReadServerCost(metrics);
  ASSERT_TRUE(cost);
  EXPECT_EQ(cost->steps, 12);
  EXPECT_EQ(cost->model_seconds, 1.5);
  EXPECT_EQ(cost->loop_seconds, 0.25);
  EXPECT_EQ(cost->cpu_seconds, 2e-5);
  EXPECT_FALSE(ReadServerCost("vllm:generation_tokens_total{model_name=\"m\"} 3\n"));
  EXPECT_FALSE(ReadServerCost(""));
}

ServeReport TwoOfThree() {
  return {.options = {.endpoint = "/v1/completions",
                      .num_prompts = 3,
                      .percentile_metrics = {"ttft", "tpot", "itl", "e2el"},
                      .metric_percentiles = {50, 99.9}},
          .model = "m",
          .duration = 4,
          .max_concurrent = 2,
          .requests = {{.input_len = 10,
                        .output_len = 3,
                        .start = 0.5,
                        .ttft = 0.25,
                        .latency = 0.75,
                        .itl = {0.3, 0.2},
                        .text = "abc"},
                       {.start = 1, .error = "HTTP 500: 'no'"},
                       {.input_len = 20,
                        .output_len = 1,
                        .start = 1,
                        .ttft = 0.75,
                        .latency = 0.75,
                        .text = "d"}},
          .cost = ServerCost{
              .steps = 10, .model_seconds = 2, .loop_seconds = 0.01, .cpu_seconds = 0.02}};
}

TEST(ServeReportTest, FiguresOfTheJson) {
  const Json json = Json::parse(ServeJson(TwoOfThree(), "20260102-030405", /*detailed=*/true));
  const std::map<std::string, Json> expected = {
      {"date", "20260102-030405"},
      {"backend", "openai"},
      {"num_prompts", 3},
      {"request_rate", "inf"},
      {"max_concurrency", nullptr},
      {"completed", 2},
      {"failed", 1},
      {"total_input_tokens", 30},
      {"total_output_tokens", 4},
      {"request_throughput", 0.5},
      {"request_goodput", nullptr},
      {"output_throughput", 1.0},
      {"total_token_throughput", 8.5},
      // In the second from 1 to 2 come two tokens of the first answer and one of the last.
      {"max_output_tokens_per_s", 3.0},
      {"max_concurrent_requests", 2},
      {"mean_ttft_ms", 500.0},
      {"median_ttft_ms", 500.0},
      {"std_ttft_ms", 250.0},
      {"mean_tpot_ms", 250.0},
      {"std_tpot_ms", 0.0},
      {"p50_itl_ms", 250.0},
      {"mean_e2el_ms", 750.0},
      {"octavo_steps", 10},
      {"octavo_overhead_ms_per_step", 3.0}};
  for (const auto& [key, value] : expected)
    EXPECT_EQ(json.value(key, Json("absent")), value) << key;
  EXPECT_NEAR(json["p99.9_ttft_ms"], 749.5, 1e-9);
  EXPECT_EQ(json["input_lens"], Json({10, 0, 20}));
  EXPECT_EQ(json["output_lens"], Json({3, 0, 1}));
  EXPECT_EQ(json["itls"], Json::parse("[[0.3, 0.2], [], []]"));
  EXPECT_EQ(json["generated_texts"], Json({"abc", "", "d"}));
  EXPECT_EQ(json["errors"], Json({"", "HTTP 500: 'no'", ""}));

  ServeReport report = TwoOfThree();
  report.cost.reset();
  report.options.percentile_metrics = {"ttft"};
  const Json brief = Json::parse(ServeJson(report, "", /*detailed=*/false));
  for (const char* key : {"mean_itl_ms", "errors", "octavo_steps"})
    EXPECT_FALSE(brief.contains(key)) << key;
}

// Of two answers in four seconds: one of three tokens (ttft 250, tpot 250), one of one (ttft 750).
TEST(ServeReportTest, GoodputCountsWhoKeepsEveryLimit) {
  for (const auto& [limits, goodput] :
       std::vector<std::pair<std::map<std::string, double>, double>>{
           {{{"ttft", 750}}, 0.5},
           {{{"ttft", 749}}, 0.25},
           {{{"tpot", 249}}, 0.25},  // a single token has none to exceed
           {{{"e2el", 750}, {"tpot", 250}}, 0.5},
           {{{"e2el", 750}, {"ttft", 249}}, 0}}) {
    ServeReport report = TwoOfThree();
    report.options.goodput = limits;
    EXPECT_EQ(Json::parse(ServeJson(report, "", false))["request_goodput"], goodput)
        << testing::PrintToString(limits);
    EXPECT_THAT(ServeTable(report), HasSubstr("Request goodput (req/s):"));
  }
}

TEST(ServeReportTest, TheTableSaysTheSame) {
  const std::string table = ServeTable(TwoOfThree());
  for (const auto& [label, value] : std::vector<std::pair<std::string, std::string>>{
           {"Successful requests:", "2"},
           {"Failed requests:", "1"},
           {"Output token throughput (tok/s):", "1.00"},
           {"Mean TTFT (ms):", "500.00"},
           {"P99.9 TTFT (ms):", "749.50"},
           {"Server overhead (ms):", "3.000"}}) {
    EXPECT_THAT(table, HasSubstr(label + std::string(41 - label.size(), ' ') + value)) << label;
  }
}

}  // namespace
}  // namespace octavo
