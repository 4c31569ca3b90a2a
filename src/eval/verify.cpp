#include "eval/verify.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "engine/executor.h"
#include "eval/pass.h"
#include "eval/relative_error.h"
#include "io/checkpoint.h"
#include "models/config.h"

namespace octavo {
namespace {

namespace fs = std::filesystem;

struct Logits {
  int64_t rows = 0, vocab = 0;
  std::vector<float> values;
  std::span<const float> row(int64_t i) const {
    return std::span(values).subspan(i * vocab, vocab);
  }
};

double RelativeL2(std::span<const float> a, std::span<const float> reference) {
  RelativeError error;
  error.Add(a, reference);
  return error.value();
}

// The tensors of one golden file, checked against the model.
class Golden {
 public:
  Golden(const std::string& path, const ModelSpec& spec)
      : file_(Checkpoint::OpenFile(path)), path_(path), spec_(spec) {
    while (file_.Find(fmt::format("prompt{}.ids", prompts_))) ++prompts_;
    if (prompts_ == 0)
      throw Error(ErrorCode::kInvalidArgument, fmt::format("{}: no tensor prompt0.ids", path));
  }

  int prompts() const { return prompts_; }
  bool Has(int prompt, const std::string& key) const {
    return file_.Find(Key(prompt, key)) != nullptr;
  }

  std::vector<int32_t> Ids(int prompt, const std::string& key) const {
    const Tensor& tensor = Get(prompt, key, DType::kI32, 1);
    std::vector<int32_t> ids(tensor.size());
    std::memcpy(ids.data(), tensor.data, ids.size() * sizeof(int32_t));
    for (int32_t id : ids) {
      if (id < 0 || id >= spec_.vocab) {
        throw Error(ErrorCode::kInvalidArgument,
                    fmt::format("{}: {}: expected token ids in [0, {}), found {}", path_,
                                Key(prompt, key), spec_.vocab, id));
      }
    }
    return ids;
  }

  Logits Rows(int prompt, const std::string& key, int64_t columns, int64_t most_rows) const {
    const Tensor& tensor = Get(prompt, key, DType::kF32, 2);
    if (tensor.columns() != columns || tensor.rows() == 0 || tensor.rows() > most_rows) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: {}: expected [1 to {}, {}], found {}", path_, Key(prompt, key),
                              most_rows, columns, ShapeString(tensor)));
    }
    Logits logits{
        .rows = tensor.rows(), .vocab = columns, .values = std::vector<float>(tensor.size())};
    std::memcpy(logits.values.data(), tensor.data, logits.values.size() * sizeof(float));
    return logits;
  }

 private:
  static std::string Key(int prompt, const std::string& key) {
    return fmt::format("prompt{}.{}", prompt, key);
  }

  const Tensor& Get(int prompt, const std::string& key, DType dtype, int rank) const {
    const Tensor* tensor = file_.Find(Key(prompt, key));
    if (!tensor || tensor->dtype != dtype || tensor->rank != rank) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("{}: {}: expected a {} tensor of rank {}, found {}", path_, Key(prompt, key),
                      Name(dtype), rank, tensor ? ShapeString(*tensor) : "none"));
    }
    return *tensor;
  }

  Checkpoint file_;
  std::string path_;
  const ModelSpec& spec_;
  int prompts_ = 0;
};

// Runs token lists through an executor, outside any scheduler.
class Runner {
 public:
  Runner(const EngineOptions& options, ModelSpec spec) : executor_(options, std::move(spec)) {}

  const ModelSpec& spec() const { return executor_.spec(); }
  int chunk() const { return executor_.max_num_batched_tokens(); }
  bool on_host() { return executor_.backend().is_host(); }

  // Soft-capped logits of the last `rows` tokens, the prompt cut into chunks.
  Logits Run(std::span<const int32_t> ids, int chunk, int64_t rows,
             const StepObserver& observer = {}) {
    Pass pass(executor_);
    Logits out{.rows = rows, .vocab = spec().vocab, .values = {}};
    Extend(pass, ids, chunk, rows, out, observer);
    return out;
  }

