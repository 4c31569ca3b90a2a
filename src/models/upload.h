// Weights in the memory of a backend that is not the host's.
#pragma once

#include "kernels/backend.h"
#include "models/weights.h"

namespace octavo {

// Copies weights to the backend, once each: bfloat16 whatever they were, but sinks and the biases
// of matmuls with float32 outputs, which are float32. Matrices of one input stand next to each
// other (q, k, v; gate, up), and the experts of a layer at equal distances, so that they can be
// read as one. Error: not enough memory.
Weights UploadWeights(const ModelSpec& spec, const Weights& weights, Backend& backend);

}  // namespace octavo
