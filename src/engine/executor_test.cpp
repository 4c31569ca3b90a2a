// What a device asks of the executor - weights uploaded, steps padded, memory that the host may not
// touch - on a CPU that pretends to be one: the same tokens must come out.
#include "engine/executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <random>

#include "base/float_bits.h"
#include "io/checkpoint.h"
#include "io/testing.h"
#include "models/config.h"
#include "models/upload.h"

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
  Memory AllocateHost(size_t bytes) override {
    kept_.push_back(cpu_->Allocate(bytes));
    std::byte* data = kept_.back().data();
    host_[data] = bytes;
    return Memory(data, bytes, [this](std::byte* p) {
      EXPECT_TRUE(on_their_way_.empty()) << "memory given back that a copy may still read";
      host_.erase(p);
    });
  }
  MemoryInfo memory_info() override { return {.free = size_t{3} << 30, .total = size_t{4} << 30}; }
  void Upload(void* to, const void* from, size_t bytes) override {
    Expect(to);
    on_their_way_.push_back([=, this] { cpu_->Upload(to, from, bytes); });
    if (!In(host_, from)) Wait();
  }
  void Download(void* to, const void* from, size_t bytes) override {
    Expect(from);
    Wait();
    cpu_->Download(to, from, bytes);
  }
  // Copies from AllocateHost's memory read it as late as they may.
  void Wait() override {
    for (const auto& copy : on_their_way_) copy();
    on_their_way_.clear();
  }
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
      Expect(a.x, a.weight, a.out);
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
  void Route(const RouteArgs& a) override {
    Do([this, a] {
      Expect(a.logits, a.ids, a.weights);
      cpu_->Route(a);
    });
  }
  void Experts(const ExpertsArgs& a) override {
    Do([this, a] {
      Expect(a.x, a.ids, a.weights, a.out);
      for (const Expert& e : a.experts)
        Expect(e.gate, e.up, e.down, e.gate_bias, e.up_bias, e.down_bias);
      cpu_->Experts(a);
    });
  }
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
    Wait();
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
    const auto in_order = [this, op = std::move(op)] {
      Wait();
      op();
    };
    recording_ ? recording_->ops.push_back(in_order) : in_order();
  }
  template <class... Tensors>
  void Expect(const Tensor& first, const Tensors&... rest) {
    if (first) Expect(first.data);
    (Expect(rest), ...);
  }
  void Expect(const void* p) {
    ASSERT_TRUE(In(regions_, p)) << "memory that is not the device's, or no longer";
  }
  using Regions = std::map<const std::byte*, size_t>;
  static bool In(const Regions& regions, const void* p) {
    const auto next = regions.upper_bound(static_cast<const std::byte*>(p));
    return next != regions.begin() &&
           static_cast<const std::byte*>(p) < std::prev(next)->first + std::prev(next)->second;
  }

  std::unique_ptr<Backend> cpu_;
  std::vector<Memory> kept_;
  Regions regions_, host_;
  std::vector<std::function<void()>> on_their_way_;
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
      if (sample) batch.AddSample(row + count - 1, {}, 2);
    }
    std::vector<Ranking> rankings;
    const std::vector<SampledToken> sampled = executor.Execute(batch, &rankings);
    for (size_t i = first; i < last; ++i) {
      pages[i].Publish(texts[i], std::min<int64_t>(pages[i].written() + 64, std::ssize(texts[i])));
      if (!sample) continue;
      texts[i].push_back(sampled[i - first].id);
      const Ranking& ranking = rankings[i - first];
      EXPECT_EQ(ranking.rank, 1);
      EXPECT_EQ(ranking.top.at(0).token, sampled[i - first].id);
      EXPECT_NEAR(ranking.top.at(0).logprob, sampled[i - first].logprob, 1e-5);
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
  EngineOptions options = Options();
  options.enforce_eager = true;
  auto eager = std::make_unique<PretendedDevice>();
  const PretendedDevice& unrecorded = *eager;
  Executor plain(options, ReadModelSpec(kModel), std::move(eager));
  EXPECT_EQ(Continue(plain), expected);
  EXPECT_EQ(unrecorded.replays(), 0);
  // Another batch, whose arrays are elsewhere.
  EXPECT_EQ(Continue(pretended), expected);

  const std::vector<LayerHealth> a = host.ReadHealth(), b = pretended.ReadHealth();
  for (size_t l = 0; l < a.size(); ++l) {
    EXPECT_GT(a[l].amax[0], 0);
    EXPECT_EQ(a[l].amax[0], b[l].amax[0]);
    EXPECT_EQ(a[l].amax[1], b[l].amax[1]);
  }
}

