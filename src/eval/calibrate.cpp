#include "eval/calibrate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <span>

#include <fmt/format.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "eval/haystack.h"
#include "eval/pass.h"
#include "io/checkpoint.h"
#include "kv/scale_files.h"
#include "models/config.h"
#include "text/tokenizer.h"

namespace octavo {
namespace {

struct Halves {
  std::vector<int32_t> first, second;
};

Halves ReadTokens(const CalibrateOptions& options) {
  const ModelSpec spec = ReadModelSpec(options.engine.model, options.engine.hf_overrides);
  const int64_t most = std::min<int64_t>(options.tokens, spec.max_position_embeddings);
  const std::string& folder =
      options.engine.tokenizer.empty() ? options.engine.model : options.engine.tokenizer;
  const Tokenizer tokenizer = Tokenizer::FromFolder(folder);
  std::string text = ReadText(options.text_file);
  if (text.empty()) {
    constexpr size_t kBytesPerToken = 8;  // more than any tokenizer makes of English
    text = HaystackGenerator({}).Make(2 * kBytesPerToken * most, 1, /*seed=*/1).text;
  }
  const std::vector<int32_t> tokens = tokenizer.Encode(text);
  for (const int32_t id : tokens) {
    if (id < 0 || id >= spec.vocab) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: the tokenizer's id {} is not in the model's vocabulary of {}",
                              folder, id, spec.vocab));
    }
  }
  const int64_t half = std::min<int64_t>(std::ssize(tokens) / 2, most) / kPageSize * kPageSize;
  if (half == 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected at least {} tokens of text, found {}", options.text_file,
                            2 * kPageSize, tokens.size()));
  }
  const auto begin = tokens.begin();
  return {{begin, begin + half}, {begin + half, begin + 2 * half}};
}

float LargestBF16(std::span<const std::byte> bytes) {
  uint16_t largest = 0;  // magnitudes are ordered as their bits are
  for (size_t i = 0; i < bytes.size(); i += sizeof(largest)) {
    uint16_t bits;
    std::memcpy(&bits, bytes.data() + i, sizeof(bits));
    largest = std::max<uint16_t>(largest, bits & 0x7FFF);
  }
  return BF16ToFloat(largest);
}

void InChunks(int64_t tokens, int chunk, const std::function<void(int count)>& run) {
  for (int64_t begin = 0; begin < tokens; begin += chunk)
    run(static_cast<int>(std::min<int64_t>(chunk, tokens - begin)));
}

// What stands in whole pages of a layer.
void See(Executor& executor, int layer, std::span<const uint32_t> pages, LayerAmax& amax) {
  const KvLayout& at = executor.layout(layer);
  OCTAVO_CHECK(at.k_format == KvFormat::kBF16 && at.v_format == KvFormat::kBF16);
  amax.k.resize(at.kv_heads);
  amax.v.resize(at.kv_heads);
  for (const uint32_t page : pages) {
    const std::vector<std::byte> claim = executor.ReadClaim(layer, page);
    const std::span<const std::byte> bytes(claim);
    for (int h = 0; h < at.kv_heads; ++h) {
      amax.k[h] = std::max(amax.k[h], LargestBF16(bytes.subspan(at.KOffset(h), at.KBytes())));
      amax.v[h] = std::max(amax.v[h], LargestBF16(bytes.subspan(at.VOffset(h), at.VBytes())));
    }
  }
}

std::vector<LayerAmax> MeasureAmax(Executor& executor, std::span<const int32_t> tokens, int chunk,
                                   const std::function<void()>& done) {
  std::vector<LayerAmax> amax(executor.spec().layers.size());
  Pass pass(executor);
  InChunks(std::ssize(tokens), chunk, [&](int count) {
    const size_t first = pass.written() / kPageSize, pages = count / kPageSize;
    // While the step runs, since pages behind windows are given back at its end.
    const StepObserver look{.attended = [&](int layer, const Tensor&) {
      See(executor, layer, pass.pages().table(executor.group(layer)).subspan(first, pages),
          amax[layer]);
    }};
    pass.Run(tokens, count, 0, nullptr, look);
    done();
  });
  return amax;
}

KvScale ScalesOf(const std::vector<float>& amax, double margin, const std::string& what) {
  KvScale scale{.values = {}, .per_head = true, .source = "calibrated"};
  for (const float largest : amax)
    scale.values.push_back(CheckedScale(ScaleFor(largest, margin), what));
  return scale;
}

double LogNormaliser(std::span<const float> logits) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - top);
  return top + std::log(sum);
}

