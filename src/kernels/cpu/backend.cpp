#include "kernels/cpu/append.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/bandwidth.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/moe.h"
#include "kernels/cpu/sampling.h"
#include "kernels/host_backend.h"

namespace octavo {
namespace {

class CpuBackend final : public HostBackend {
 public:
  explicit CpuBackend(int threads) : pool_(threads) {}

  const char* name() const override { return "cpu"; }
  double ReadBandwidth() override { return cpu::ReadBandwidth(pool_, 0.5); }

  void Gather(const GatherArgs& args) override { cpu::Gather(args, pool_); }
  void Norm(const NormArgs& args) override { cpu::Norm(args, pool_); }
  void MatMul(const MatMulArgs& args) override { cpu::MatMul(args, pool_, matmul_scratch_); }
  void GatedActivation(const GatedActivationArgs& args) override {
    cpu::GatedActivation(args, pool_);
  }
  void Route(const RouteArgs& args) override { cpu::Route(args, pool_); }
  void Experts(const ExpertsArgs& args) override { cpu::Experts(args, pool_, experts_scratch_); }
  void RopeTable(const RopeTableArgs& args) override { cpu::RopeTable(args, pool_); }
  void Append(const AppendArgs& args) override { cpu::Append(args, pool_); }
  std::unique_ptr<AttentionPlan> PlanAttention(const AttentionPlanSpec& spec) override {
    return std::make_unique<cpu::WorkPlan>(spec.shape, pool_.threads());
  }
  void Attention(const AttentionArgs& args) override {
    cpu::Attention(args, pool_, attention_workspace_);
  }
  void Sample(const SampleArgs& args) override { cpu::Sample(args, pool_, sample_workers_); }

 private:
  ThreadPool pool_;
  cpu::MatMulScratch matmul_scratch_;
  cpu::ExpertsScratch experts_scratch_;
  Buffer attention_workspace_;
  std::vector<cpu::SampleWorker> sample_workers_;
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(int threads) {
  return std::make_unique<CpuBackend>(threads);
}

}  // namespace octavo
