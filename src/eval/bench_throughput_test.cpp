#include "eval/bench_throughput.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "io/json.h"
#include "models/config.h"
#include "text/tokenizer.h"

namespace octavo {
namespace {

const std::string kModel = std::string(OCTAVO_SOURCE_DIR) + "/checkpoints/needle";

ThroughputBenchOptions Options() {
  ThroughputBenchOptions options;
  options.engine.model = kModel;
  options.engine.device = "cpu";
  options.engine.threads = 2;
  options.input_len = 100;
  options.output_len = 12;
  options.num_prompts = 20;
  options.random_range_ratio = 0.5;
  return options;
}

std::vector<Request> Requests(const ThroughputBenchOptions& options) {
  return ThroughputRequests(options, ReadModelSpec(kModel));
}

std::string ErrorOf(const ThroughputBenchOptions& options) {
  try {
    Requests(options);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "none";
}

TEST(BenchThroughput, RandomLengthsFillTheirRange) {
  ThroughputBenchOptions options = Options();
  options.num_prompts = 2000;
  const std::vector<Request> requests = Requests(options);
  ASSERT_EQ(requests.size(), 2000);
  std::vector<int64_t> inputs, outputs;
  for (const Request& r : requests) {
    inputs.push_back(std::ssize(r.prompt));
    outputs.push_back(r.sampling.max_tokens);
    EXPECT_TRUE(r.sampling.ignore_eos);
  }
  const auto range = [](const std::vector<int64_t>& lengths) {
    const auto [least, most] = std::minmax_element(lengths.begin(), lengths.end());
    return std::pair(*least, *most);
  };
  EXPECT_EQ(range(inputs), std::pair(int64_t{50}, int64_t{150}));
  EXPECT_EQ(range(outputs), std::pair(int64_t{6}, int64_t{18}));

  EXPECT_EQ(Requests(options)[7].prompt, requests[7].prompt);
  options.seed = 2;
  EXPECT_NE(Requests(options)[7].prompt, requests[7].prompt);
}

TEST(BenchThroughput, DefaultNumberOfRandomPrompts) {
  ThroughputBenchOptions options = Options();
  options.num_prompts = 0;
  options.random_range_ratio = 0;
  const std::vector<Request> requests = Requests(options);
  ASSERT_EQ(requests.size(), 64);
  for (const Request& r : requests) {
    EXPECT_EQ(r.prompt.size(), 100);
    EXPECT_EQ(r.sampling.max_tokens, 12);
  }
}

TEST(BenchThroughput, EveryRequestGetsItsTokensAlsoWhenTheCacheIsTooSmallForAll) {
  ThroughputBenchOptions options = Options();
  options.variants = {"bf16", "fp8", "fp8/first:2"};
  // Holds one request of 150 + 18 tokens in bfloat16 and not twenty.
  options.engine.kv_cache_memory_bytes = 1 << 20;
  options.engine.max_num_batched_tokens = 64;
  int64_t prompt_tokens = 0, output_tokens = 0, longest = 0;
  for (const Request& r : Requests(options)) {
    prompt_tokens += std::ssize(r.prompt);
    output_tokens += r.sampling.max_tokens;
    longest = std::max(longest, std::ssize(r.prompt) + r.sampling.max_tokens);
  }
  std::vector<int> progress;
  const ThroughputReport report = BenchThroughput(options, [&](int done, int all) {
    EXPECT_EQ(all, 60);
    progress.push_back(done);
  });
  EXPECT_TRUE(std::is_sorted(progress.begin(), progress.end()));
  EXPECT_EQ(progress.back(), 60);
  ASSERT_EQ(report.variants.size(), 3);
  for (size_t i = 0; i < 3; ++i) {
    const ThroughputVariant& v = report.variants[i];
    EXPECT_EQ(v.name, options.variants[i]);
    EXPECT_EQ(v.requests, 20);
    EXPECT_EQ(v.prompt_tokens, prompt_tokens);
    EXPECT_EQ(v.output_tokens, output_tokens);
    EXPECT_GT(v.seconds, 0);
    EXPECT_GT(v.peak_running, 1);
    EXPECT_LT(v.peak_running, 20);
    EXPECT_LE(v.cache_bytes, 1 << 20);
  }
  EXPECT_GT(report.variants[0].preemptions, 0);
  // 8 and 16 pages, of which the longest request needs three.
  EXPECT_EQ(report.variants[0].cache_tokens, 8 * longest / 3);
  EXPECT_EQ(report.variants[1].cache_tokens, 16 * longest / 3);
  EXPECT_GT(report.variants[1].peak_running, report.variants[0].peak_running);

  const Json json = ParseJson(ThroughputJson(report), "report");
  for (const Json& v : json["variants"]) {
    EXPECT_EQ(v["num_requests"], 20);
    EXPECT_EQ(v["total_num_tokens"], prompt_tokens + output_tokens);
    const double seconds = v["elapsed_time"];
    EXPECT_NEAR(v["requests_per_second"].get<double>() * seconds, 20, 1e-6);
    EXPECT_NEAR(v["tokens_per_second"].get<double>() * seconds,
                static_cast<double>(prompt_tokens + output_tokens), 1e-6);
    EXPECT_NEAR(v["output_tokens_per_second"].get<double>() * seconds,
                static_cast<double>(output_tokens), 1e-6);
  }
}

TEST(BenchThroughput, EveryVariantGetsAsManyBytesAsTheFirst) {
  ThroughputBenchOptions options = Options();
  options.num_prompts = 2;
  options.engine.max_num_seqs = 2;
  const ThroughputReport report = BenchThroughput(options);
  EXPECT_EQ(report.variants[0].cache_bytes, report.variants[1].cache_bytes);
  EXPECT_EQ(report.variants[0].peak_running, 2);
  EXPECT_EQ(report.variants[0].preemptions, 0);
}

TEST(BenchThroughput, PromptsFromAFile) {
  const std::filesystem::path folder =
      std::filesystem::path(testing::TempDir()) / "bench_throughput_test";
  std::filesystem::create_directories(folder);
  const auto write = [&](const char* name, const std::string& text) {
    std::ofstream(folder / name, std::ios::binary) << text;
    return (folder / name).string();
  };
  const Tokenizer tokenizer = Tokenizer::FromFolder(kModel);
  ThroughputBenchOptions options = Options();
  options.num_prompts = 0;
  options.dataset = write("text", "{\"prompt\": 1}\r\n\nsecond");
  std::vector<Request> requests = Requests(options);
  ASSERT_EQ(requests.size(), 2);
  EXPECT_EQ(requests[0].prompt, tokenizer.Encode("{\"prompt\": 1}"));
  EXPECT_EQ(requests[1].prompt, tokenizer.Encode("second"));
  EXPECT_EQ(requests[1].sampling.max_tokens, 12);

  options.dataset = write("lines.jsonl", "{\"prompt\": \"one\\ntwo\", \"x\": 1}\n{\"prompt\": 2}");
  EXPECT_EQ(ErrorOf(options),
            options.dataset + ":2: expected an object with a string \"prompt\", found 2");
  options.num_prompts = 1;  // the second is not read
  requests = Requests(options);
  ASSERT_EQ(requests.size(), 1);
  EXPECT_EQ(requests[0].prompt, tokenizer.Encode("one\ntwo"));

  options.dataset = write("empty", "\n");
  EXPECT_NE(ErrorOf(options).find("expected 1 prompts (--num-prompts), found 0"),
            std::string::npos);
  options.dataset = write("long", std::string(200'000, 'a'));
  EXPECT_NE(ErrorOf(options).find("max_position_embeddings, 135168"), std::string::npos);
  std::filesystem::remove_all(folder);
}

TEST(BenchThroughput, RefusesWhatCannotRun) {
  ThroughputBenchOptions options = Options();
  options.output_len = 0;
  EXPECT_NE(ErrorOf(options).find("--output-len"), std::string::npos);
  options = Options();
  options.input_len = int64_t{1} << 62;
  EXPECT_NE(ErrorOf(options).find("--input-len"), std::string::npos);
  options = Options();
  options.random_range_ratio = 1;
  EXPECT_NE(ErrorOf(options).find("--random-range-ratio"), std::string::npos);
  options = Options();
  options.variants = {"bf16", "fp9"};
  int requests = 0;
  EXPECT_THROW(BenchThroughput(options, [&](int, int) { ++requests; }), std::exception);
  EXPECT_EQ(requests, 0) << "the first variant ran before the second was looked at";
}

}  // namespace
}  // namespace octavo