ptrdiff_t Top(std::span<const float> logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// One format's run over the second half.
struct Contestant {
  Contestant(const EngineOptions& options, const std::shared_ptr<const LoadedModel>& model)
      : executor(options, model), pass(executor) {}

  void Score(std::span<const float> logits, double normaliser, std::span<const float> reference,
             double reference_normaliser, int32_t next) {
    double divergence = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      const double expected = reference[i] - reference_normaliser;
      if (const double p = std::exp(expected); p > 0)
        divergence += p * (expected - (logits[i] - normaliser));
    }
    kl += divergence;
    kl_squares += divergence * divergence;
    same_top += Top(logits) == Top(reference);
    log_probs += logits[next] - normaliser;
    ++positions;
  }

  FormatScore Finish(std::string name, std::string flags) {
    const std::vector<LayerHealth> health = executor.ReadHealth();
    const std::string source = executor.CacheReport(health)[0].k_scale_source;
    if (source.starts_with("checkpoint")) name += ", checkpoint's";
    const auto n = static_cast<double>(positions);
    FormatScore score{.name = std::move(name),
                      .flags = std::move(flags),
                      .kl = kl / n,
                      .top1 = static_cast<double>(same_top) / n,
                      .log_prob = log_probs / n,
                      .bytes_per_token = executor.cache_bytes_per_token()};
    score.kl_error = 2 * std::sqrt(std::max(0.0, kl_squares / n - score.kl * score.kl) / n);
    for (const LayerHealth& layer : health)
      score.saturated += layer.saturated[0] + layer.saturated[1];
    return score;
  }

  Executor executor;
  Pass pass;
  double kl = 0, kl_squares = 0, log_probs = 0;
  int64_t same_top = 0, positions = 0;
};

struct Format {
  std::string name, dtype, scales;
};

std::vector<FormatScore> ScoreFormats(const EngineOptions& engine, std::span<const Format> formats,
                                      const std::shared_ptr<const LoadedModel>& model,
                                      std::span<const int32_t> tokens,
                                      const std::function<void()>& done) {
  std::vector<std::unique_ptr<Contestant>> contestants;
  for (size_t i = 0; i < formats.size(); ++i) {
    EngineOptions options = engine;
    options.kv_cache_dtype = formats[i].dtype;
    options.kv_cache_scales = formats[i].scales;
    // Counted against all memory taken so far, so each gets an equal share of a GPU's.
    options.gpu_memory_utilization *=
        static_cast<double>(i + 1) / static_cast<double>(formats.size());
    contestants.push_back(std::make_unique<Contestant>(options, model));
  }
  const size_t vocab = model->spec.vocab;
  std::vector<float> reference, logits;
  int64_t begin = 0;
  InChunks(std::ssize(tokens), contestants[0]->executor.max_num_batched_tokens(), [&](int count) {
    std::vector<double> normalisers;
    for (const auto& contestant : contestants) {
      const bool is_reference = contestant == contestants[0];
      std::vector<float>& rows = is_reference ? reference : logits;
      rows.clear();
      contestant->pass.Run(tokens, count, count, &rows);
      for (int r = 0; r < count && begin + r + 1 < std::ssize(tokens); ++r) {
        const auto row = std::span<const float>(rows).subspan(r * vocab, vocab);
        const double normaliser = LogNormaliser(row);
        if (is_reference) normalisers.push_back(normaliser);
        contestant->Score(row, normaliser,
                          std::span<const float>(reference).subspan(r * vocab, vocab),
                          normalisers[r], tokens[begin + r + 1]);
      }
      done();
    }
    begin += count;
  });
  std::vector<FormatScore> scores;
  for (size_t i = 0; i < formats.size(); ++i) {
    const Format& f = formats[i];
    std::string flags = "--kv-cache-dtype " + f.dtype;
    if (!f.scales.empty()) flags += " --kv-cache-scales " + f.scales;
    scores.push_back(contestants[i]->Finish(f.name, flags));
  }
  return scores;
}

std::string Advice(const std::vector<FormatScore>& scores, double tolerance) {
  const auto divergence = [](const FormatScore& s) {
    return fmt::format("KL {:.2g} +- {:.1g} nats per token", s.kl, s.kl_error);
  };
  const FormatScore& plain = scores[1];
  const std::string without =
      fmt::format("fp8 without calibrated scales: {}, {} elements saturated", divergence(plain),
                  plain.saturated);
  const FormatScore* best = Cheapest(scores, tolerance);
  if (!best)
    return fmt::format("--kv-cache-dtype bf16: no 8-bit format stays within {}; {}", tolerance,
                       without);
  const std::string advice = fmt::format("{}: {}", best->flags, divergence(*best));
  return advice + (best == &plain ? "; calibrated scales are not needed" : "; " + without);
}

std::string Range(const std::vector<float>& amax) {
  const auto [least, most] = std::minmax_element(amax.begin(), amax.end());
  return fmt::format("{:.4g} to {:.4g}", *least, *most);
}

}  // namespace

