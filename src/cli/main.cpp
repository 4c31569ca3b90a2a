// The command line: every flag of every subcommand, and the seam where the user's errors become one
// line and exit code 2.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/progress.h"

namespace octavo::cli {
namespace {

// A number with a unit behind it; CLI11 takes digits beyond its type for the largest there is.
CLI::Validator Whole(const CLI::Validator& unit) {
  const auto check = [unit](std::string& text) -> std::string {
    const size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
    return digits > 18 ? "expected at most 18 digits, found " + text : unit(text);
  };
  return CLI::Validator(check, unit.get_description());
}
// "32k" or "32768".
CLI::Validator Tokens() {
  return Whole(CLI::AsNumberWithUnit(std::map<std::string, int64_t>{{"k", 1024}, {"m", 1 << 20}}));
}
CLI::Validator Bytes() { return Whole(CLI::AsSizeValue(/*kb_is_1000=*/false)); }

// The number that all of `text` is, within T's range.
template <class T>
std::optional<T> Parse(std::string_view text) {
  T x{};
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, x);
  return error == std::errc() && rest == end ? std::optional(x) : std::nullopt;
}

CLI::Validator Seed() {
  const auto check = [](const std::string& text) -> std::string {
    return Parse<uint64_t>(text) ? "" : "expected 0 to 2^64 - 1, found " + text;
  };
  return CLI::Validator(check, "");
}

CLI::Validator Positive() {
  const auto check = [](const std::string& text) -> std::string {
    const double x = Parse<double>(text).value_or(0);
    return x > 0 && std::isfinite(x) ? "" : "expected a number above 0, found " + text;
  };
  return CLI::Validator(check, "");
}

// The shipped model, wherever the program was started from or installed.
std::string ShippedModel() {
  std::error_code ignored;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", ignored);
  for (std::filesystem::path p = self.parent_path(); !p.empty(); p = p.parent_path()) {
    for (const char* relative : {"checkpoints/needle", "share/octavo/checkpoints/needle"}) {
      if (std::filesystem::exists(p / relative / "config.json", ignored))
        return (p / relative).string();
    }
    if (p == p.root_path()) break;
  }
  return "checkpoints/needle";
}

void AddCacheFlags(CLI::App* app, EngineOptions& o) {
  const std::string group = "KV cache";
  app->add_option("--kv-cache-dtype-skip-layers", o.kv_cache_dtype_skip_layers,
                  "layers kept in the model's 16-bit type: sliding_window, full_attention, 3, 0-3, "
                  "first:2, last:2; "
                  "several, separated by commas")
      ->delimiter(',')
      ->group(group);
  app->add_option("--kv-cache-scales", o.kv_cache_scales,
                  "side-car file of calibrated scales (JSON)")
      ->group(group);
  app->add_option("--kv-cache-memory-bytes", o.kv_cache_memory_bytes,
                  "memory of the cache, e.g. 4GiB; default: what is needed, at most 4 GiB and half "
                  "of the machine's")
      ->transform(Bytes())
      ->group(group);
}

void AddEngineFlags(CLI::App* app, EngineOptions& o, bool one_format = true) {
  o.model = ShippedModel();
  o.load_progress = LoadProgressBar();
  app->add_option(
      "model", o.model,
      "a Hugging Face folder (config.json, safetensors); default: the shipped needle model");
  app->add_option("--load-format", o.load_format,
                  "auto (= safetensors), or dummy: noise for weights, which needs config.json only")
      ->capture_default_str();
  app->add_option("--dtype", o.dtype, "arithmetic: bfloat16 (= auto) or float32")
      ->transform(CLI::Transformer(std::map<std::string, std::string>{{"auto", "bfloat16"}})
                      .description(""))
      ->capture_default_str();
  app->add_option("--device", o.device, "cpu, cuda, or auto: a GPU where there is one")
      ->capture_default_str();
  app->add_option("--threads", o.threads, "CPU threads; 0: all")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app->add_option("--gpu-memory-utilization", o.gpu_memory_utilization,
                  "share of a GPU's memory for weights, activations and cache")
      ->capture_default_str();
  app->add_option("--attention-math", o.attention_math,
                  "prefill on a GPU over fp8_e4m3 pages: fp8 (two-level accumulation; auto), "
                  "fp8_tensor_core (for those who want to see it fail) or 16bit")
      ->capture_default_str();
  app->add_flag("--enforce-eager", o.enforce_eager, "on a GPU: no recorded graphs");
  app->add_option("--max-num-batched-tokens", o.max_num_batched_tokens,
                  "tokens in one step; longer prompts run in chunks; default: 512, on a GPU 8k")
      ->transform(Tokens());
  if (one_format) {
    app->add_option("--kv-cache-dtype", o.kv_cache_dtype,
                    "auto, bf16, fp16, fp8 (= fp8_e4m3), fp8_e5m2, fp8_per_token_head, "
                    "int8_per_token_head, fp32")
        ->capture_default_str()
        ->group("KV cache");
    app->add_option("--kv-cache-dtype-k", o.kv_cache_dtype_k, "format of K alone")
        ->group("KV cache");
    app->add_option("--kv-cache-dtype-v", o.kv_cache_dtype_v, "format of V alone")
        ->group("KV cache");
  }
  AddCacheFlags(app, o);
}

void AddMaxNumSeqs(CLI::App* app, EngineOptions& o) {
  app->add_option("--max-num-seqs", o.max_num_seqs,
                  "sequences in one step; default: 16, on a GPU 256")
      ->check(CLI::Range(1, 4096));
}

void AddTokenizer(CLI::App* app, EngineOptions& o) {
  app->add_option("--tokenizer", o.tokenizer,
                  "a folder with tokenizer.json; default: the model's own");
}

void AddGenerate(CLI::App& root, int& code) {
  auto o = std::make_shared<GenerateOptions>();
  CLI::App* app =
      root.add_subcommand("generate", "Continue a prompt, streaming the text to stdout.");
  app->footer(
      "Example:\n  octavo generate --prompt 'The code of' --max-tokens 32 --kv-cache-dtype fp8");
  AddEngineFlags(app, o->engine);
  o->engine.max_num_seqs = 1;
  AddTokenizer(app, o->engine);
  app->add_option("--max-model-len", o->engine.max_model_len,
                  "longest sequence in tokens, e.g. 32k; 0: the model's")
      ->transform(Tokens());
  auto* prompt = app->add_option("--prompt,-p", o->prompt, "the prompt");
  app->add_option("--prompt-file,-f", o->prompt_file, "a file that holds the prompt; - for stdin")
      ->excludes(prompt);
  app->add_option("--max-tokens,-n", o->sampling.max_tokens, "tokens to generate")
      ->capture_default_str();
  app->add_option("--temperature", o->sampling.temperature, "0: greedy")->capture_default_str();
  app->add_option("--top-k", o->sampling.top_k, "0: all")->capture_default_str();
  app->add_option("--top-p", o->sampling.top_p,
                  "of the likeliest tokens, those that reach this sum")
      ->capture_default_str();
  app->add_option("--min-p", o->sampling.min_p, "no token below this share of the likeliest")
      ->capture_default_str();
  app->add_option("--repetition-penalty", o->sampling.repetition_penalty,
                  "of tokens that were there; 1: none")
      ->capture_default_str();
  app->add_option("--seed", o->sampling.seed, "same seed, same text")->check(Seed());
  app->add_flag("--ignore-eos", o->sampling.ignore_eos, "go on past the model's end token");
  app->add_flag("--stats", o->stats, "print policy, speed and cache health to stderr");
  app->callback([o, &code] { code = Generate(*o); });
}

// Flags of vLLM's that have one value here, so that its command lines can be kept.
void AddFlagsOfOneValue(CLI::App* app) {
  const std::string group = "vLLM's flags that change nothing";
  app->add_option("--block-size", "tokens of a page: 64")
      ->check(CLI::IsMember({"64"}))
      ->group(group);
  app->add_flag("--enable-chunked-prefill")->description("prompts always do")->group(group);
  app->add_flag("--disable-log-requests,--no-enable-log-requests")
      ->description("requests are never logged")
      ->group(group);
}

// What to do instead of a flag of vLLM's that has no meaning here; empty: not known.
std::string Instead(std::string_view word) {
  static const std::map<std::string_view, const char*> kInstead = {
      {"--revision", "models are folders: download the revision that is wanted"},
      {"--download-dir", "models are folders: name the one that it was downloaded to"},
      {"--attention-backend", "--attention-math says how attention computes"},
      {"--uvicorn-log-level", "requests are not logged"}};
  const auto found = kInstead.find(word.substr(0, word.find('=')));
  if (found == kInstead.end()) return "";
  return "no " + std::string(found->first) + " here: " + found->second;
}

void AddServe(CLI::App& root, int& code) {
  auto o = std::make_shared<ServeOptions>();
  CLI::App* app = root.add_subcommand("serve", "Serve a model behind OpenAI's API.");
  app->footer(
      "GET / (a page), /health, /version, /metrics, /v1/models; POST /v1/completions, "
      "/v1/chat/completions, /tokenize, /detokenize.\nSIGTERM lets running answers end, a second "
      "one "
      "does not.\n"
      "Example:\n  octavo serve --port 8000 --kv-cache-dtype fp8 &\n"
      "  curl localhost:8000/v1/completions -d '{\"prompt\": \"The code of\", \"stream\": true}'");
  AddEngineFlags(app, o->engine);
  app->add_option("--host", o->server.host, "address or name to listen on; 0.0.0.0: all of IPv4")
      ->capture_default_str();
  app->add_option("--port", o->server.port, "0: any that is free")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app->add_option("--api-key", o->server.api_key,
                  "asked for by every route but /health; the page is at /?key=KEY; default: the "
                  "environment's OCTAVO_API_KEY")
      ->envname("OCTAVO_API_KEY")
      // CLI11 takes the next word where `--api-key=` has none, and no key would be no guard.
      ->check([](const std::string& key) {
        const bool is_key = !key.empty() && !key.starts_with("--");
        return is_key ? "" : "expected a key, found '" + key + "'";
      });
  app->add_option("--served-model-name", o->server.model_name,
                  "the model's name in the API; default: its folder's");
  AddTokenizer(app, o->engine);
  app->add_option("--chat-template", o->server.chat_template,
                  "a file with a Jinja template; default: the tokenizer's own");
  app->add_flag("--trust-request-chat-template", o->server.trust_request_chat_template,
                "requests may bring a chat_template of their own");
  app->add_option("--hf-overrides", o->engine.hf_overrides,
                  "fields that replace config.json's, e.g. '{\"max_position_embeddings\": 65536}'");
  app->add_option("--generation-config", o->server.generation_config,
                  "where the defaults of sampling come from: auto (the model's "
                  "generation_config.json), vllm (OpenAI's defaults), or a folder")
      ->capture_default_str();
  app->add_option("--seed", o->engine.seed,
                  "of requests that bring none; default: another each time")
      ->check(Seed());
  app->add_flag("--enable-prefix-caching,!--no-enable-prefix-caching",
                o->engine.enable_prefix_caching,
                "whether prompts that begin alike share pages; default: they do")
      ->group("KV cache");
  AddFlagsOfOneValue(app);
  AddMaxNumSeqs(app, o->engine);
  app->add_option("--max-model-len", o->engine.max_model_len,
                  "longest sequence in tokens, e.g. 32k; 0: the model's")
      ->transform(Tokens());
  app->add_option("--max-requests", o->server.max_requests,
                  "requests running and waiting, each choice counted; more are answered 503")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->callback([o, &code] { code = Serve(*o); });
}

void AddVerify(CLI::App& root, int& code) {
  auto o = std::make_shared<VerifyOptions>();
  CLI::App* app = root.add_subcommand(
      "verify", "Compare logits with a file of references made by transformers.");
  app->footer(
      "Per prompt: relative L2 error, largest error, top-1 agreement, KL divergence; whole prompt, "
      "chunks of 7 and token by\n"
      "token must agree to the bit. Exit code 1 above the tolerance. The cache is float32 in "
      "float32, bf16 in bfloat16,\nunless --kv-cache-dtype says otherwise.\n"
      "tools/make_golden.py makes a reference file from any model.\n"
      "Example:\n  octavo verify tests/golden/llama --dtype float32 --kv-cache-dtype fp8");
  o->engine.dtype = "float32";
  AddEngineFlags(app, o->engine);
  o->engine.model.clear();  // the shipped one has no reference
  app->get_option("model")->required()->description(
      "a Hugging Face folder (config.json, safetensors)");
  app->add_option("--golden", o->golden,
                  "the reference file; default: golden.safetensors in the model's folder");
  app->add_option("--tolerance", o->tolerance,
                  "largest relative L2 error; default: by dtype and format")
      ->check(Positive());
  app->add_flag("--bfloat16-rope", o->bfloat16_rope,
                "the reference was made with model.to(torch.bfloat16), which rounds the RoPE "
                "frequencies too");
  app->callback([o, &code] { code = VerifyModel(*o); });
}

void AddCalibrate(CLI::App& root, int& code) {
  auto o = std::make_shared<CalibrateCommandOptions>();
  CLI::App* app = root.add_subcommand(
      "calibrate", "Make scales for an FP8 cache from a text, and say whether they are needed.");
  app->footer(
      "Half of the text makes the scales: per layer and kv head, margin * amax / 448, rounded up "
      "to "
      "a power of two. The other\n"
      "half is read under each format: KL divergence of the next token's distribution from that of "
      "a bf16 cache (nats per token,\n"
      "with two standard errors), how often the likeliest token is the same, saturated elements. "
      "The "
      "advice is the first format\n"
      "that saturates nowhere and stays within --tolerance.\n"
      "Example:\n  octavo calibrate ~/models/Qwen2.5-7B --text mine.txt --output scales.json");
  AddEngineFlags(app, o->calibrate.engine, /*one_format=*/false);
  AddTokenizer(app, o->calibrate.engine);
  app->add_option("--text", o->calibrate.text_file,
                  "a text of the kind that the model will see; default: generated sentences");
  app->add_option("--tokens", o->calibrate.tokens, "of each half, at most, e.g. 8k")
      ->transform(Tokens())
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app->add_option("--margin", o->calibrate.margin, "room above the largest magnitude that was seen")
      ->check(CLI::Range(1.0, 100.0))
      ->capture_default_str();
  app->add_option("--tolerance", o->calibrate.tolerance,
                  "KL, in nats per token, that an advised format may have")
      ->check(Positive())
      ->capture_default_str();
  o->calibrate.output = "kv_scales.json";
  app->add_option("--output,-o", o->calibrate.output, "the side-car file, for --kv-cache-scales")
      ->capture_default_str();
  app->add_option("--json", o->json, "write the results here");
  app->callback([o, &code] { code = CalibrateModel(*o); });
}

void AddInspect(CLI::App& root, int& code) {
  auto o = std::make_shared<InspectOptions>();
  CLI::App* app = root.add_subcommand(
      "inspect", "Show a model's layers and what its KV cache costs in each format.");
  app->footer(
      "Needs config.json only.\nExample:\n  octavo inspect ~/models/Llama-3.1-8B --memory 40GiB "
      "--length 128k");
  o->model = ShippedModel();
  app->add_option("model", o->model,
                  "a folder with config.json; default: the shipped needle model");
  app->add_option("--memory", o->memory_bytes, "memory for the cache")
      ->transform(Bytes())
      ->default_str("16GiB");
  app->add_option("--length", o->length,
                  "tokens of a sequence; default: 32k, or the most the model takes")
      ->transform(Tokens());
  app->callback([o, &code] { code = Inspect(*o); });
}

void AddEval(CLI::App& root, int& code) {
  CLI::App* eval = root.add_subcommand("eval", "Evaluate what a cache format does to answers.")
                       ->require_subcommand(1);
  auto o = std::make_shared<EvalNeedleOptions>();
  CLI::App* app = eval->add_subcommand(
      "needle", "Ask for needles in haystacks, per cache format, length and depth.");
  app->footer(
      "Every haystack hides --needles needles at even depths and is asked for each of them; the "
      "answer counts if it is exactly\n"
      "right. Also printed: mean log-probability of the right answer, which shows damage before "
      "answers break.\n"
      "With --attention-error also: the relative L2 error of attention's output against a bf16 "
      "cache, per layer and head,\n"
      "every layer given the inputs of the bf16 run, over the last 128 positions of a prompt per "
      "length.\n"
      "Example:\n  octavo eval needle --lengths 4k,32k --kv-cache-dtypes bf16,fp8 --samples 4 "
      "--html needle.html");
  NeedleEvalOptions& e = o->eval;
  AddEngineFlags(app, e.engine, /*one_format=*/false);
  app->add_option(
         "--kv-cache-dtypes", e.formats,
         "what to compare: FORMAT[:MATH][/SKIP], e.g. bf16,fp8,fp8:16bit,fp8/sliding_window")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->capture_default_str();
  app->add_option("--lengths", e.lengths, "prompt lengths in tokens")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->transform(Tokens())
      ->default_str("4k,16k,32k");
  app->add_option("--needles", e.needles,
                  "needles in a haystack, which is also the number of depths")
      ->capture_default_str();
  app->add_option("--samples", e.samples, "haystacks per length")->capture_default_str();
  app->add_option("--seed", e.seed, "of the haystacks")->check(Seed())->capture_default_str();
  app->add_option("--haystack", e.haystack_file,
                  "a text file to hide the needles in, instead of generated text");
  app->add_flag("--attention-error", e.attention_error,
                "measure attention's output against a bf16 cache, per layer and head: one more "
                "prefill per format and length");
  app->add_option("--json", o->json, "write the results here");
  app->add_option("--html", o->html,
                  "write a report with heat maps here (one self-contained file)");
  app->callback([o, &code] { code = EvalNeedle(*o); });
}

void AddVariants(CLI::App* app, std::vector<std::string>& variants) {
  app->add_option("--kv-cache-dtypes", variants,
                  "what to compare with the first: FORMAT[:MATH][/SKIP], e.g. "
                  "bf16,fp8,fp8/sliding_window")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->capture_default_str();
}

void AddBenchLatency(CLI::App& bench, int& code) {
  auto o = std::make_shared<BenchLatencyOptions>();
  CLI::App* app =
      bench.add_subcommand("latency", "One request at a time: when does a cache format pay?");
  app->footer(
      "Fits ITL = slope * context + intercept and TTFT = a L^2 + b L + c for each variant, which "
      "take turns within one run,\nand says from which length on each is faster than the first. "
      "With --load-format dummy a config.json is enough.\n"
      "Example:\n  octavo bench latency ~/models/Llama-3.1-8B --load-format dummy --device cuda "
      "--kv-cache-dtypes bf16,fp8 --html latency.html");
  LatencyBenchOptions& b = o->bench;
  AddEngineFlags(app, b.engine, /*one_format=*/false);
  AddVariants(app, b.variants);
  app->add_option("--input-lens", b.input_lens, "prompt lengths in tokens")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->transform(Tokens())
      ->default_str("256,1k,4k,16k,32k,64k,125000");
  app->add_option("--output-len", b.output_len, "tokens generated per request")
      ->capture_default_str();
  app->add_option("--repeats", b.repeats, "requests per variant and length")->capture_default_str();
  app->add_option("--seed", b.seed, "of the prompts")->check(Seed())->capture_default_str();
  app->add_option("--json", o->json, "write the results here");
  app->add_option("--html", o->html, "write a report with plots here (one self-contained file)");
  app->callback([o, &code] { code = BenchLatency(*o); });
}

void AddBenchServeLoad(CLI::App* app, ServeBenchOptions& b) {
  const std::string group = "Load";
  app->add_option("--dataset-name", "what is sent: random token ids")
      ->check(CLI::IsMember({"random"}))
      ->default_str("random")
      ->group(group);
  app->add_option("--random-input-len", b.random_input_len, "tokens of a prompt")
      ->transform(Tokens())
      ->capture_default_str()
      ->group(group);
  app->add_option("--random-output-len", b.random_output_len, "tokens of an answer, at most")
      ->transform(Tokens())
      ->capture_default_str()
      ->group(group);
  app->add_option("--random-range-ratio", b.random_range_ratio,
                  "r: lengths are uniform in [(1 - r) LEN, (1 + r) LEN]")
      ->capture_default_str()
      ->group(group);
  app->add_option("--num-prompts", b.num_prompts, "requests")
      ->check(CLI::Range(1, 10'000'000))
      ->capture_default_str()
      ->group(group);
  app->add_option("--num-warmups", b.num_warmups, "requests before, which are not measured")
      ->check(CLI::Range(0, 10'000'000))
      ->capture_default_str()
      ->group(group);
  app->add_option("--request-rate", b.request_rate, "requests per second; inf: all at once")
      ->capture_default_str()
      ->group(group);
  app->add_option("--burstiness", b.burstiness,
                  "gaps between requests are gamma distributed: 1 is a Poisson process, less comes "
                  "in bursts, more is more even")
      ->capture_default_str()
      ->group(group);
  app->add_option("--max-concurrency", b.max_concurrency, "requests at a time; 0: no limit")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str()
      ->group(group);
  app->add_flag("--ignore-eos", b.ignore_eos, "answers go on to their full length")->group(group);
  app->add_option("--extra-body", b.extra_body, "a JSON object of more fields for every request")
      ->group(group);
  app->add_option("--temperature", b.temperature, "default: the server's")->group(group);
  app->add_option("--seed", b.seed, "of prompts and arrivals")
      ->check(Seed())
      ->capture_default_str()
      ->group(group);
}

// "ttft:200": a metric and its milliseconds.
std::pair<std::string, double> GoodputLimit(const std::string& text) {
  const size_t colon = text.find(':');
  const std::string metric = text.substr(0, colon);
  if (colon != text.npos && (metric == "ttft" || metric == "tpot" || metric == "e2el")) {
    if (const auto ms = Parse<double>(std::string_view(text).substr(colon + 1)))
      return {metric, *ms};
  }
  throw CLI::ValidationError("--goodput", "expected ttft:MS, tpot:MS or e2el:MS, found " + text);
}

void AddBenchServe(CLI::App& bench, int& code) {
  auto o = std::make_shared<BenchServeOptions>();
  CLI::App* app = bench.add_subcommand("serve", "Load on any OpenAI-compatible server.");
  app->footer(
      "Open loop: --request-rate; closed loop: --max-concurrency; or both. Flags and the fields of "
      "the JSON are those of\n`vllm bench serve`. Prompts are token ids; a chat is sent their text "
      "by --tokenizer, or without it words of a letter.\nFrom an Octavo server it also reads what "
      "a step costs beside the model. Exit code 1 if no request succeeds.\n"
      "Example:\n  octavo bench serve --port 8000 --max-concurrency 64 --num-prompts 256 "
      "--random-input-len 256 --ignore-eos");
  ServeBenchOptions& b = o->bench;
  app->add_option("--base-url", b.base_url, "http://host[:port][/path]; default: --host, --port");
  app->add_option("--host", o->host)->capture_default_str();
  app->add_option("--port", o->port)->check(CLI::Range(1, 65535))->capture_default_str();
  app->add_option("--backend", b.backend,
                  "vllm or openai (completions) or openai-chat; default: by --endpoint")
      ->check(CLI::IsMember({"vllm", "openai", "openai-chat"}));
  auto* endpoint = app->add_option("--endpoint", b.endpoint,
                                   "/v1/completions, or with openai-chat /v1/chat/completions");
  app->add_option("--api-key", b.api_key, "default: the environment's OPENAI_API_KEY")
      ->envname("OPENAI_API_KEY");
  app->add_option("--model", b.model, "default: the first of /v1/models");
  app->add_option("--tokenizer", b.tokenizer,
                  "a folder with tokenizer.json, whose ids are sent; default: ids below 256, which "
                  "every model has");
  app->add_option("--ready-check-timeout-sec", b.ready_check_timeout_sec,
                  "how long to wait for the server")
      ->capture_default_str();
  app->add_option("--request-timeout-sec", b.request_timeout_sec,
                  "a request that hears nothing for so long has failed")
      ->capture_default_str();
  AddBenchServeLoad(app, b);
  const std::string group = "Result";
  app->add_option("--percentile-metrics", b.percentile_metrics, "of ttft, tpot, itl, e2el")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::IsMember({"ttft", "tpot", "itl", "e2el"}))
      ->capture_default_str()
      ->group(group);
  app->add_option("--metric-percentiles", b.metric_percentiles)
      ->delimiter(',')
      ->allow_extra_args(false)
      ->capture_default_str()
      ->group(group);
  app->add_option_function<std::vector<std::string>>(
         "--goodput",
         [&b](const std::vector<std::string>& limits) {
           for (const std::string& limit : limits) b.goodput.insert(GoodputLimit(limit));
         },
         "also count the requests per second that keep within so many milliseconds, e.g. ttft:3000 "
         "tpot:50 e2el:60000")
      ->type_name("METRIC:MS")
      ->group(group);
  auto* save = app->add_flag("--save-result", o->save_result, "write a JSON file")->group(group);
  app->add_flag("--save-detailed", o->save_detailed, "with every request in it")
      ->needs(save)
      ->group(group);
  app->add_option("--result-dir", o->result_dir, "default: here")->needs(save)->group(group);
  app->add_option("--result-filename", o->result_filename, "default: named after load and time")
      ->needs(save)
      ->group(group);
  app->add_option_function<std::vector<std::string>>(
         "--metadata",
         [&b](const std::vector<std::string>& fields) {
           for (const std::string& field : fields) {
             const size_t equals = field.find('=');
             if (equals == field.npos)
               throw CLI::ValidationError("--metadata", "expected KEY=VALUE, found " + field);
             b.metadata.emplace_back(field.substr(0, equals), field.substr(equals + 1));
           }
         },
         "fields for the JSON file")
      ->type_name("KEY=VALUE")
      ->needs(save)
      ->group(group);
  app->callback([o, endpoint, &code] {
    if (o->bench.backend == "openai-chat" && !*endpoint) o->bench.endpoint = "/v1/chat/completions";
    code = BenchServe(*o);
  });
}

