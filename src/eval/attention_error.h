// What a cache format and its attention math do to attention's output, layer by layer and head by
// head.
//
// Errors of one layer would change the inputs of the next, and what is seen there would be the sum
// of all. So every variant goes on with the reference's attention outputs: queries, keys and values
// that enter a layer are the reference's in every variant, for all tokens, and the error is that
// layer's own: of its stored keys and values and of its arithmetic.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "octavo/engine.h"

namespace octavo {

using HeadErrors = std::vector<std::vector<double>>;  // [layers][heads], relative L2; infinite: NaN

// The errors are those of this many positions, the last of a prompt: its longest contexts.
constexpr int64_t kAttentionErrorPositions = 128;

// Runs each prompt once per variant, in chunks of max_num_batched_tokens, which must be the same in
// all variants; decode steps are not run. The first variant is the reference.
// Returns [prompts][variants after the first]. Called after each prompt: `done`.
std::vector<std::vector<HeadErrors>> MeasureAttentionErrors(
    std::span<const EngineOptions> variants, const std::shared_ptr<const LoadedModel>& model,
    std::span<const std::vector<int32_t>> prompts, const std::function<void()>& done);

}  // namespace octavo