// What an observer sees of attention in a prompt's two chunks, and the logits after it zeroed one
// layer's output, negated another's.
struct Observed {
  std::vector<std::vector<uint16_t>> attended;
  std::vector<float> logits;
  bool operator==(const Observed&) const = default;
};
Observed Disturb(Executor& executor, bool disturb) {
  std::vector<int32_t> text;
  for (int i = 0; i < 100; ++i) text.push_back(40 + i * i % 80);
  SequencePages pages = executor.pool().Acquire({});
  Batch batch = executor.MakeBatch();
  Backend& backend = executor.backend();
  Observed seen;
  for (const auto& [begin, count] : {std::pair{0, 64}, {64, 36}}) {
    EXPECT_TRUE(pages.Extend(begin + count));
    batch.Clear();
    batch.Add(text, begin, count, pages);
    batch.AddSample(count - 1, {});
    const auto take = [&](size_t, const Tensor& logits) {
      const size_t before = seen.logits.size();
      seen.logits.resize(before + logits.size());
      backend.Download(seen.logits.data() + before, logits.data, logits.size() * sizeof(float));
    };
    executor.Run(batch, take, {.attended = [&](int layer, const Tensor& tensor) {
                   std::vector<uint16_t>& values = seen.attended.emplace_back(tensor.size());
                   backend.Download(values.data(), tensor.data, values.size() * sizeof(uint16_t));
                   std::vector<uint16_t> changed = values;
                   for (uint16_t& bits : changed)
                     bits = layer == 0 ? 0 : layer == 2 ? bits ^ 0x8000 : bits;
                   if (disturb)
                     backend.Upload(tensor.data, changed.data(), changed.size() * sizeof(uint16_t));
                 }});
    pages.Publish(text, begin + count);
  }
  return seen;
}

TEST(Executor, AnObserverSeesAndChangesAttentionOnADevice) {
  Executor host(Options());
  Executor pretended(Options(), ReadModelSpec(kModel), std::make_unique<PretendedDevice>());
  const Observed plain = Disturb(host, false), disturbed = Disturb(host, true);
  EXPECT_EQ(Disturb(pretended, false), plain);
  EXPECT_EQ(Disturb(pretended, true), disturbed);
  ASSERT_EQ(plain.attended.size(), 8u);  // two chunks of four layers
  EXPECT_EQ(disturbed.attended[0], plain.attended[0]);
  EXPECT_NE(disturbed.attended[1], plain.attended[1]);
  EXPECT_NE(disturbed.logits, plain.logits);
}

// Any type, rows apart by more than their length where `gap` is given.
Tensor Noise(std::vector<Buffer>& owned, std::mt19937& random, DType dtype, int64_t rows,
             int64_t columns, int64_t gap = 0) {
  owned.emplace_back(rows * (columns + gap) * SizeOf(dtype));
  Tensor tensor(owned.back().data(), dtype, {rows, columns});
  tensor.row_stride = columns + gap;
  for (size_t i = 0; i < owned.back().size() / sizeof(uint16_t); ++i)
    reinterpret_cast<uint16_t*>(owned.back().data())[i] = static_cast<uint16_t>(random());
  return tensor;
}

float ValueAt(const Tensor& t, int64_t row, int64_t column) {
  if (t.dtype == DType::kF32) return t.Row<float>(row)[column];
  const uint16_t bits = t.Row<uint16_t>(row)[column];
  return t.dtype == DType::kF16 ? Float16::Decode(bits) : BF16ToFloat(bits);
}

// `there` is `here` as `dtype`, to the bit but for which NaN it is.
void ExpectUploaded(const Tensor& here, const Tensor& there, DType dtype) {
  ASSERT_EQ(there.dtype, dtype);
  ASSERT_EQ(ShapeString(there),
            ShapeString(Tensor(there.data, dtype, {here.rows(), here.columns()})));
  ASSERT_TRUE(there.contiguous());
  int64_t wrong = 0;
  for (int64_t row = 0; row < here.rows(); ++row) {
    for (int64_t column = 0; column < here.columns(); ++column) {
      float expected = ValueAt(here, row, column);
      if (dtype == DType::kBF16) expected = BF16ToFloat(FloatToBF16(expected));
      const float found = ValueAt(there, row, column);
      wrong += std::isnan(expected)
                   ? !std::isnan(found)
                   : std::bit_cast<uint32_t>(expected) != std::bit_cast<uint32_t>(found);
    }
  }
  EXPECT_EQ(wrong, 0) << ShapeString(here);
}

