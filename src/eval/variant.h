// How evaluations and benchmarks name what they compare: FORMAT[:MATH][/SKIP].
//
//   bf16    fp8    fp8:16bit    fp8/sliding_window    fp8:fp8_tensor_core/first:2
//
// FORMAT is a --kv-cache-dtype, MATH an --attention-math, SKIP one --kv-cache-dtype-skip-layers.
#pragma once

#include <string_view>

#include "octavo/engine.h"

namespace octavo {

// `options` with what the variant says. What is wrong in its words is found by Engine::Create.
EngineOptions WithVariant(EngineOptions options, std::string_view variant);

}  // namespace octavo