float ScaleFor(float amax, double margin) {
  return PowerOfTwoAtLeast(std::max(static_cast<float>(margin * amax / kFp8E4M3Max), 1e-6f));
}

const FormatScore* Cheapest(const std::vector<FormatScore>& scores, double tolerance) {
  for (size_t i = 1; i < scores.size(); ++i) {
    if (scores[i].saturated == 0 && scores[i].kl + scores[i].kl_error <= tolerance)
      return &scores[i];
  }
  return nullptr;
}

CalibrationReport Calibrate(const CalibrateOptions& options,
                            const std::function<void(int done, int all)>& progress) {
  if (!options.engine.kv_cache_scales.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "--kv-cache-scales: expected none, calibrate makes them (--output)");
  }
  const Halves halves = ReadTokens(options);
  const auto tokens = static_cast<int>(halves.first.size());
  EngineOptions engine = options.engine;
  engine.kv_cache_dtype = "bf16";
  engine.max_num_seqs = 1;
  engine.max_model_len = tokens;
  const int wanted = engine.max_num_batched_tokens.value_or(256);  // whose logits fit in memory
  engine.max_num_batched_tokens = std::max(wanted / kPageSize, 1) * kPageSize;

  const std::vector<Format> formats = {{"bf16", "bf16", ""},
                                       {"fp8", "fp8", ""},
                                       {"fp8, calibrated", "fp8", options.output},
                                       {"int8_per_token_head", "int8_per_token_head", ""},
                                       {"fp8_per_token_head", "fp8_per_token_head", ""}};
  const int chunk = *engine.max_num_batched_tokens;
  const int chunks = (tokens + chunk - 1) / chunk,
            all = chunks * (1 + static_cast<int>(formats.size()));
  int so_far = 0;
  const auto done = [&] {
    if (progress) progress(++so_far, all);
  };

  CalibrationReport report{.tokens = tokens};
  std::shared_ptr<const LoadedModel> model;
  {
    Executor executor(engine);
    model = executor.model();
    report.amax = MeasureAmax(executor, halves.first, chunk, done);
  }
  for (size_t l = 0; l < report.amax.size(); ++l) {
    const LayerAmax& amax = report.amax[l];
    report.scales.push_back({ScalesOf(amax.k, options.margin, fmt::format("layer {}: K", l)),
                             ScalesOf(amax.v, options.margin, fmt::format("layer {}: V", l))});
  }
  WriteScaleFile(options.output, FolderName(engine.model), report.scales);
  report.scores = ScoreFormats(engine, formats, model, halves.second, done);
  report.advice = Advice(report.scores, options.tolerance);
  return report;
}

std::string CalibrationJson(const CalibrationReport& report) {
  nlohmann::ordered_json scores = nlohmann::ordered_json::array(), layers = scores;
  for (const LayerAmax& layer : report.amax)
    layers.push_back({{"k_amax", layer.k}, {"v_amax", layer.v}});
  for (const FormatScore& s : report.scores) {
    scores.push_back({{"name", s.name},
                      {"flags", s.flags},
                      {"bytes_per_token", s.bytes_per_token},
                      {"kl", s.kl},
                      {"kl_error", s.kl_error},
                      {"top1", s.top1},
                      {"log_prob", s.log_prob},
                      {"saturated", s.saturated}});
  }
  const nlohmann::ordered_json json = {{"tokens", report.tokens},
                                       {"layers", layers},
                                       {"formats", scores},
                                       {"advice", report.advice}};
  return json.dump(2) + "\n";
}

std::string CalibrationTable(const CalibrationReport& report) {
  std::string out = fmt::format("{:>5}  {:>22}  {:>22}\n", "layer", "K: amax of its heads",
                                "V: amax of its heads");
  for (size_t l = 0; l < report.amax.size(); ++l) {
    out +=
        fmt::format("{:>5}  {:>22}  {:>22}\n", l, Range(report.amax[l].k), Range(report.amax[l].v));
  }
  out += fmt::format("\n{:<20} {:>12} {:>22} {:>9} {:>10} {:>12}\n", "format", "bytes/token",
                     "KL from bf16", "top-1", "log-prob", "saturated");
  for (const FormatScore& s : report.scores) {
    out += fmt::format("{:<20} {:>12.0f} {:>22} {:>7.1f} % {:>10.4f} {:>12}\n", s.name,
                       s.bytes_per_token, fmt::format("{:.2e} +- {:.0e}", s.kl, s.kl_error),
                       100 * s.top1, s.log_prob, s.saturated);
  }
  return out + fmt::format("\nadvice: {}\n", report.advice);
}

}  // namespace octavo