  // Where our greedy continuation of a prompt first parts from `expected`, and by what margin of
  // logits.
  struct Parting {
    size_t index = 0;  // expected.size(): nowhere
    float margin = 0;
  };
  Parting FollowGreedy(std::vector<int32_t> tokens, std::span<const int32_t> expected) {
    Pass pass(executor_);
    // A continuation without any end token was made with them suppressed (generate's
    // min_new_tokens), or never met one.
    const std::vector<int32_t>& eos = spec().eos_token_ids;
    const bool suppress_eos = std::find_first_of(expected.begin(), expected.end(), eos.begin(),
                                                 eos.end()) == expected.end();
    for (size_t i = 0; i < expected.size(); ++i) {
      Logits last{.rows = 1, .vocab = spec().vocab, .values = {}};
      Extend(pass, tokens, chunk(), 1, last, {});
      for (int32_t id : eos) {
        if (suppress_eos && id < spec().vocab) last.values[id] = -INFINITY;
      }
      const auto best = std::max_element(last.values.begin(), last.values.end());
      if (best - last.values.begin() != expected[i]) return {i, *best - last.values[expected[i]]};
      tokens.push_back(expected[i]);
    }
    return {expected.size(), 0};
  }

 private:
  // The rest of `ids`, and the logits of the last `rows` of them.
  void Extend(Pass& pass, std::span<const int32_t> ids, int chunk, int64_t rows, Logits& out,
              const StepObserver& observer) {
    const int64_t end = std::ssize(ids);
    while (pass.written() < end) {
      const int64_t begin = pass.written();
      const int count = static_cast<int>(std::min<int64_t>(chunk, end - begin));
      const int64_t wanted = std::clamp<int64_t>(begin + count - (end - rows), 0, count);
      pass.Run(ids, count, static_cast<int>(wanted), &out.values, observer);
    }
  }

  Executor executor_;
};

// What to compare with, and how close it must be.
struct Yardstick {
  std::string reference = "logits";
  std::string bf16 = "logits_bf16";  // transformers' own bfloat16 against the same reference
  double fixed = 0;                  // float32's tolerance
  bool judged = true, exact_cache = false;
};

Yardstick ChooseYardstick(const EngineOptions& options, const ModelSpec& spec) {
  Yardstick y;
  const auto format = KvFormatFromName(options.kv_cache_dtype);
  const bool mixed = !options.kv_cache_dtype_k.empty() || !options.kv_cache_dtype_v.empty() ||
                     !options.kv_cache_dtype_skip_layers.empty();
  if (format == KvFormat::kFp8E4M3 && !mixed) {
    const bool moe = std::any_of(spec.layers.begin(), spec.layers.end(),
                                 [](auto& l) { return l.ffn.experts > 0; });
    y.reference = "logits_fp8kv";
    y.bf16 = "logits_bf16_fp8kv";
    y.fixed = moe ? 3e-2 : 5e-3;  // a routing decision may flip
  } else {
    y.fixed = 1e-4;
    y.exact_cache = options.dtype == "float32" && format == KvFormat::kF32 && !mixed;
    y.judged =
        y.exact_cache || (options.dtype == "bfloat16" && format == KvFormat::kBF16 && !mixed);
  }
  return y;
}

// Of the rows both have, the last ones.
double Top1Agreement(const Logits& ours, const Logits& reference) {
  const int64_t rows = std::min(ours.rows, reference.rows);
  const auto top = [](std::span<const float> x) {
    return std::max_element(x.begin(), x.end()) - x.begin();
  };
  int64_t agree = 0;
  for (int64_t r = 1; r <= rows; ++r)
    agree += top(ours.row(ours.rows - r)) == top(reference.row(reference.rows - r));
  return static_cast<double>(agree) / static_cast<double>(rows);
}

// To the bit on a CPU; elsewhere as close to the reference as the whole prompt must be.
bool ChunksFine(const PromptResult& result, bool on_host) {
  if (on_host) return result.chunks_identical;
  return result.tolerance == 0 || result.chunked_l2 <= result.tolerance;
}

