// Weights in the memory of a backend that is not the host's.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels/backend.h"
#include "models/weights.h"

namespace octavo {

// Bytes that are there, of so many; called on the thread that uploads.
using UploadProgress = std::function<void(int64_t done, int64_t all)>;

// Copies weights to the backend, once each: bfloat16 whatever they were, but MXFP4, which stays,
// and sinks and the biases of matmuls with float32 outputs, which are float32. Matrices of one
// input stand next to each other (q, k, v; gate, up), and the experts of a layer at equal
// distances, so that they can be read as one. They go by way of two buffers of memory that the
// device reads by itself: while one is on its way, `threads` (0: all) read and convert into the
// other. Error: not enough memory.
Weights UploadWeights(const ModelSpec& spec, const Weights& weights, Backend& backend, int threads,
                      const UploadProgress& progress = nullptr);

}  // namespace octavo
