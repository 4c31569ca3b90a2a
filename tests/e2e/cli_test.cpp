// The octavo program as a person meets it: exit codes, one line per mistake, help.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace {

namespace fs = std::filesystem;

struct Outcome {
  int code = -1;
  std::string out, err;
};

class CliTest : public ::testing::Test {
 protected:
  CliTest() {
    std::string pattern = (fs::temp_directory_path() / "octavo-cli-XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
  }
  ~CliTest() override { fs::remove_all(folder_); }

  Outcome Run(const std::string& arguments) {
    const fs::path err = folder_ / "stderr";
    const std::string command =
        std::string(OCTAVO_PROGRAM) + " " + arguments + " 2>" + err.string();
    FILE* pipe = popen(command.c_str(), "r");
    Outcome outcome;
    std::array<char, 4096> buffer;
    while (const size_t n = fread(buffer.data(), 1, buffer.size(), pipe))
      outcome.out.append(buffer.data(), n);
    const int status = pclose(pipe);
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    outcome.err = Read(err);
    EXPECT_EQ(outcome.err.find("Sanitizer"), std::string::npos) << outcome.err;
    return outcome;
  }

  // Exit code 2, nothing on stdout, and on stderr one line that holds every one of `parts`.
  void ExpectRefused(const std::string& arguments, const std::vector<std::string>& parts) {
    const Outcome o = Run(arguments);
    EXPECT_EQ(o.code, 2) << arguments << "\n" << o.out << o.err;
    EXPECT_EQ(o.out, "") << arguments;
    const auto lines = std::count(o.err.begin(), o.err.end(), '\n');
    EXPECT_EQ(lines, 1) << arguments << "\n" << o.err;
    for (const std::string& part : parts)
      EXPECT_NE(o.err.find(part), std::string::npos) << part << " not in: " << o.err;
  }

  // A copy of a golden model that a test may break.
  fs::path Copy(const std::string& family) {
    const fs::path to = folder_ / family;
    fs::copy(Golden(family), to);
    return to;
  }

  static std::string Golden(const std::string& family) {
    return std::string(OCTAVO_SOURCE_DIR) + "/tests/golden/" + family;
  }

  static std::string Read(const fs::path& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
  }

  static void Write(const fs::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  }

  static void ReplaceInFile(const fs::path& path, const std::string& from, const std::string& to) {
    std::string text = Read(path);
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    Write(path, text.replace(at, from.size(), to));
  }

  fs::path folder_;
};

TEST_F(CliTest, HelpOfEveryCommand) {
  for (const char* command : {"", "generate", "serve", "verify", "inspect", "eval", "eval needle",
                              "bench", "bench decode", "bench latency", "bench throughput"}) {
    const Outcome o = Run(std::string(command) + " --help");
    EXPECT_EQ(o.code, 0) << command;
    EXPECT_NE(o.out.find("Usage"), std::string::npos) << command;
    EXPECT_EQ(o.err, "") << command;
  }
  EXPECT_EQ(Run("--version").code, 0);
}

TEST_F(CliTest, WrongCommandLines) {
  ExpectRefused("", {"subcommand"});
  ExpectRefused("frobnicate", {"frobnicate"});
  ExpectRefused("generate --no-such-flag", {"--no-such-flag"});
  ExpectRefused("verify", {"model is required"});
  ExpectRefused("calibrate --text /nonexistent.txt", {"/nonexistent.txt"});
  ExpectRefused("calibrate --tokens 64 --output /nonexistent/x.json", {"/nonexistent/x.json"});
  ExpectRefused("calibrate --margin 0.5", {"--margin"});
  ExpectRefused("generate --kv-cache-memory-bytes 60TiB --prompt x",
                {"out of memory for a KV cache", "--kv-cache-memory-bytes"});
  ExpectRefused("serve x --revision main", {"no --revision here: "});
  ExpectRefused("serve --attention-backend=FLASH_ATTN", {"--attention-math"});
  ExpectRefused("serve --hf-overrides '{\"hidden_size\": 0}'", {"hidden_size"});
  ExpectRefused("eval", {"subcommand"});
  const std::string model = Golden("llama");
  ExpectRefused("verify /nonexistent", {"/nonexistent"});
  ExpectRefused("verify " + model + " --dtype int4", {"--dtype", "int4"});
  ExpectRefused("verify " + model + " --kv-cache-dtype fp7", {"fp7", "fp8"});
  ExpectRefused("verify " + model + " --kv-cache-dtype-skip-layers 4", {"4"});
  ExpectRefused("verify " + model + " --kv-cache-dtype-skip-layers every_other",
                {"every_other", "sliding_window"});
  ExpectRefused("verify " + model + " --golden /nonexistent.safetensors",
                {"/nonexistent.safetensors"});
  ExpectRefused("verify " + model + " --threads -1", {"--threads"});
  ExpectRefused("generate --threads 1000000 --prompt x", {"--threads"});
  ExpectRefused("eval needle --lengths 9223372036854775807", {"--lengths"});
  ExpectRefused("verify " + model + " --max-num-batched-tokens 0", {"--max-num-batched-tokens"});
  ExpectRefused("verify " + model + " --kv-cache-memory-bytes 10KiB", {"--kv-cache-memory-bytes"});
  ExpectRefused("inspect " + model + " --memory -4", {"--memory"});
  ExpectRefused("eval needle --lengths 0", {"--lengths"});
  ExpectRefused("eval needle --lengths 4k --json /nonexistent/x.json", {"/nonexistent/x.json"});
  ExpectRefused("eval needle --lengths 4k --haystack /nonexistent.txt", {"/nonexistent.txt"});
  ExpectRefused("bench decode --contexts 100", {"--contexts", "100"});
  ExpectRefused("generate --prompt-file /nonexistent.txt", {"/nonexistent.txt"});
  ExpectRefused("generate " + model + " --prompt hello", {"tokenizer.json"});
  ExpectRefused("generate --prompt-file /tmp", {"/tmp", "not a regular file"});
  ExpectRefused("generate --prompt x --seed -1", {"--seed", "-1"});
  ExpectRefused("generate --prompt x --seed 18446744073709551616", {"--seed"});
  ExpectRefused("generate --prompt " + std::string(5000, 'x') + " --kv-cache-memory-bytes 1MiB",
                {"--kv-cache-memory-bytes", "5001 tokens"});
  ExpectRefused("inspect " + model + " --memory 99999999999999999999", {"--memory"});
  ExpectRefused("verify " + model + " --tolerance nan", {"--tolerance", "nan"});
  ExpectRefused("verify " + model + " --tolerance 0", {"--tolerance"});
  ExpectRefused("bench decode --seconds inf", {"--seconds", "inf"});
  ExpectRefused("eval needle --lengths 1k --haystack /dev/zero", {"/dev/zero"});
  ExpectRefused("eval needle --lengths 1k --haystack /dev/null", {"/dev/null"});
  ExpectRefused("eval needle --lengths 1k --needles 257", {"--needles", "257"});
  ExpectRefused("eval needle --lengths 1k --kv-cache-dtype-k fp8", {"--kv-cache-dtype-k"});
  // A list takes one word; what follows is the model.
  ExpectRefused("eval needle --lengths 1k,2k /nonexistent", {"/nonexistent/config.json"});
  ExpectRefused("serve /nonexistent", {"/nonexistent"});
  ExpectRefused("serve --host 192.0.2.1", {"--host", "192.0.2.1"});
  ExpectRefused("serve --port 65536", {"--port", "65535"});
  ExpectRefused("serve --max-num-seqs 0", {"--max-num-seqs"});
  ExpectRefused("serve --port 0 --api-key ''", {"--api-key", "expected a key"});
  ExpectRefused("serve --api-key= --port 0", {"--api-key", "expected a key, found '--port'"});
  ExpectRefused("serve --block-size 16", {"--block-size"});
  ExpectRefused("serve --port 0 --tokenizer /nonexistent", {"/nonexistent/tokenizer.json"});
  ExpectRefused("serve --port 0 --chat-template /nonexistent.jinja", {"/nonexistent.jinja"});
  ExpectRefused("serve --port 0 --generation-config /nonexistent", {"/nonexistent"});
}

TEST_F(CliTest, VerifyPassesAndFails) {
  const Outcome good = Run("verify " + Golden("llama"));
  EXPECT_EQ(good.code, 0) << good.out << good.err;
  EXPECT_NE(good.out.find("passed"), std::string::npos);
  const Outcome bad = Run("verify " + Golden("llama") + " --kv-cache-dtype fp8 --tolerance 1e-9");
  EXPECT_EQ(bad.code, 1);
  EXPECT_NE(bad.out.find("FAILED"), std::string::npos);
}

TEST_F(CliTest, VerifyInSmallChunks) {
  const Outcome o = Run("verify " + Golden("llama") + " --max-num-batched-tokens 1");
  EXPECT_EQ(o.code, 0) << o.out << o.err;
}

TEST_F(CliTest, LostOutputIsAnError) {
  EXPECT_EQ(Run("inspect " + Golden("llama") + " >/dev/full").code, 2);
}

TEST_F(CliTest, GenerateAnswersTheShippedModelsQuestion) {
  Write(folder_ / "prompt",
        "The code of amber bell is 123456.\nQuestion: what is the code of amber bell?\nAnswer: ");
  for (const char* format : {"bf16", "fp8", "int8_per_token_head"}) {
    const Outcome o = Run("generate --temperature 0 --prompt-file " +
                          (folder_ / "prompt").string() + " --kv-cache-dtype " + format);
    EXPECT_EQ(o.code, 0) << o.err;
    EXPECT_EQ(o.out, "123456.\n") << format;
  }
}

TEST_F(CliTest, EvalNeedleWritesItsReports) {
  const std::string json = (folder_ / "r.json").string(), html = (folder_ / "r.html").string();
  const Outcome o =
      Run("eval needle --lengths 1k --kv-cache-dtypes bf16,fp8 --attention-error --json " + json +
          " --html " + html);
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("100.0% (8/8)"), std::string::npos) << o.out;
  EXPECT_NE(Read(json).find("\"exact_match\": 1.0"), std::string::npos);
  EXPECT_NE(o.out.find("attention's output against a bf16 cache"), std::string::npos) << o.out;
  EXPECT_NE(Read(json).find("\"attention_error\""), std::string::npos);
  const std::string page = Read(html);
  EXPECT_NE(page.find("</html>"), std::string::npos);
  EXPECT_EQ(page.find("http"), std::string::npos) << "a report makes no external requests";
}

