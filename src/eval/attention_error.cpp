#include "eval/attention_error.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include <fmt/format.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "engine/executor.h"
#include "eval/pass.h"
#include "eval/relative_error.h"

namespace octavo {
namespace {

// One variant's run over one prompt.
struct Variant {
  explicit Variant(Executor& executor) : backend(executor.backend()), pass(executor) {}

  std::vector<std::byte> Download(const Tensor& tensor) {
    std::vector<std::byte> bytes(tensor.size() * SizeOf(tensor.dtype));
    backend.Download(bytes.data(), tensor.data, bytes.size());
    return bytes;
  }

  Backend& backend;
  Pass pass;
};

std::vector<float> Floats(std::span<const std::byte> bytes, DType dtype) {
  std::vector<float> values(bytes.size() / SizeOf(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  OCTAVO_CHECK(dtype == DType::kBF16, Name(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, bytes.data() + i * sizeof(bits), sizeof(bits));
    values[i] = BF16ToFloat(bits);
  }
  return values;
}

using HeadSums = std::vector<std::vector<RelativeError>>;  // [layers][heads]

HeadSums NoErrors(const ModelSpec& spec) {
  HeadSums sums;
  for (const LayerSpec& layer : spec.layers) sums.emplace_back(layer.heads);
  return sums;
}

HeadErrors Values(const HeadSums& sums) {
  HeadErrors errors;
  for (const auto& layer : sums) {
    std::vector<double>& heads = errors.emplace_back();
    for (const RelativeError& sum : layer) {
      const double error = sum.value();
      heads.push_back(std::isnan(error) ? INFINITY : error);  // an output that is no number
    }
  }
  return errors;
}

// Rows [first, ...) of `layer`'s outputs: [tokens, heads * head_dim].
void AddRows(std::vector<RelativeError>& layer, int64_t first, std::span<const float> found,
             std::span<const float> expected, int head_dim) {
  const size_t heads = layer.size(), row = heads * head_dim;
  for (size_t at = first * row; at < found.size(); at += row) {
    for (size_t h = 0; h < heads; ++h) {
      const size_t begin = at + h * head_dim;
      layer[h].Add(found.subspan(begin, head_dim), expected.subspan(begin, head_dim));
    }
  }
}

// Chunk by chunk through all variants, so that one chunk's reference is kept at a time.
std::vector<HeadErrors> Measure(std::span<const std::unique_ptr<Executor>> executors,
                                std::span<const int32_t> prompt, int chunk) {
  const ModelSpec& spec = executors[0]->spec();
  std::vector<Variant> variants;
  for (const auto& executor : executors) variants.emplace_back(*executor);
  std::vector<HeadSums> sums(executors.size() - 1, NoErrors(spec));

  const int64_t tokens = std::ssize(prompt);
  std::vector<std::vector<std::byte>> expected(spec.layers.size());
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int count = static_cast<int>(std::min<int64_t>(chunk, tokens - begin));
    const int64_t first = std::max<int64_t>(0, tokens - kAttentionErrorPositions - begin);
    const StepObserver keep{.attended = [&](int l, const Tensor& attended) {
      expected[l] = variants[0].Download(attended);
    }};
    variants[0].pass.Run(prompt, count, 0, nullptr, keep);
    for (size_t v = 0; v < sums.size(); ++v) {
      Variant& variant = variants[v + 1];
      const StepObserver compare{.attended = [&](int l, const Tensor& attended) {
        if (first < count) {
          AddRows(sums[v][l], first, Floats(variant.Download(attended), attended.dtype),
                  Floats(expected[l], attended.dtype), spec.layers[l].head_dim);
        }
        variant.backend.Upload(attended.data, expected[l].data(), expected[l].size());
      }};
      variant.pass.Run(prompt, count, 0, nullptr, compare);
    }
  }
  std::vector<HeadErrors> errors;
  for (const HeadSums& variant : sums) errors.push_back(Values(variant));
  return errors;
}

}  // namespace

std::vector<std::vector<HeadErrors>> MeasureAttentionErrors(
    std::span<const EngineOptions> variants, const std::shared_ptr<const LoadedModel>& model,
    std::span<const std::vector<int32_t>> prompts, const std::function<void()>& done) {
  std::vector<std::unique_ptr<Executor>> executors;
  for (const EngineOptions& options : variants) {
    OCTAVO_CHECK(options.max_num_batched_tokens == variants[0].max_num_batched_tokens);
    executors.push_back(std::make_unique<Executor>(options, model));
  }
  std::vector<std::vector<HeadErrors>> errors;
  for (const std::vector<int32_t>& prompt : prompts) {
    errors.push_back(Measure(executors, prompt, executors[0]->max_num_batched_tokens()));
    done();
  }
  return errors;
}

}  // namespace octavo
