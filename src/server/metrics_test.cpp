#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace octavo {
namespace {

using testing::HasSubstr;

TEST(Metrics, HistogramsAreCumulative) {
  Histogram histogram({1, 2});
  for (double x : {0.5, 1.0, 1.5, 7.0}) histogram.Observe(x);
  EXPECT_EQ(histogram.Text("h", "Help.", "a=\"b\""),
            "# HELP h Help.\n# TYPE h histogram\nh_bucket{a=\"b\",le=\"1\"} 2\n"
            "h_bucket{a=\"b\",le=\"2\"} 3\nh_bucket{a=\"b\",le=\"+Inf\"} 4\nh_sum{a=\"b\"} 10\n"
            "h_count{a=\"b\"} 4\n");
}

TEST(Metrics, NamesOfVllmAndTheCachesHealth) {
  Metrics metrics("m", 150);
  metrics.Count({.reason = "stop",
                 .seconds = 0.5,
                 .queue_seconds = 0.125,
                 .prefill_seconds = 0.0625,
                 .decode_seconds = 0.25,
                 .prompt_tokens = 10,
                 .cached_tokens = 4,
                 .output_tokens = 3,
                 .max_tokens = 5});
  metrics.Count({.reason = "abort", .seconds = 1, .queue_seconds = 1});  // no token: it never ran
  metrics.CountPrompt(2, 7);
  metrics.SetCpuSeconds(0.125);
  EngineStats stats{.steps = 12345678,
                    .prompt_tokens = 90,
                    .cached_tokens = 10,
                    .running = 2,
                    .waiting = 3,
                    .cache_bytes = 100,
                    .cache_bytes_used = 25,
                    .cache_tokens = 640,
                    .model_seconds = 1234.56789,
                    .loop_seconds = 0.5};
  stats.step_tokens = 300;
  stats.steps_by_tokens[1] = 5;  // 2 to 8 tokens
  stats.steps_by_tokens.back() = 2;
  const std::vector<LayerCacheReport> layers = {{.k_format = "fp8_e4m3",
                                                 .v_format = "bf16",
                                                 .k_scale_source = "default \"1.0\"",
                                                 .v_scale_source = "none",
                                                 .k_saturated = 7,
                                                 .k_amax = 900}};
  const EngineOptions options{.kv_cache_dtype = "fp8", .kv_cache_dtype_skip_layers = {"0", "3"}};
  const std::string text = metrics.Text(options, stats, layers);
  for (const char* line :
       {"vllm:num_requests_running{model_name=\"m\",engine=\"0\"} 2\n",
        "vllm:kv_cache_usage_perc{model_name=\"m\",engine=\"0\"} 0.25\n",
        "vllm:prefix_cache_queries_total{model_name=\"m\",engine=\"0\"} 100\n",
        "vllm:iteration_tokens_total_bucket{model_name=\"m\",engine=\"0\",le=\"1\"} 0\n",
        "vllm:iteration_tokens_total_bucket{model_name=\"m\",engine=\"0\",le=\"16384\"} 5\n",
        "vllm:iteration_tokens_total_bucket{model_name=\"m\",engine=\"0\",le=\"+Inf\"} 7\n",
        "vllm:iteration_tokens_total_sum{model_name=\"m\",engine=\"0\"} 300\n",
        "octavo:engine_steps_total{model_name=\"m\",engine=\"0\"} 12345678\n",
        "octavo:engine_model_seconds_total{model_name=\"m\",engine=\"0\"} 1234.56789\n",
        "octavo:engine_loop_seconds_total{model_name=\"m\",engine=\"0\"} 0.5\n",
        "octavo:server_cpu_seconds_total{model_name=\"m\",engine=\"0\"} 0.125\n",
        "vllm:request_success_total{model_name=\"m\",engine=\"0\",finished_reason=\"stop\"} 1\n",
        "vllm:request_success_total{model_name=\"m\",engine=\"0\",finished_reason=\"abort\"} 1\n",
        "vllm:num_requests_waiting_by_reason{model_name=\"m\",engine=\"0\",reason=\"capacity\"} "
        "3\n",
        "vllm:prompt_tokens_by_source_total{model_name=\"m\",engine=\"0\",source=\"local_cache_"
        "hit\"} 10\n",
        "vllm:request_queue_time_seconds_sum{model_name=\"m\",engine=\"0\"} 1.125\n",
        "vllm:request_queue_time_seconds_bucket{model_name=\"m\",engine=\"0\",le=\"0.3\"} 1\n",
        "vllm:request_prefill_time_seconds_count{model_name=\"m\",engine=\"0\"} 1\n",
        "vllm:request_prefill_time_seconds_sum{model_name=\"m\",engine=\"0\"} 0.0625\n",
        "vllm:request_inference_time_seconds_sum{model_name=\"m\",engine=\"0\"} 0.3125\n",
        "vllm:request_inference_time_seconds_bucket{model_name=\"m\",engine=\"0\",le=\"7680\"} 1\n",
        "vllm:request_prefill_kv_computed_tokens_sum{model_name=\"m\",engine=\"0\"} 6\n",
        "vllm:request_prompt_tokens_bucket{model_name=\"m\",engine=\"0\",le=\"100\"} 2\n"
        "vllm:request_prompt_tokens_bucket{model_name=\"m\",engine=\"0\",le=\"+Inf\"} 2\n",
        "vllm:request_max_num_generation_tokens_sum{model_name=\"m\",engine=\"0\"} 7\n",
        "vllm:inter_token_latency_seconds_bucket{model_name=\"m\",engine=\"0\",le=\"80\"} 0\n",
        "vllm:cache_config_info{block_size=\"64\",cache_dtype=\"fp8\",enable_prefix_caching="
        "\"True\","
        "gpu_memory_utilization=\"0.9\",kv_cache_dtype_skip_layers=\"0,3\","
        "kv_cache_memory_bytes=\"100\",kv_cache_size_tokens=\"640\",num_gpu_blocks=\"10\","
        "engine=\"0\"} 1\n",
        "vllm:prompt_tokens_total{model_name=\"m\",engine=\"0\"} 100\n",
        "vllm:prompt_tokens_cached_total{model_name=\"m\",engine=\"0\"} 10\n",
        "vllm:e2e_request_latency_seconds_bucket{model_name=\"m\",engine=\"0\",le=\"0.5\"} 1\n",
        "vllm:request_decode_time_seconds_sum{model_name=\"m\",engine=\"0\"} 0.25\n",
        "vllm:request_time_per_output_token_seconds_sum{model_name=\"m\",engine=\"0\"} 0.125\n",
        "vllm:request_params_max_tokens_sum{model_name=\"m\",engine=\"0\"} 5\n",
        "vllm:request_params_n_sum{model_name=\"m\",engine=\"0\"} 2\n",
        "octavo:kv_cache_saturated_elements_total{model_name=\"m\",engine=\"0\",layer=\"0\","
        "operand=\"k\","
        "kv_cache_dtype=\"fp8_e4m3\"} 7\n",
        "kv_cache_dtype=\"fp8_e4m3\"} 448\n",
        "source=\"default \\\"1.0\\\"\"} 1\n"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(Metrics, SaturationIsWarnedOfOncePerOperand) {
  std::vector<LayerCacheReport> seen;
  std::vector<LayerCacheReport> now(2, {.k_format = "fp8_e4m3", .v_format = "fp8_e4m3"});
  EXPECT_TRUE(SaturationWarnings(seen, now).empty());
  now[1].v_saturated = 3;
  now[1].v_amax = 600;
  const std::vector<std::string> lines = SaturationWarnings(seen, now);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_THAT(lines[0], HasSubstr("layer 1: V saturates in fp8_e4m3: magnitudes up to 600"));
  now[1].v_saturated = 9;
  EXPECT_TRUE(SaturationWarnings(seen, now).empty());
}

}  // namespace
}  // namespace octavo
