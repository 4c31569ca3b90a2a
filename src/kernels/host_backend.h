// What backends have in common whose memory is the host's.
#pragma once

#include "kernels/backend.h"

namespace octavo {

class HostBackend : public Backend {
 public:
  bool is_host() const override { return true; }
  Memory Allocate(size_t bytes) override;
  Memory AllocateHost(size_t bytes) override { return Allocate(bytes); }
  MemoryInfo memory_info() override;
  void Upload(void* to, const void* from, size_t bytes) override;
  void Download(void* to, const void* from, size_t bytes) override { Upload(to, from, bytes); }
  void Wait() override {}
  void Project(const Tensor& x, std::span<const Projection> projections) override;
};

}  // namespace octavo
