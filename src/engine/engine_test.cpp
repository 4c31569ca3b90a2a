#include "octavo/engine.h"

#include <gtest/gtest.h>

#include <stdlib.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

#include "base/error.h"
#include "engine/testing.h"
#include "io/checkpoint.h"
#include "io/testing.h"

namespace octavo {
namespace {

std::vector<Request> MixedRequests() {
  std::vector<Request> requests;
  for (int i = 0; i < 12; ++i) {
    SamplingParams p{.max_tokens = 20 + 5 * i, .ignore_eos = true};
    if (i % 3 == 0) p.temperature = 0;
    if (i % 3 == 1) p.top_k = 20, p.top_p = 0.9f, p.repetition_penalty = 1.2f;
    if (i % 3 == 2) p.min_p = 0.05f;
    p.seed = 100 + i;
    requests.push_back({RandomPrompt(1 + 23 * i, i), p});
  }
  return requests;
}

std::vector<std::vector<int32_t>> RunAll(const EngineOptions& options, bool together) {
  auto engine = Engine::Create(options);
  Client client(*engine);
  std::vector<RequestId> ids;
  for (Request& request : MixedRequests()) {
    ids.push_back(client.Submit(std::move(request)));
    if (!together) client.Wait();
  }
  std::vector<std::vector<int32_t>> out;
  for (RequestId id : ids) {
    const Result result = client.Get(id);
    EXPECT_EQ(result.reason, FinishReason::kLength) << result.error;
    out.push_back(result.tokens);
  }
  return out;
}

// The first request's first token submits the others, which run in the same steps from then on.
// Ids beyond the embedding are found before the first request; control tokens may have such.
TEST(EngineTest, TheTokenizerMustFitTheModel) {
  const TempFolder folder;
  const auto write = [&](int id) {
    const Json file = {
        {"model", {{"vocab", {{"a", 0}, {"b", id}}}, {"merges", Json::array()}}},
        {"added_tokens", {{{"id", 300}, {"content", "<image>"}, {"special", true}}}}};
    folder.Write("tokenizer.json", file.dump());
  };
  EngineOptions options = Options();
  options.tokenizer = folder.path().string();
  write(256);
  EXPECT_EQ(ErrorMessage([&] { Engine::Create(options); }),
            (folder.path() / "tokenizer.json").string() +
                ": model.vocab: expected token ids below the model's vocab_size 256, found 256");
  write(255);
  const auto engine = Engine::Create(options);
  EXPECT_EQ(engine->Encode("b<image>"), (std::vector<int32_t>{255, 300}));
  EXPECT_THROW(engine->Submit({.prompt = {300}, .sampling = {}}, [](const Event&) {}), Error);
}

TEST(EngineTest, AfterCallbacksFollowsEveryStepsEvents) {
  auto engine = Engine::Create(Options());
  std::vector<RequestId> pending;  // both on the loop
  std::vector<std::vector<RequestId>> steps;
  engine->AfterCallbacks([&] {
    if (!pending.empty()) steps.push_back(std::exchange(pending, {}));
  });
  const auto request = [](int tokens) {
    return Request{RandomPrompt(5, 1), {.max_tokens = tokens, .ignore_eos = true}};
  };
  const auto note = [&](const Event& event) { pending.push_back(event.request); };
  engine->Submit(request(8), [&](const Event& event) {
    note(event);
    if (event.position == 5) {
      for (int i = 0; i < 2; ++i) engine->Submit(request(4), note);
    }
  });
  while (engine->stats().generated_tokens < 16) std::this_thread::yield();
  engine.reset();
  EXPECT_TRUE(pending.empty());
  const std::vector<std::vector<RequestId>> expected = {
      {1}, {1, 2, 3}, {1, 2, 3}, {1, 2, 3}, {1, 2, 2, 3, 3}, {1}, {1}, {1, 1}};
  EXPECT_EQ(steps, expected);
}

// One sequence at a time: the second waits for all of the first.
TEST(EngineTest, SaysWhereARequestsTimeWent) {
  EngineOptions options = Options();
  options.max_num_seqs = 1;
  auto engine = Engine::Create(options);
  std::vector<Event> finals;  // the loop's, in order
  {
    Client client(*engine);
    const auto submit = [&](int tokens) {
      client.Submit({RandomPrompt(100, 1), {.max_tokens = tokens, .ignore_eos = true}},
                    [&](const Event& event) {
                      if (event.kind == Event::Kind::kFinished) finals.push_back(event);
                    });
    };
    for (const int tokens : {20, 1, 0}) submit(tokens);
  }
  ASSERT_EQ(finals.size(), 3u);
  const auto busy = [](const Event& event) { return event.prefill_seconds + event.decode_seconds; };
  for (const Event& event : finals) EXPECT_GE(event.queue_seconds, 0);
  EXPECT_GT(finals[0].prefill_seconds, 0);
  EXPECT_GT(finals[0].decode_seconds, 0);
  EXPECT_GT(finals[1].prefill_seconds, 0);
  EXPECT_EQ(finals[1].decode_seconds, 0);  // one token
  EXPECT_EQ(busy(finals[2]), 0);           // none
  EXPECT_GT(finals[2].queue_seconds, busy(finals[1]));
}

class EngineFamilies : public ::testing::TestWithParam<const char*> {};

// Same seed, same text: whatever runs beside it, in chunks of any size, with little memory, with
// and without shared prefixes.
TEST_P(EngineFamilies, SameTextWhateverRunsBeside) {
  for (const char* format : {"bf16", "fp8", "int8_per_token_head"}) {
    EngineOptions options = Options(GetParam());
    options.kv_cache_dtype = format;
    const auto alone = RunAll(options, false);
    EXPECT_EQ(RunAll(options, true), alone) << format;
    options.max_num_batched_tokens = 7;
    options.threads = 1;
    EXPECT_EQ(RunAll(options, true), alone) << format;
    options.enable_prefix_caching = false;
    EXPECT_EQ(RunAll(options, true), alone) << format;
  }
}

INSTANTIATE_TEST_SUITE_P(Families, EngineFamilies,
                         ::testing::Values("llama", "gemma3_text", "gpt_oss", "mistral"),
                         [](const auto& family) { return std::string(family.param); });

TEST(EngineTest, PreemptionDoesNotChangeText) {
  EngineOptions options = Options();
  const auto plenty = RunAll(options, true);
  auto engine = Engine::Create(options);
  // Room for one sequence of the greatest length and little more.
  options.kv_cache_memory_bytes = static_cast<int64_t>(engine->cache_bytes_per_token() * 640);
  engine = Engine::Create(options);
  Client client(*engine);
  std::vector<RequestId> ids;
  for (Request& request : MixedRequests()) ids.push_back(client.Submit(std::move(request)));
  for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(client.Get(ids[i]).tokens, plenty[i]) << i;
  EXPECT_GT(engine->stats().preemptions, 0);
}

TEST(EngineTest, PromptLogprobsAgreeWithGeneration) {
  auto engine = Engine::Create(Options());
  Client client(*engine);
  const std::vector<int32_t> prompt = RandomPrompt(100, 5);
  const Result generated =
      client.Get(client.Submit({prompt, {.max_tokens = 30, .temperature = 0, .ignore_eos = true}}));
  std::vector<int32_t> whole = prompt;
  whole.insert(whole.end(), generated.tokens.begin(), generated.tokens.end());
  const Result scored =
      client.Get(client.Submit({whole, {.max_tokens = 0, .prompt_logprobs_from = 100}}));
  EXPECT_EQ(scored.prompt_logprobs, generated.logprobs);
  EXPECT_TRUE(scored.tokens.empty());
  EXPECT_EQ(scored.cached, 64);
}

TEST(EngineTest, ItsSeedIsThatOfRequestsWithoutOne) {
  const auto texts = [](std::optional<uint64_t> seed) {
    EngineOptions options = Options();
    options.seed = seed;
    auto engine = Engine::Create(options);
    Client client(*engine);
    std::vector<std::vector<int32_t>> out;
    for (int i = 0; i < 2; ++i) {
      out.push_back(
          client.Get(client.Submit({{1, 2, 3}, {.max_tokens = 20, .ignore_eos = true}})).tokens);
    }
    return out;
  };
  const auto seven = texts(7);
  EXPECT_EQ(texts(7), seven);
  EXPECT_NE(texts(8), seven);
  EXPECT_NE(texts(std::nullopt), seven);
  EXPECT_NE(seven[0], seven[1]);
}

TEST(EngineTest, PrefixHitsAreCounted) {
  auto engine = Engine::Create(Options());
  Client client(*engine);
  const std::vector<int32_t> prompt = RandomPrompt(200, 6);
  EXPECT_EQ(client.Get(client.Submit({prompt, {.max_tokens = 4, .temperature = 0}})).cached, 0);
  EXPECT_EQ(client.Get(client.Submit({prompt, {.max_tokens = 4, .temperature = 0}})).cached, 192);
}

TEST(EngineTest, CancelEndsOnceAndGivesPagesBack) {
  auto engine = Engine::Create(Options());
  Client client(*engine);
  std::atomic<int> tokens = 0;
  RequestId id = 0;
  std::mutex id_mutex;
  {
    std::lock_guard lock(id_mutex);
    id = client.Submit({RandomPrompt(10, 7), {.max_tokens = 400, .ignore_eos = true}},
                       [&](const Event& event) {
                         if (event.kind != Event::Kind::kToken || ++tokens != 3) return;
                         std::lock_guard wait_for_id(id_mutex);
                         EXPECT_TRUE(engine->Cancel(id));
                       });
  }
  const Result result = client.Get(id);
  EXPECT_EQ(result.reason, FinishReason::kCancelled);
  EXPECT_EQ(result.finals, 1);
  EXPECT_LT(result.tokens.size(), 10u);
  EXPECT_FALSE(engine->Cancel(id));
  EXPECT_FALSE(engine->Cancel(12345));
  EXPECT_EQ(client.Get(client.Submit({RandomPrompt(10, 8), {.max_tokens = 1}})).finals, 1);
  EXPECT_EQ(engine->stats().cache_bytes_used, 0);
}

TEST(EngineTest, DestructorCancelsWhatIsLeft) {
  auto engine = Engine::Create(Options());
  Client client(*engine);
  const RequestId id =
      client.Submit({RandomPrompt(10, 9), {.max_tokens = 500, .ignore_eos = true}});
  engine.reset();
  EXPECT_EQ(client.Get(id).finals, 1);
}

// A model whose final norm is NaN: its logits are, and the request must fail by name, once, and not
// the engine.
TEST(EngineTest, LogitsThatAreNotFiniteFailTheRequest) {
  namespace fs = std::filesystem;
  std::string pattern = (fs::temp_directory_path() / "octavo-engine-XXXXXX").string();
  const fs::path folder = mkdtemp(pattern.data());
  fs::copy(Model("llama"), folder);
  int64_t offset = 0;
  {
    const Checkpoint checkpoint = Checkpoint::Open(folder);
    const char* first = nullptr;  // of the data section, which starts with the lowest tensor
    for (const auto& [name, tensor] : checkpoint.tensors()) {
      const char* data = static_cast<const char*>(tensor.data);
      if (!first || data < first) first = data;
    }
    std::ifstream file(folder / "model.safetensors", std::ios::binary);
    uint64_t header = 0;
    file.read(reinterpret_cast<char*>(&header), sizeof(header));
    offset = static_cast<int64_t>(sizeof(header) + header) +
             (static_cast<const char*>(checkpoint.Find("model.norm.weight")->data) - first);
  }
  fs::permissions(folder / "model.safetensors", fs::perms::owner_all);
  std::fstream file(folder / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(offset);
  file.write("\xc0\x7f", 2);
  file.close();

  EngineOptions options = Options();
  options.model = folder.string();
  auto engine = Engine::Create(options);
  Client client(*engine);
  const RequestId bad = client.Submit(
      {RandomPrompt(100, 1), {.max_tokens = 3, .temperature = 0, .prompt_logprobs_from = 1}});
  const Result result = client.Get(bad);
  EXPECT_EQ(result.reason, FinishReason::kError);
  EXPECT_EQ(result.finals, 1);
  EXPECT_NE(result.error.find("not finite"), std::string::npos) << result.error;
  EXPECT_EQ(client.Get(client.Submit({RandomPrompt(5, 2), {.max_tokens = 1}})).finals, 1);
  EXPECT_EQ(engine->stats().cache_bytes_used, 0);
  fs::remove_all(folder);
}

TEST(EngineTest, StatsCountARequestBeforeItsLastEvent) {
  auto engine = Engine::Create(Options());
  EXPECT_EQ(engine->CacheReport().size(), 4u);
  Client client(*engine);
  std::atomic<int64_t> prompt_tokens = 0, generated_tokens = 0;
  client.Submit({RandomPrompt(100, 1), {.max_tokens = 5, .temperature = 0, .ignore_eos = true}},
                [&](const Event& event) {
                  if (event.kind != Event::Kind::kFinished) return;
                  prompt_tokens = engine->stats().prompt_tokens;
                  generated_tokens = engine->stats().generated_tokens;
                });
  client.Wait();
  EXPECT_EQ(prompt_tokens, 100);
  EXPECT_EQ(generated_tokens, 5);
  const EngineStats stats = engine->stats();
  EXPECT_GE(stats.steps, 5);
  EXPECT_EQ(std::accumulate(stats.steps_by_tokens.begin(), stats.steps_by_tokens.end(), int64_t{0}),
            stats.steps);
  // The last token of a sequence is in no step.
  EXPECT_EQ(stats.step_tokens, stats.prompt_tokens + stats.generated_tokens - 1);
  EXPECT_GT(engine->stats().model_seconds, 0);
  EXPECT_GT(engine->stats().loop_seconds, 0);
}

TEST(EngineTest, BiasesAndPenaltiesShapeTheText) {
  auto engine = Engine::Create(Options());
  const auto text = [&](SamplingParams p) {
    Client client(*engine);
    p.temperature = 0;
    p.max_tokens = 20;
    return client.Get(client.Submit({RandomPrompt(30, 9), p}));
  };
  const auto count = [](const Result& r, int32_t id) {
    return std::count(r.tokens.begin(), r.tokens.end(), id);
  };
  const int32_t first = text({.ignore_eos = true}).tokens[0];
  EXPECT_EQ(count(text({.ignore_eos = true, .logit_bias = {{first, -100}}}), first), 0);
  EXPECT_EQ(count(text({.ignore_eos = true, .logit_bias = {{5, 100}}}), 5), 20);

  // Two tokens far above all others take turns only if what occurred counts against them.
  const std::map<int32_t, float> two = {{5, 90}, {9, 90}};
  const Result plain = text({.ignore_eos = true, .logit_bias = two});
  EXPECT_EQ(count(plain, 5) + count(plain, 9), 20);
  const Result turns = text({.ignore_eos = true, .frequency_penalty = 2, .logit_bias = two});
  EXPECT_EQ(count(turns, 5) + count(turns, 9), 20);
  EXPECT_GE(std::min(count(turns, 5), count(turns, 9)), 5);
  // presence_penalty counts once: against one token 2, against the other 2 as soon as it occurs.
  const int32_t winner = plain.tokens[0], other = winner == 5 ? 9 : 5;
  const Result once =
      text({.ignore_eos = true, .presence_penalty = 2, .logit_bias = {{winner, 90}, {other, 20}}});
  EXPECT_EQ(count(once, winner), 20);

  const SamplingParams stop{.stop_token_ids = {first}};
  EXPECT_EQ(text(stop).tokens.size(), 1u);
  SamplingParams late = stop;
  late.min_tokens = 6;
  const Result result = text(late);
  ASSERT_GE(result.tokens.size(), 6u);
  EXPECT_EQ(std::count(result.tokens.begin(), result.tokens.begin() + 6, first), 0);
}

TEST(EngineTest, RefusesWhatItCannotRun) {
  auto engine = Engine::Create(Options());
  const auto refused = [&](Request request, const std::string& field) {
    try {
      engine->Submit(std::move(request),
                     [](const Event&) { FAIL() << "an event for a refused request"; });
      FAIL() << field << ": accepted";
    } catch (const Error& error) {
      EXPECT_NE(error.message().find(field), std::string::npos) << error.message();
    }
  };
  refused({{}, {}}, "prompt");
  refused({{256}, {}}, "prompt");
  refused({{-1}, {}}, "prompt");
  refused({RandomPrompt(512, 1), {}}, "max_model_len");
  refused({{1}, {.max_tokens = -1}}, "max_tokens");
  refused({{1}, {.temperature = -1}}, "temperature");
  refused({{1}, {.temperature = NAN}}, "temperature");
  refused({{1}, {.top_k = -2}}, "top_k");
  refused({{1}, {.top_p = 0}}, "top_p");
  refused({{1}, {.top_p = 1.5f}}, "top_p");
  refused({{1}, {.min_p = -0.1f}}, "min_p");
  refused({{1}, {.repetition_penalty = 0}}, "repetition_penalty");
  refused({{1}, {.presence_penalty = 2.5f}}, "presence_penalty");
  refused({{1}, {.frequency_penalty = NAN}}, "frequency_penalty");
  refused({{1}, {.logit_bias = {{256, 1}}}}, "logit_bias");
  refused({{1}, {.logit_bias = {{1, 101}}}}, "logit_bias");
  refused({{1}, {.stop_token_ids = {1, 256}}}, "stop_token_ids");
  refused({{1}, {.max_tokens = 4, .min_tokens = 5}}, "min_tokens");
  refused({{1}, {.prompt_logprobs_from = 0}}, "prompt_logprobs_from");
  refused({{1}, {.top_logprobs = -1}}, "top_logprobs");
  refused({{1}, {.top_prompt_logprobs = -1}}, "top_prompt_logprobs");
}

TEST(EngineTest, RefusesOptionsByName) {
  const auto refused = [](auto change, const std::string& flag) {
    EngineOptions options = Options();
    change(options);
    try {
      Engine::Create(options);
      FAIL() << flag << ": accepted";
    } catch (const Error& error) {
      EXPECT_NE(error.message().find(flag), std::string::npos) << error.message();
    }
  };
  refused([](EngineOptions& o) { o.dtype = "float8"; }, "--dtype");
  refused([](EngineOptions& o) { o.max_num_seqs = 0; }, "--max-num-seqs");
  refused([](EngineOptions& o) { o.max_num_batched_tokens = 0; }, "--max-num-batched-tokens");
  refused([](EngineOptions& o) { o.max_model_len = 1 << 20; }, "--max-model-len");
  refused([](EngineOptions& o) { o.kv_cache_memory_bytes = 1 << 16; }, "--kv-cache-memory-bytes");
  refused([](EngineOptions& o) { o.kv_cache_dtype = "fp7"; }, "fp7");
  refused([](EngineOptions& o) { o.kv_cache_dtype_skip_layers = {"9"}; }, "9");
  refused([](EngineOptions& o) { o.model = "/nonexistent"; }, "/nonexistent");
}

}  // namespace
}  // namespace octavo