TEST(Upload, EveryTypeArrivesInStretchesThatFollowEachOther) {
  std::mt19937 random(5);
  Weights here;
  const auto noise = [&](DType dtype, int64_t rows, int64_t columns, int64_t gap = 0) {
    return Noise(here.owned, random, dtype, rows, columns, gap);
  };
  // Bytes as bfloat16: 18 MiB and 36 MiB, of which 16 are sent at a time.
  here.embedding = noise(DType::kF32, 9001, 1024);
  here.lm_head = noise(DType::kF32, 18001, 1024, 3);
  here.final_norm = noise(DType::kF16, 1, 77);
  LayerWeights& layer = here.layers.emplace_back();
  layer.q = noise(DType::kF32, 33, 65, 5);
  layer.k = noise(DType::kF16, 7, 65, 1);
  layer.v = noise(DType::kBF16, 9, 65, 2);
  layer.q_bias = noise(DType::kBF16, 1, 33);
  layer.k_bias = noise(DType::kF16, 1, 7);
  layer.v_bias = noise(DType::kF32, 1, 9);
  layer.o = noise(DType::kF16, 700, 1500);  // more than a piece
  layer.sinks = noise(DType::kBF16, 1, 5);
  for (int i = 0; i < 3; ++i) {
    layer.experts.push_back({.gate = noise(DType::kBF16, 6, 10, 10),
                             .up = noise(DType::kBF16, 6, 10, 10),
                             .down = noise(DType::kBF16, 10, 6)});
  }

  PretendedDevice device;
  std::vector<int64_t> progress;
  int64_t total = 0;
  const Weights there =
      UploadWeights({}, here, device, /*threads=*/3, [&](int64_t done, int64_t all) {
        progress.push_back(done);
        total = all;
      });
  ExpectUploaded(here.embedding, there.embedding, DType::kBF16);
  ExpectUploaded(here.lm_head, there.lm_head, DType::kBF16);
  ExpectUploaded(here.final_norm, there.final_norm, DType::kBF16);
  const LayerWeights& arrived = there.layers[0];
  for (Tensor LayerWeights::*matrix :
       {&LayerWeights::q, &LayerWeights::k, &LayerWeights::v, &LayerWeights::o})
    ExpectUploaded(layer.*matrix, arrived.*matrix, DType::kBF16);
  for (Tensor LayerWeights::*vector :
       {&LayerWeights::q_bias, &LayerWeights::k_bias, &LayerWeights::v_bias, &LayerWeights::sinks})
    ExpectUploaded(layer.*vector, arrived.*vector, DType::kF32);
  EXPECT_EQ(arrived.k.data, arrived.q.Row<uint16_t>(33));
  EXPECT_EQ(arrived.v.data, arrived.k.Row<uint16_t>(7));
  EXPECT_FALSE(arrived.router);
  for (int i = 0; i < 3; ++i) {
    const Expert &from = layer.experts[i], &to = arrived.experts[i];
    ExpectUploaded(from.gate, to.gate, DType::kBF16);
    ExpectUploaded(from.up, to.up, DType::kBF16);
    ExpectUploaded(from.down, to.down, DType::kBF16);
    EXPECT_EQ(to.gate.data, arrived.experts[0].gate.Row<uint16_t>(0) + i * 3 * 60);
  }

  ASSERT_EQ(progress.size(), 5);  // four stretches, and the end
  EXPECT_EQ(progress.front(), 0);
  EXPECT_TRUE(std::is_sorted(progress.begin(), progress.end()));
  EXPECT_LT(progress[3], total);
  EXPECT_EQ(progress.back(), total);
  EXPECT_EQ(total, static_cast<int64_t>(there.device.size()));
}

// The golden gpt_oss with experts of random MXFP4 blocks, as such and widened to bfloat16.
struct Mxfp4Models {
  TempFolder packed, widened;

