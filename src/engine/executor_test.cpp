// What a device asks of the executor - weights uploaded, steps padded, memory that the host may not
// touch - on a CPU that pretends to be one: the same tokens must come out.
#include "engine/executor.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "models/config.h"

namespace octavo {
namespace {

const std::string kModel = std::string(OCTAVO_SOURCE_DIR) + "/checkpoints/needle";

// The CPU behind a wall: whatever ops are given must lie in memory that was allocated here.
class PretendedDevice final : public Backend {
 public:
  PretendedDevice() : cpu_(MakeCpuBackend(2)) {}
  const char* name() const override { return "pretended"; }

  Memory Allocate(size_t bytes) override {
    Memory memory = cpu_->Allocate(bytes);
    regions_[memory.data()] = bytes;
    return memory;
  }
  Memory AllocateHost(size_t bytes) override { return cpu_->Allocate(bytes); }
  MemoryInfo memory_info() override { return {.free = size_t{3} << 30, .total = size_t{4} << 30}; }
  void Upload(void* to, const void* from, size_t bytes) override {
    Expect(to);
    cpu_->Upload(to, from, bytes);
  }
  void Download(void* to, const void* from, size_t bytes) override {
    Expect(from);
    cpu_->Download(to, from, bytes);
  }
  void Wait() override {}
  double ReadBandwidth() override { return cpu_->ReadBandwidth(); }

  void Gather(const GatherArgs& a) override {
    Expect(a.table, a.ids, a.out);
    cpu_->Gather(a);
  }
  void Norm(const NormArgs& a) override {
    Expect(a.x, a.delta, a.weight, a.out);
    cpu_->Norm(a);
  }
  void MatMul(const MatMulArgs& a) override {
    Expect(a.x, a.weight, a.bias, a.out);
    cpu_->MatMul(a);
  }
  void Project(const Tensor& x, std::span<const Projection> parts) override {
    for (const Projection& p : parts) Expect(x, p.weight, p.bias, p.out);
    cpu_->Project(x, parts);
  }
  void GatedActivation(const GatedActivationArgs& a) override {
    Expect(a.gate, a.up, a.out);
    cpu_->GatedActivation(a);
  }
  void Route(const RouteArgs& a) override { cpu_->Route(a); }
  void Experts(const ExpertsArgs& a) override { cpu_->Experts(a); }
  void RopeTable(const RopeTableArgs& a) override {
    Expect(a.positions, a.inv_freq, a.cos_sin);
    cpu_->RopeTable(a);
  }
  void Append(const AppendArgs& a) override {
    Expect(a.q, a.k, a.v, a.cos_sin, a.batch->slots);
    for (const void* p :
         {static_cast<const void*>(a.cache.arena), static_cast<const void*>(a.cache.k_scale),
          static_cast<const void*>(a.cache.saturated)})
      Expect(p);
    for (int s = 0; s < a.batch->sequences(); ++s) padded_ += a.batch->kv_len[s] == 0;
    cpu_->Append(a);
  }
  std::unique_ptr<AttentionPlan> PlanAttention(const AttentionPlanSpec& spec) override {
    return cpu_->PlanAttention(spec);
  }
  void Attention(const AttentionArgs& a) override {
    Expect(a.q, a.out, a.batch->block_table);
    cpu_->Attention(a);
  }
  void Sample(const SampleArgs& a) override {
    Expect(a.logits);
    cpu_->Sample(a);
  }

  int64_t padded() const { return padded_; }

 private:
  template <class... Tensors>
  void Expect(const Tensor& first, const Tensors&... rest) {
    if (first) Expect(first.data);
    (Expect(rest), ...);
  }
  void Expect(const void* p) {
    const auto next = regions_.upper_bound(static_cast<const std::byte*>(p));
    ASSERT_TRUE(next != regions_.begin() &&
                static_cast<const std::byte*>(p) < std::prev(next)->first + std::prev(next)->second)
        << "memory of the host given to an op";
  }