TEST_F(CliTest, BenchLatencyComparesVariantsFromAConfigAlone) {
  const fs::path model = folder_ / "model";
  fs::create_directory(model);
  fs::copy(fs::path(Golden("gpt_oss")) / "config.json", model / "config.json");
  const fs::path json = folder_ / "latency.json", html = folder_ / "latency.html";
  const Outcome o =
      Run("bench latency " + model.string() +
          " --load-format dummy --device cpu --kv-cache-dtypes "
          "bf16,fp8/sliding_window --input-lens 16,64,128 --output-len 12 --repeats 2 "
          "--json " +
          json.string() + " --html " + html.string());
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("fp8/sliding_window: intercept"), std::string::npos) << o.out;
  for (const char* part : {"\"itl_slope_s\"", "\"break_even_tokens\"", "\"input_len\": 128"})
    EXPECT_NE(Read(json).find(part), std::string::npos) << part << Read(json);
  EXPECT_NE(Read(html).find("<polyline"), std::string::npos);
  EXPECT_EQ(Read(html).find("http"), std::string::npos);  // nothing is fetched
  const std::string bench = "bench latency " + model.string() + " --device cpu ";
  ExpectRefused(bench + "--load-format dummy --input-lens 16", {"--input-lens"});
  ExpectRefused(bench + "--load-format dummy --input-lens 16,32,9m", {"--input-lens", "9437184"});
  ExpectRefused(bench + "--load-format other --input-lens 1,2,3 --output-len 8",
                {"--load-format", "other"});
}