void AddBenchThroughput(CLI::App& bench, int& code) {
  auto o = std::make_shared<BenchThroughputOptions>();
  CLI::App* app =
      bench.add_subcommand("throughput", "Many requests at once, offline, per cache format.");
  app->footer(
      "All requests are submitted at once; variants run one after another over the same weights, "
      "each with as many bytes of\ncache as the first. Flags and the fields of the JSON are those "
      "of "
      "`vllm bench throughput`. Prefix caching is off.\n"
      "Example:\n  octavo bench throughput --input-len 1k --output-len 128 --num-prompts 200 "
      "--kv-cache-memory-bytes 64MiB\n"
      "  octavo bench throughput ~/models/Llama-3.1-8B --load-format dummy --device cuda "
      "--kv-cache-dtypes bf16,fp8 --num-prompts 1000 --max-num-batched-tokens 8k");
  ThroughputBenchOptions& b = o->bench;
  AddEngineFlags(app, b.engine, /*one_format=*/false);
  AddMaxNumSeqs(app, b.engine);
  AddVariants(app, b.variants);
  auto* dataset = app->add_option("--dataset", b.dataset,
                                  "prompts from a file, one per line, or of a .jsonl the field "
                                  "\"prompt\"; default: random tokens")
                      ->check(CLI::ExistingFile);
  app->add_option("--input-len", b.input_len, "tokens of a random prompt, e.g. 1k")
      ->transform(Tokens())
      ->excludes(dataset)
      ->capture_default_str();
  app->add_option("--output-len", b.output_len, "tokens generated per request")
      ->transform(Tokens())
      ->capture_default_str();
  app->add_option("--num-prompts", b.num_prompts,
                  "requests; default: 64 random ones, or all of the dataset")
      ->check(CLI::PositiveNumber);
  app->add_option("--random-range-ratio", b.random_range_ratio,
                  "r in [0, 1): lengths are drawn from (1 - r) to (1 + r) times those given")
      ->excludes(dataset)
      ->capture_default_str();
  app->add_option("--seed", b.seed, "of the random prompts")->check(Seed())->capture_default_str();
  app->add_option("--json", o->json, "write the results here");
  app->callback([o, &code] { code = BenchThroughput(*o); });
}

