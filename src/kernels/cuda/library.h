// What the program looks up in liboctavo_cuda.so.
#pragma once

#include <cstddef>

#include "kernels/backend.h"

extern "C" {

// OCTAVO_BUILD_ID of the library: a hash of the headers that program and library share.
const char* octavo_cuda_build_id();

// The current device's backend; null, and why in `reason`, if there is none.
octavo::Backend* octavo_make_cuda_backend(char* reason, size_t reason_bytes);
}
