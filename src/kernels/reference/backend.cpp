#include "kernels/host_backend.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/ops.h"

namespace octavo {
namespace {

class ReferenceBackend final : public HostBackend {
 public:
  const char* name() const override { return "reference"; }
  double ReadBandwidth() override { return 0; }  // speed is not its business

  void Gather(const GatherArgs& args) override { reference::Gather(args); }
  void Norm(const NormArgs& args) override { reference::Norm(args); }
  void MatMul(const MatMulArgs& args) override { reference::MatMul(args); }
  void GatedActivation(const GatedActivationArgs& args) override {
    reference::GatedActivation(args);
  }
  void Route(const RouteArgs& args) override { reference::Route(args); }
  void Experts(const ExpertsArgs& args) override { reference::Experts(args); }
  void RopeTable(const RopeTableArgs& args) override { reference::RopeTable(args); }
  void Append(const AppendArgs& args) override { reference::Append(args); }
  std::unique_ptr<AttentionPlan> PlanAttention(const AttentionPlanSpec& spec) override {
    return std::make_unique<reference::NoPlan>(spec.shape);
  }
  void Attention(const AttentionArgs& args) override { reference::Attention(args); }
  void Sample(const SampleArgs& args) override { reference::Sample(args); }
};

}  // namespace

std::unique_ptr<Backend> MakeReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace octavo
