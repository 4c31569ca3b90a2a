// Errors against double precision as the context grows, printed and judged:
// - prefill against decode, last token: never further apart than twice the larger error of either;
// - FP8 two-level accumulation at any length as good as at 4k, with tensor-core accumulation beside
//   it; 16-bit math over FP8 pages within 1.5 times the error over bfloat16 pages.
#include <cmath>

#include "cuda_batch.h"

namespace octavo::conformance {
namespace {

constexpr int kGroup = 4;

const char* Name(AttentionMath math) {
  const char* const names[] = {"16bit", "fp8", "fp8 tensor-core"};
  return names[static_cast<int>(math)];
}

struct Numbers {
  KvFormat format;
  AttentionMath math;
};

Result LastToken(const Result& result, int heads, int head_dim) {
  const size_t row = size_t(heads) * head_dim;
  return {.out = {result.out.end() - row, result.out.end()},
          .lse = {result.lse.end() - heads, result.lse.end()},
          .failure = result.failure};
}

void PrefillAgreesWithDecode(bool quick, Tally& tally) {
  constexpr int kKvHeads = 8, kHeads = kKvHeads * kGroup;
  const std::vector<int> lengths = quick ? std::vector{1000} : std::vector{1000, 8000, 64000};
  for (int head_dim : {64, 128, 256}) {
    for (const Numbers& numbers : {Numbers{KvFormat::kBF16, AttentionMath::k16Bit},
                                   Numbers{KvFormat::kFp8E4M3, AttentionMath::k16Bit},
                                   Numbers{KvFormat::kFp8E4M3, AttentionMath::kFp8},
                                   Numbers{KvFormat::kInt8PerTokenHead, AttentionMath::k16Bit}}) {
      double first_error = 0;
      for (int length : lengths) {
        const std::string name = std::string("prefill against decode ") +
                                 octavo::Name(numbers.format) + " " + Name(numbers.math) +
                                 " head_dim " + std::to_string(head_dim) + " length " +
                                 std::to_string(length);
        try {
          const DeviceCache cache({.k_format = numbers.format,
                                   .v_format = numbers.format,
                                   .kv_heads = kKvHeads,
                                   .head_dim = head_dim,
                                   .lengths = {length},
                                   .seed = 41});
          StepSpec spec{.group = kGroup, .math = numbers.math, .tokens = {200}, .seed = 41};
          const Result prefill = LastToken(DeviceStep(cache, spec).Run(), kHeads, head_dim);
          spec.tokens = {1};
          DeviceStep decode_step(cache, spec);
          const Result decode = decode_step.Run(), exact = decode_step.Oracle(true);
          const Comparison p = Compare(prefill, exact, head_dim);
          const Comparison d = Compare(decode, exact, head_dim);
          const Comparison between = Compare(prefill, decode, head_dim);
          std::printf("%s: prefill %.2e decode %.2e between %.2e; lse %.1e %.1e %.1e\n",
                      name.c_str(), p.relative_l2, d.relative_l2, between.relative_l2, p.lse, d.lse,
                      between.lse);
          const double worse = std::max(p.relative_l2, d.relative_l2);
          if (first_error == 0) first_error = worse;
          std::string failure = prefill.failure + decode.failure;
          if (!(between.relative_l2 <= 2 * worse)) failure = "further apart than twice the error";
          // Rounding float32 results differs by an ulp or two of the lse.
          if (!(between.lse <= 2 * std::max(p.lse, d.lse) + 1e-6)) failure = "lse further apart";
          if (!(worse <= 1.5 * first_error)) failure = "the error grows with length";
          tally.Count(name, failure);
        } catch (const std::exception& error) {
          tally.Failed(name, error.what());
        }
      }
    }
  }
}

// Relative L2 of a block of queries behind `length` keys.
double Error(const DeviceCache& cache, AttentionMath math, float q_deviation,
             std::string* failure) {
  DeviceStep step(
      cache,
      {.group = kGroup, .math = math, .q_deviation = q_deviation, .tokens = {64}, .seed = 51});
  const Result actual = step.Run();
  if (!actual.failure.empty()) *failure = actual.failure;
  const Comparison comparison = Compare(actual, step.Oracle(), cache.spec().head_dim);
  if (!comparison.finite_alike) *failure = "not finite";
  return comparison.relative_l2;
}

void ErrorStaysWithLength(bool quick, Tally& tally) {
  const std::vector<int> lengths =
      quick ? std::vector{4 << 10} : std::vector{4 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20};
  for (int head_dim : {64, 128, 256}) {
    for (float v_mean : {0.0f, 0.5f}) {
      for (float q_deviation : {0.05f, 4.0f}) {
        const std::string name = "error head_dim " + std::to_string(head_dim) + " V mean " +
                                 (v_mean == 0 ? "0" : "0.5") +
                                 (q_deviation < 1 ? " uniform" : " peaked");
        std::printf("%s (keys: fp8 two-level, tensor-core, 16-bit over fp8, bf16):", name.c_str());
        std::string failure;
        double first = 0;
        try {
          for (int length : lengths) {
            // Where attention is uniform all queries see one and the same sum: a cache is a sample.
            const int samples = length <= 8192 ? 16 : length <= 131072 ? 4 : 2;
            double two_level = 0, collapse = 0, wide = 0, bf16 = 0;  // mean squares, then roots
            for (int sample = 0; sample < samples; ++sample) {
              CacheSpec spec{.k_format = KvFormat::kFp8E4M3,
                             .v_format = KvFormat::kFp8E4M3,
                             .kv_heads = 1,
                             .head_dim = head_dim,
                             .lengths = {length},
                             .v_mean = v_mean,
                             .seed = 61 + static_cast<uint64_t>(sample)};
              const auto fp8 = std::make_unique<DeviceCache>(spec);
              const auto add = [&](double& sum, const DeviceCache& cache, AttentionMath math) {
                sum += std::pow(Error(cache, math, q_deviation, &failure), 2) / samples;
              };
              add(two_level, *fp8, AttentionMath::kFp8);
              add(collapse, *fp8, AttentionMath::kFp8TensorCore);
              add(wide, *fp8, AttentionMath::k16Bit);
              spec.k_format = spec.v_format = KvFormat::kBF16;
              add(bf16, DeviceCache(spec), AttentionMath::k16Bit);
            }
            for (double* x : {&two_level, &collapse, &wide, &bf16}) *x = std::sqrt(*x);
            std::printf(" %dk: %.2f%% %.2f%% %.3f%% %.3f%%", length >> 10, 100 * two_level,
                        100 * collapse, 100 * wide, 100 * bf16);
            if (first == 0) first = two_level;
            // Few samples scatter: by 10 % over 16 of them, twice that over four.
            if (!(two_level <= 1.25 * first)) failure = "FP8's error grows with length";
            if (!(wide <= 1.5 * bf16)) failure = "16-bit math over FP8 is worse than over bfloat16";
          }
        } catch (const std::exception& error) {
          failure = error.what();
        }
        std::printf("\n");
        tally.Count(name, failure);
      }
    }
  }
}

}  // namespace

void CheckAccuracy(bool quick, Tally& tally) {
  PrefillAgreesWithDecode(quick, tally);
  ErrorStaysWithLength(quick, tally);
}

}  // namespace octavo::conformance