void AddBench(CLI::App& root, int& code) {
  CLI::App* bench = root.add_subcommand("bench", "Measure speed.")->require_subcommand(1);
  AddBenchLatency(*bench, code);
  AddBenchThroughput(*bench, code);
  AddBenchServe(*bench, code);
  auto o = std::make_shared<BenchDecodeOptions>();
  CLI::App* app = bench->add_subcommand(
      "decode", "Decode attention and matrix-vector products against the memory bus.");
  app->footer(
      "Measures this machine's read bandwidth at the same thread count first, then attention of "
      "one token over synthetic\n"
      "layers (8 kv heads, group 4, head_dim 128; working set at least 4x the last-level cache) "
      "for each format and context,\n"
      "then the model. Formats take turns within one run.");
  o->bench.model = ShippedModel();
  app->add_option("model", o->bench.model,
                  "a Hugging Face folder; default: the shipped needle model");
  app->add_option("--contexts", o->bench.contexts, "tokens that a step attends to")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->transform(Tokens())
      ->default_str("1k,4k,16k,32k,64k");
  app->add_option("--kv-cache-dtypes", o->bench.formats,
                  "formats to measure; slopes are compared with the first")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->capture_default_str();
  app->add_option("--threads", o->bench.threads, "0: all")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app->add_option("--seconds", o->bench.seconds, "least time per measurement")
      ->capture_default_str();
  app->add_option("--json", o->json, "write the results here");
  app->callback([o, &code] { code = BenchDecode(*o); });
}