void Compare(const Logits& ours, const Logits& reference, PromptResult& result) {
  result.relative_l2 = RelativeL2(ours.values, reference.values);
  double kl = 0;
  const auto log_normaliser = [](std::span<const float> x) {
    const double top = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (float v : x) sum += std::exp(v - top);
    return top + std::log(sum);
  };
  for (int64_t r = 0; r < ours.rows; ++r) {
    const auto a = ours.row(r), b = reference.row(r);
    const double za = log_normaliser(a), zb = log_normaliser(b);
    for (int64_t i = 0; i < ours.vocab; ++i) {
      result.max_error = std::max(result.max_error, std::fabs(double{a[i]} - b[i]));
      kl += std::exp(b[i] - zb) * ((b[i] - zb) - (a[i] - za));
    }
  }
  result.top1_agreement = Top1Agreement(ours, reference);
  result.mean_kl = kl / static_cast<double>(ours.rows);
}

// Residual streams of a whole-prompt run against prompt0.hidden{l}.
class HiddenCheck {
 public:
  HiddenCheck(const Golden& golden, const ModelSpec& spec, int64_t tokens, std::vector<double>& out)
      : golden_(golden), spec_(spec), tokens_(tokens), out_(out) {}

  StepObserver observer() {
    return {.hidden = [this](int layer, const Tensor& hidden) {
      const std::string key = fmt::format("hidden{}", layer);
      if (!golden_.Has(0, key) || hidden.dtype != DType::kF32 || hidden.rows() != tokens_) return;
      const Logits reference = golden_.Rows(0, key, spec_.hidden, tokens_);
      if (reference.rows != tokens_) return;
      out_.push_back(RelativeL2({static_cast<const float*>(hidden.data), reference.values.size()},
                                reference.values));
    }};
  }

 private:
  const Golden& golden_;
  const ModelSpec& spec_;
  int64_t tokens_;
  std::vector<double>& out_;
};

}  // namespace

