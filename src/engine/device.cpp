#include "engine/device.h"

#include <dlfcn.h>

#include <fmt/format.h>

#include "base/error.h"
#include "base/log.h"
#include "kernels/cuda/library.h"

namespace octavo {
namespace {

constexpr const char* kLibrary = "liboctavo_cuda.so";

// Null, and why.
std::unique_ptr<Backend> MakeCudaBackend(std::string& why_not) {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);  // stays open: the backend is its code
  if (!library) {
    why_not = dlerror();
    return nullptr;
  }
  const auto build_id =
      reinterpret_cast<decltype(&octavo_cuda_build_id)>(dlsym(library, "octavo_cuda_build_id"));
  const auto make = reinterpret_cast<decltype(&octavo_make_cuda_backend)>(
      dlsym(library, "octavo_make_cuda_backend"));
  if (!build_id || !make || std::string_view(build_id()) != OCTAVO_BUILD_ID) {
    why_not = fmt::format("{} belongs to another build of Octavo", kLibrary);
    return nullptr;
  }
  char reason[256] = "";
  std::unique_ptr<Backend> backend(make(reason, sizeof(reason)));
  if (!backend) why_not = reason;
  return backend;
}

}  // namespace

std::unique_ptr<Backend> MakeBackend(const std::string& device, int threads) {
  if (device != "auto" && device != "cpu" && device != "cuda") {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--device: expected auto, cpu or cuda, found '{}'", device));
  }
  if (device == "cpu") return MakeCpuBackend(threads);
  std::string why_not;
  if (auto backend = MakeCudaBackend(why_not)) return backend;
  if (device == "cuda")
    throw Error(ErrorCode::kUnsupported, fmt::format("--device cuda: {}", why_not));
  Log(LogLevel::kDebug, fmt::format("no GPU is used: {}", why_not));
  return MakeCpuBackend(threads);
}

}  // namespace octavo