int Main(int argc, char** argv) {
  CLI::App root("Octavo: LLM inference with a quantised KV cache.", "octavo");
  root.require_subcommand(1);
  root.set_version_flag("--version", OCTAVO_VERSION);
  root.get_formatter()->column_width(34);
  int code = 0;
  AddGenerate(root, code);
  AddServe(root, code);
  AddEval(root, code);
  AddVerify(root, code);
  AddCalibrate(root, code);
  AddInspect(root, code);
  AddBench(root, code);
  try {
    root.parse(argc, argv);
  } catch (const CLI::RequiredError& error) {
    // CLI11 reports the missing subcommand and not the word that is none.
    const std::string word = argc > 1 && argv[1][0] != '-' ? argv[1] : "";
    const auto commands = root.get_subcommands([](CLI::App*) { return true; });
    const bool unknown =
        !word.empty() && std::none_of(commands.begin(), commands.end(),
                                      [&](CLI::App* command) { return command->check_name(word); });
    std::fprintf(stderr, "octavo: %s (octavo --help)\n",
                 unknown ? ("unknown subcommand " + word).c_str() : error.what());
    return 2;
  } catch (const CLI::ExtrasError& error) {
    std::string message = error.what();
    for (int i = argc - 1; i > 0; --i) {  // the first that is known
      if (const std::string instead = Instead(argv[i]); !instead.empty()) message = instead;
    }
    std::fprintf(stderr, "octavo: %s (octavo --help)\n", message.c_str());
    return 2;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return root.exit(error);  // --help, --version
    std::fprintf(stderr, "octavo: %s (octavo --help)\n", error.what());
    return 2;
  } catch (const Error& error) {
    std::fprintf(stderr, "octavo: %s\n", error.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "octavo: out of memory\n");
    return 2;
  } catch (const std::exception& error) {  // the system's own: no thread, a closed stdout
    std::fprintf(stderr, "octavo: %s\n", error.what());
    return 2;
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
    std::fprintf(stderr, "octavo: cannot write to stdout\n");
    return 2;
  }
  return code;
}

}  // namespace
}  // namespace octavo::cli

int main(int argc, char** argv) { return octavo::cli::Main(argc, argv); }
