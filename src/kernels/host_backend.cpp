#include "kernels/host_backend.h"

#include <unistd.h>

#include <cstring>
#include <new>

namespace octavo {

Memory HostBackend::Allocate(size_t bytes) {
  // Linux lends more than there is, and kills whoever uses it.
  if (bytes > memory_info().total) return Memory();
  try {
    auto buffer = std::make_shared<Buffer>(bytes);
    return Memory(buffer->data(), bytes, [buffer](std::byte*) {});
  } catch (const std::bad_alloc&) {
    return Memory();
  }
}

MemoryInfo HostBackend::memory_info() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return {.free = static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES)) * page,
          .total = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page};
}

void HostBackend::Upload(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // of nothing, either may be null
}

void HostBackend::Project(const Tensor& x, std::span<const Projection> projections) {
  for (const Projection& p : projections)
    MatMul({.x = x, .weight = p.weight, .bias = p.bias, .out = p.out});
}

}  // namespace octavo