TEST_F(CliTest, BenchThroughputPrintsARatioPerVariant) {
  const fs::path json = folder_ / "throughput.json";
  const std::string bench = "bench throughput " + Golden("gpt_oss") + " --device cpu ";
  const Outcome o = Run(bench +
                        "--load-format dummy --input-len 40 --output-len 4 --num-prompts 6 "
                        "--max-num-seqs 3 --kv-cache-dtypes bf16,fp8/sliding_window --json " +
                        json.string());
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("6 requests, 240 prompt tokens"), std::string::npos) << o.out;
  EXPECT_NE(o.out.find("\nfp8/sliding_window "), std::string::npos) << o.out;
  for (const char* part : {"\"total_num_tokens\": 264", "\"peak_running\": 3"})
    EXPECT_NE(Read(json).find(part), std::string::npos) << part << Read(json);
  ExpectRefused(bench + "--output-len 0", {"--output-len", "0"});
  ExpectRefused(bench + "--dataset nowhere", {"--dataset", "nowhere"});
  ExpectRefused(bench + "--kv-cache-dtypes bf16,fp9", {"--kv-cache-dtype", "fp9"});
}

TEST_F(CliTest, DevicesThatAreNotThere) {
  ExpectRefused("generate -p x --device tpu", {"--device", "auto, cpu or cuda", "tpu"});
  ExpectRefused("generate -p x --device cpu --gpu-memory-utilization 0",
                {"--gpu-memory-utilization", "(0, 1]"});
  ExpectRefused("generate -p x --device cpu --attention-math fp7", {"--attention-math", "fp7"});
}