  std::unique_ptr<Backend> cpu_;
  std::map<const std::byte*, size_t> regions_;
  int64_t padded_ = 0;
};

EngineOptions Options() {
  return {.model = kModel,
          .device = "cpu",
          .kv_cache_dtype = "fp8",
          .kv_cache_memory_bytes = 64 << 20,
          .max_model_len = 1024,
          .max_num_seqs = 5,
          .max_num_batched_tokens = 64,
          .threads = 2};
}

// Greedy continuations of prompts of different lengths, decoded together.
std::vector<std::vector<int32_t>> Continue(Executor& executor) {
  std::mt19937 random(3);
  std::vector<std::vector<int32_t>> texts;
  std::vector<SequencePages> pages;
  for (int length : {3, 64, 65, 130, 20}) {
    std::vector<int32_t>& text = texts.emplace_back();
    for (int i = 0; i < length; ++i) text.push_back(static_cast<int32_t>(random() % 200));
    pages.push_back(executor.pool().Acquire({}));
  }
  Batch batch = executor.MakeBatch();
  const auto run = [&](size_t first, size_t last, bool sample) {
    for (size_t i = first; i < last; ++i) {
      SequencePages& p = pages[i];
      const int64_t begin = p.written();
      const int count = static_cast<int>(std::min<int64_t>(64, std::ssize(texts[i]) - begin));
      EXPECT_TRUE(p.Extend(begin + count));
      const int row = batch.Add(texts[i], begin, count, p);
      if (sample) batch.AddSample(row + count - 1, {});
    }
    const std::vector<SampledToken> sampled = executor.Execute(batch);
    for (size_t i = first; i < last; ++i) {
      pages[i].Publish(texts[i], std::min<int64_t>(pages[i].written() + 64, std::ssize(texts[i])));
      if (sample) texts[i].push_back(sampled[i - first].id);
    }
    batch.Clear();
  };
  for (size_t i = 0; i < texts.size(); ++i) {
    while (std::ssize(texts[i]) - pages[i].written() > 64) run(i, i + 1, false);
    run(i, i + 1, true);
  }
  for (int step = 0; step < 10; ++step) run(0, texts.size(), true);
  return texts;
}

TEST(Executor, ADeviceGivesWhatTheHostGives) {
  Executor host(Options());
  auto device = std::make_unique<PretendedDevice>();
  const PretendedDevice& seen = *device;
  Executor pretended(Options(), ReadModelSpec(kModel), std::move(device));
  EXPECT_EQ(Continue(pretended), Continue(host));
  EXPECT_GT(seen.padded(), 0);  // five sequences ran as eight

  const std::vector<LayerHealth> a = host.ReadHealth(), b = pretended.ReadHealth();
  for (size_t l = 0; l < a.size(); ++l) {
    EXPECT_GT(a[l].amax[0], 0);
    EXPECT_EQ(a[l].amax[0], b[l].amax[0]);
    EXPECT_EQ(a[l].amax[1], b[l].amax[1]);
  }
}

TEST(Executor, TheCacheTakesWhatUtilisationLeaves) {
  EngineOptions options = Options();
  options.kv_cache_memory_bytes = 0;
  options.gpu_memory_utilization = 0.75;
  // 3 of 4 GiB, of which 1 is taken and 1 is kept for plans and graphs.
  Executor executor(options, ReadModelSpec(kModel), std::make_unique<PretendedDevice>());
  EXPECT_GT(executor.cache_bytes(), int64_t{900} << 20);
  EXPECT_LT(executor.cache_bytes(), int64_t{1} << 30);

  options.gpu_memory_utilization = 0.3;
  EXPECT_THROW(Executor(options, ReadModelSpec(kModel), std::make_unique<PretendedDevice>()),
               std::exception);
}

}  // namespace
}  // namespace octavo
