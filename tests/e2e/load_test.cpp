// `octavo serve` under load: what many clients get at once is what each gets alone.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "server.h"
#include "server/completion_stream.h"
#include "server/http_client.h"

namespace octavo {
namespace {

// A sanitizer takes ten times as long, and looks at how threads meet, for which these are enough.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kStreams = 100;
#else
constexpr int kStreams = 256;
#endif

Json Ask(int i) {
  return {{"prompt", "The code of amber bell is " + std::to_string(123456 + 3137 * i) + ".\n" +
                         std::string(i % 150, static_cast<char>('a' + i % 26)) +
                         "\nQuestion: what is the code of amber bell?\nAnswer: "},
          {"max_tokens", 8 + i % 29},
          {"temperature", 0},
          {"ignore_eos", true}};
}

// With so little memory that sequences have to leave, too.
TEST(LoadTest, EachStreamEqualsItsSingleAnswer) {
  for (const std::vector<std::string>& flags :
       {std::vector<std::string>{"--max-num-seqs", "256", "--no-enable-prefix-caching"},
        {"--max-num-seqs", "100", "--kv-cache-dtype", "fp8", "--max-model-len", "512",
         "--kv-cache-memory-bytes", "1MiB"}}) {
    Server server(flags);
    HttpClient client({.base_url = "http://127.0.0.1:" + std::to_string(server.port())});
    std::vector<std::string> alone(kStreams);
    for (int i = 0; i < kStreams; ++i) {
      client.Send("/v1/completions", Ask(i).dump(), [&, i](const HttpReply& reply) {
        ASSERT_EQ(reply.status, 200) << reply.body << reply.error;
        alone[i] = Json::parse(reply.body)["choices"][0]["text"];
      });
      client.Run();
      ASSERT_FALSE(alone[i].empty()) << i;
    }

    std::vector<CompletionStream> streams(kStreams);
    int ends = 0;
    for (int i = 0; i < kStreams; ++i) {
      Json body = Ask(i);
      body["stream"] = true;
      body["stream_options"] = {{"include_usage", true}};
      client.Send(
          "/v1/completions", body.dump(),
          [&, i](const HttpReply& reply) {
            EXPECT_EQ(reply.status, 200) << i << reply.body;
            EXPECT_EQ(reply.error, "") << i;
            ++ends;
          },
          [&, i](std::string_view bytes) { streams[i].Push(bytes, 0); });
    }
    client.Run();
    EXPECT_EQ(ends, kStreams);
    for (int i = 0; i < kStreams; ++i) {
      EXPECT_TRUE(streams[i].done()) << i;
      EXPECT_EQ(streams[i].text(), alone[i]) << i;
      EXPECT_EQ(streams[i].completion_tokens(), 8 + i % 29) << i;
    }
    const std::string metrics = Exchange(server.port(), Get("/metrics")).body;
    EXPECT_EQ(metrics.find("vllm:num_preemptions_total{model_name=\"needle\",engine=\"0\"} 0\n") ==
                  metrics.npos,
              flags.size() > 3)
        << metrics;
  }
}

}  // namespace
}  // namespace octavo