  Mxfp4Models() {
    const std::filesystem::path golden =
        std::filesystem::path(OCTAVO_SOURCE_DIR) / "tests/golden/gpt_oss";
    const Checkpoint checkpoint = Checkpoint::Open(golden);
    std::vector<TestTensor> a, b;
    for (const auto& [name, tensor] : checkpoint.tensors()) {
      EXPECT_EQ(tensor.dtype, DType::kBF16) << name;
      if (tensor.rank == 3) {
        AddStack(name, tensor.shape[0], tensor.shape[1], tensor.shape[2], a, b);
        continue;
      }
      std::vector<int64_t> shape(tensor.shape.begin(), tensor.shape.begin() + tensor.rank);
      const uint16_t* values = tensor.Row<uint16_t>(0);
      a.push_back(MakeTestTensor(name, "BF16", shape,
                                 std::vector<uint16_t>(values, values + tensor.size())));
      b.push_back(a.back());
    }
    packed.Write("model.safetensors", SafetensorsFile(a));
    widened.Write("model.safetensors", SafetensorsFile(b));
    std::ifstream file(golden / "config.json");
    Json config = Json::parse(file);
    widened.Write("config.json", config.dump());
    config["quantization_config"] = {{"quant_method", "mxfp4"}};
    packed.Write("config.json", config.dump());
  }

 private:
  void AddStack(const std::string& name, int64_t experts, int64_t in, int64_t out,
                std::vector<TestTensor>& a, std::vector<TestTensor>& b) {
    constexpr float kValues[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    std::vector<uint8_t> blocks(experts * out * in / 2), scales(experts * out * in / 32);
    for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(random_());
    for (uint8_t& scale : scales) scale = static_cast<uint8_t>(119 + random_() % 6);
    std::vector<uint16_t> stack(experts * in * out);
    for (int64_t row = 0; row < experts * out; ++row) {
      for (int64_t i = 0; i < in; ++i) {
        const int64_t at = row * in + i;
        const int code = i % 2 == 0 ? blocks[at / 2] & 15 : blocks[at / 2] >> 4;
        const float value = std::ldexp(kValues[code & 7], scales[at / 32] - 127);
        stack[(row / out * in + i) * out + row % out] = FloatToBF16(code & 8 ? -value : value);
      }
    }
    a.push_back(MakeTestTensor(name + "_blocks", "U8", {experts, out, in / 32, 16}, blocks));
    a.push_back(MakeTestTensor(name + "_scales", "U8", {experts, out, in / 32}, scales));
    b.push_back(MakeTestTensor(name, "BF16", {experts, in, out}, stack));
  }

  std::mt19937 random_{11};
};

TEST(Executor, Mxfp4ExpertsGiveWhatTheyGiveWidened) {
  const Mxfp4Models models;
  EngineOptions packed = Options(), widened = Options();
  packed.model = models.packed.path();
  widened.model = models.widened.path();
  Executor host(packed), exact(widened);
  auto backend = std::make_unique<PretendedDevice>();
  Executor device(packed, ReadModelSpec(packed.model), std::move(backend));
  for (Executor* executor : {&host, &device})
    EXPECT_EQ(executor->model()->weights.layers[0].experts[0].down.dtype, DType::kMxfp4);
  const Observed expected = Disturb(exact, false);
  EXPECT_EQ(Disturb(host, false), expected);
  EXPECT_EQ(Disturb(device, false), expected);
  const auto texts = Continue(exact);
  EXPECT_EQ(Continue(host), texts);
  EXPECT_EQ(Continue(device), texts);
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

TEST(Executor, StepsAreLargerOnADevice) {
  EngineOptions options = Options();
  options.max_num_seqs = options.max_num_batched_tokens = std::nullopt;
  const Executor host(options);
  const Executor device(options, ReadModelSpec(kModel), std::make_unique<PretendedDevice>());
  EXPECT_EQ(host.max_num_seqs(), 16);
  EXPECT_EQ(host.max_num_batched_tokens(), 512);
  EXPECT_EQ(device.max_num_seqs(), 256);
  EXPECT_EQ(device.max_num_batched_tokens(), 8192);
  const Executor told(Options(), ReadModelSpec(kModel), std::make_unique<PretendedDevice>());
  EXPECT_EQ(told.max_num_seqs(), 5);
  EXPECT_EQ(told.max_num_batched_tokens(), 64);
}

}  // namespace
}  // namespace octavo