TEST_F(CliTest, BrokenFolders) {
  fs::path model = Copy("llama");
  fs::resize_file(model / "model.safetensors", 5000);
  ExpectRefused("verify " + model.string(), {"model.safetensors"});
  fs::remove(model / "model.safetensors");
  ExpectRefused("verify " + model.string(), {"model.safetensors"});
  fs::remove(model / "config.json");
  ExpectRefused("verify " + model.string(), {"config.json"});

  model = Copy("qwen2");
  ReplaceInFile(model / "config.json", "\"num_attention_heads\": 4", "\"num_attention_heads\": -4");
  ExpectRefused("verify " + model.string(), {"config.json", "num_attention_heads", "-4"});
  Write(model / "config.json", "{\"model_type\": \"mamba\"}");
  ExpectRefused("verify " + model.string(), {"config.json", "mamba"});
  Write(model / "config.json", std::string(200'000, '['));
  ExpectRefused("verify " + model.string(), {"config.json"});
  Write(model / "config.json", "{\"model_type\": \"\xff\xfe\"}");
  ExpectRefused("verify " + model.string(), {"config.json"});
}

TEST_F(CliTest, BrokenScales) {
  const fs::path model = Copy("llama");
  for (const char* scale : {"0", "-1", "1e-30", "1e30", "\"x\""}) {
    const std::string layer = "{\"0\": " + std::string(scale) + ", \"1\": 1, \"2\": 1, \"3\": 1}";
    Write(folder_ / "scales.json",
          "{\"model_type\": \"llama\", \"kv_cache\": {\"dtype\": \"float8_e4m3fn\", "
          "\"scaling_factor\": {\"0\": " +
              layer + "}}}");
    ExpectRefused("verify " + model.string() + " --kv-cache-dtype fp8 --kv-cache-scales " +
                      (folder_ / "scales.json").string(),
                  {"scales.json"});
  }
}

TEST_F(CliTest, InspectNeedsOnlyAConfig) {
  fs::create_directory(folder_ / "model");
  fs::copy(Golden("gpt_oss") + "/config.json", folder_ / "model");
  const Outcome o = Run("inspect " + (folder_ / "model").string());
  EXPECT_EQ(o.code, 0) << o.err;
  for (const char* word : {"gpt_oss", "sliding", "fp8", "bf16", "int8_per_token_head"}) {
    EXPECT_NE(o.out.find(word), std::string::npos) << word << " not in\n" << o.out;
  }
}

}  // namespace
