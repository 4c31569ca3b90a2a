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

// The CPU behind a wall: whatever ops are given must lie in memory that was allocated here and not
// given back, and a step may be recorded and run again.
class PretendedDevice final : public Backend {
 public:
  PretendedDevice() : cpu_(MakeCpuBackend(2)) {}
  const char* name() const override { return "pretended"; }
  double ReadBandwidth() override { return cpu_->ReadBandwidth(); }

  Memory Allocate(size_t bytes) override {
    // Kept when it is given back, so that nobody gets the same addresses again by chance.
    kept_.push_back(cpu_->Allocate(bytes));
    std::byte* data = kept_.back().data();
    regions_[data] = bytes;
    return Memory(data, bytes, [this](std::byte* p) { regions_.erase(p); });
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
  std::unique_ptr<Graph> Record(const std::function<void()>& body) override {
    auto graph = std::make_unique<Recording>();
    recording_ = graph.get();
    body();
    recording_ = nullptr;
    graph->replays = &replays_;
    return graph;
  }

  void Gather(const GatherArgs& a) override {
    Do([this, a] {
      Expect(a.table, a.ids, a.out);
      cpu_->Gather(a);
    });
  }
  void Norm(const NormArgs& a) override {
    Do([this, a] {
      Expect(a.x, a.delta, a.weight, a.out);
      cpu_->Norm(a);
    });
  }
  void MatMul(const MatMulArgs& a) override {
    Do([this, a] {
      Expect(a.x, a.weight, a.bias, a.out);
      cpu_->MatMul(a);
    });
  }
  void Project(const Tensor& x, std::span<const Projection> parts) override {
    for (const Projection& p : parts) MatMul({x, p.weight, p.bias, p.out});
  }
  void GatedActivation(const GatedActivationArgs& a) override {
    Do([this, a] {
      Expect(a.gate, a.up, a.out);
      cpu_->GatedActivation(a);
    });
  }
  void Route(const RouteArgs&) override { FAIL() << "this model has no experts"; }
  void Experts(const ExpertsArgs&) override { FAIL() << "this model has no experts"; }
  void RopeTable(const RopeTableArgs& a) override {
    Do([this, a] {
      Expect(a.positions, a.inv_freq, a.cos_sin);
      cpu_->RopeTable(a);
    });
  }
  void Append(const AppendArgs& args) override {
    Do([this, a = args, batch = *args.batch]() mutable {
      a.batch = &batch;  // of which only the tensors are read
      Expect(a.q, a.k, a.v, a.cos_sin, batch.slots);
      for (const void* p :
           {static_cast<const void*>(a.cache.arena), static_cast<const void*>(a.cache.k_scale),
            static_cast<const void*>(a.cache.saturated)})
        Expect(p);
      for (int row = 0; row < batch.tokens; ++row) padded_ += batch.slots.Row<int64_t>(0)[row] < 0;
      cpu_->Append(a);
    });
  }
  std::unique_ptr<AttentionPlan> PlanAttention(const AttentionPlanSpec& spec) override {
    return std::make_unique<PretendedPlan>(spec.shape, cpu_->PlanAttention(spec));
  }
  void Attention(const AttentionArgs& args) override {
    Do([this, a = args, table = args.batch->block_table] {
      const auto* plan = static_cast<const PretendedPlan*>(a.plan);
      Expect(a.q, a.out, table);
      AttentionArgs now = a;
      BatchView batch = plan->batch();  // lengths as last planned, tables where they were recorded
      batch.block_table = table;
      now.batch = &batch;
      now.plan = plan->inner();
      cpu_->Attention(now);
    });
  }
  void Sample(const SampleArgs& a) override {
    Expect(a.logits);
    cpu_->Sample(a);
  }

  int64_t padded() const { return padded_; }
  int64_t replays() const { return replays_; }

 private:
  struct Recording final : Graph {
    std::vector<std::function<void()>> ops;
    int64_t* replays = nullptr;
    void Run() override {
      ++*replays;
      for (const auto& op : ops) op();
    }
  };

  // Keeps what a device's work lists would hold.
  class PretendedPlan final : public AttentionPlan {
   public:
    PretendedPlan(const AttentionShape& shape, std::unique_ptr<AttentionPlan> inner)
        : AttentionPlan(shape), inner_(std::move(inner)) {}
    void Make(const BatchView& batch) override {
      inner_->Make(batch);
      q_begin_.assign(batch.q_begin.begin(), batch.q_begin.end());
      kv_len_.assign(batch.kv_len.begin(), batch.kv_len.end());
      tokens_ = batch.tokens;
    }
    BatchView batch() const {
      return {.tokens = tokens_, .q_begin = q_begin_, .kv_len = kv_len_, .slots = {}};
    }
    const AttentionPlan* inner() const { return inner_.get(); }

   private:
    std::unique_ptr<AttentionPlan> inner_;
    std::vector<int32_t> q_begin_, kv_len_;
    int tokens_ = 0;
  };

  void Do(std::function<void()> op) {
    recording_ ? recording_->ops.push_back(std::move(op)) : op();
  }
  template <class... Tensors>
  void Expect(const Tensor& first, const Tensors&... rest) {
    if (first) Expect(first.data);
    (Expect(rest), ...);
  }
  void Expect(const void* p) {
    const auto next = regions_.upper_bound(static_cast<std::byte*>(const_cast<void*>(p)));
    ASSERT_TRUE(next != regions_.begin() &&
                static_cast<const std::byte*>(p) < std::prev(next)->first + std::prev(next)->second)
        << "memory that is not the device's, or no longer";
  }

  std::unique_ptr<Backend> cpu_;
  std::vector<Memory> kept_;
  std::map<std::byte*, size_t> regions_;
  Recording* recording_ = nullptr;
  int64_t padded_ = 0, replays_ = 0;
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
  const auto expected = Continue(host);
  EXPECT_EQ(Continue(pretended), expected);
  EXPECT_GT(seen.padded(), 0);   // five sequences ran as eight
  EXPECT_GT(seen.replays(), 5);  // and most of the ten steps as a graph
  // Another batch, whose arrays are elsewhere.
  EXPECT_EQ(Continue(pretended), expected);

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