VerifyReport Verify(const VerifyOptions& options) {
  EngineOptions engine = options.engine;
  if (engine.kv_cache_dtype == "auto")
    engine.kv_cache_dtype = engine.dtype == "float32" ? "fp32" : "bf16";
  engine.enable_prefix_caching = false;
  ModelSpec model = ReadModelSpec(engine.model);
  if (options.bfloat16_rope) {
    for (RopeSpec& rope : model.ropes) {
      for (float& f : rope.inv_freq) f = BF16ToFloat(FloatToBF16(f));
    }
  }
  Runner runner(engine, std::move(model));
  const bool on_host = runner.on_host();
  const ModelSpec& spec = runner.spec();
  const std::string path = options.golden.empty()
                               ? (fs::path(engine.model) / "golden.safetensors").string()
                               : options.golden;
  const Golden golden(path, spec);
  const Yardstick y = ChooseYardstick(engine, spec);

  VerifyReport report{.reference = y.reference,
                      .tolerance_source = {},
                      .prompts = {},
                      .hidden_l2 = {},
                      .passed = true};
  const bool judge_together = y.judged && engine.dtype == "bfloat16" && options.tolerance == 0;
  RelativeError ours_together, bf16_together, chunked_together[2];
  double bf16_top1_together = 0;
  PromptResult together{.chunks_identical = true, .greedy = "-"};
  for (int i = 0; i < golden.prompts(); ++i) {
    const std::vector<int32_t> ids = golden.Ids(i, "ids");
    const int tokens = static_cast<int>(ids.size());
    const Logits reference = golden.Rows(i, y.reference, spec.vocab, tokens);
    double bf16_top1 = 0;
    PromptResult result{.tokens = tokens, .rows = static_cast<int>(reference.rows)};

    HiddenCheck hidden(golden, spec, tokens, report.hidden_l2);
    const Logits whole = runner.Run(ids, runner.chunk(), reference.rows,
                                    i == 0 && y.exact_cache ? hidden.observer() : StepObserver{});
    Compare(whole, reference, result);
    result.chunks_identical = true;
    const int chunks[] = {std::min(7, runner.chunk()), 1};
    for (size_t c = 0; c < std::size(chunks); ++c) {
      const Logits chunked = runner.Run(ids, chunks[c], reference.rows);
      result.chunks_identical = result.chunks_identical && chunked.values == whole.values;
      result.chunked_l2 = std::max(result.chunked_l2, RelativeL2(chunked.values, reference.values));
      chunked_together[c].Add(chunked.values, reference.values);
    }

    if (options.tolerance > 0) {
      result.tolerance = options.tolerance;
      report.tolerance_source = "--tolerance";
    } else if (!y.judged) {
      report.tolerance_source =
          "none: the file has no reference for this cache, errors are reported and not judged";
    } else if (engine.dtype == "float32") {
      result.tolerance = y.fixed;
      report.tolerance_source = "float32's own";
    } else {
      const Logits bf16 = golden.Rows(i, y.bf16, spec.vocab, tokens);
      bf16_together.Add(bf16.values, reference.values);
      bf16_top1 = Top1Agreement(bf16, reference);
      ours_together.Add(
          std::span(whole.values).last(std::min(whole.values.size(), bf16.values.size())),
          reference.values);
      report.tolerance_source =
          fmt::format("1.5 x the error of transformers' own {}, over all prompts", y.bf16);
    }
    const double share = static_cast<double>(result.rows) / (together.rows + result.rows);
    together.rows += result.rows;
    together.max_error = std::max(together.max_error, result.max_error);
    together.top1_agreement += share * (result.top1_agreement - together.top1_agreement);
    bf16_top1_together += share * (bf16_top1 - bf16_top1_together);
    together.mean_kl += share * (result.mean_kl - together.mean_kl);
    together.chunks_identical = together.chunks_identical && result.chunks_identical;

    bool greedy_fine = true;
    if (y.exact_cache && golden.Has(i, "greedy")) {
      const std::vector<int32_t> expected = golden.Ids(i, "greedy");
      const Runner::Parting parting = runner.FollowGreedy(ids, expected);
      // Closer than the error of the logits themselves, the reference could have gone either way.
      greedy_fine = parting.index == expected.size() || parting.margin <= 2 * result.max_error;
      result.greedy = parting.index == expected.size() ? "identical"
                      : greedy_fine
                          ? fmt::format("tie at {}", parting.index)
                          : fmt::format("parts at {} by {:.1e}", parting.index, parting.margin);
    } else {
      result.greedy = "-";
    }
    result.passed = ChunksFine(result, on_host) && greedy_fine &&
                    std::isfinite(result.relative_l2) &&
                    (result.tolerance == 0 || result.relative_l2 <= result.tolerance);
    report.passed = report.passed && result.passed;
    report.prompts.push_back(result);
  }
  if (judge_together) {
    report.tolerance_source += fmt::format(" (top-1 {:.1f}%)", 100 * bf16_top1_together);
    together.relative_l2 = ours_together.value();
    together.tolerance = 1.5 * bf16_together.value();
    together.chunked_l2 = std::max(chunked_together[0].value(), chunked_together[1].value());
    together.passed = ChunksFine(together, on_host) && together.relative_l2 <= together.tolerance &&
                      (on_host || together.top1_agreement >= bf16_top1_together - 0.02);
    report.passed = report.passed && together.passed;
    report.prompts.push_back(together);
  }
  return report;
}

std::string FormatReport(const VerifyReport& report) {
  std::string out = fmt::format(
      "against {}; tolerance: {}\n{:>6} {:>6} {:>12} {:>12} {:>11} {:>8} {:>12}  {:<13} {:<10}\n",
      report.reference, report.tolerance_source, "tokens", "rows", "relative L2", "tolerance",
      "max error", "top-1", "KL", "chunks", "greedy");
  for (const PromptResult& r : report.prompts) {
    const std::string tokens = r.tokens ? std::to_string(r.tokens) : "all";
    out += fmt::format(
        "{:>6} {:>6} {:>12.3e} {:>12} {:>11.3e} {:>7.1f}% {:>12.3e}  {:<13} {:<18}{}\n", tokens,
        r.rows, r.relative_l2, r.tolerance > 0 ? fmt::format("{:.3e}", r.tolerance) : "-",
        r.max_error, 100 * r.top1_agreement, r.mean_kl,
        r.chunks_identical ? "bit-identical" : fmt::format("{:.3e}", r.chunked_l2), r.greedy,
        r.passed ? "ok" : "FAILED");
  }
  if (!report.hidden_l2.empty()) {
    out += "hidden states, relative L2 by layer:";
    for (double error : report.hidden_l2) out += fmt::format(" {:.1e}", error);
    out += "\n";
  }
  return out + (report.passed ? "passed\n" : "failed\n");
}

}  // namespace octavo
