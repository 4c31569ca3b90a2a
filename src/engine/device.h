// --device: which backend runs the model.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"

namespace octavo {

// "cpu", "cuda", or "auto": CUDA where there is a device that Octavo has kernels for. Error: cuda,
// and there is none; or another word.
std::unique_ptr<Backend> MakeBackend(const std::string& device, int threads);

}  // namespace octavo
