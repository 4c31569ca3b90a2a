#include "models/weights.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/float_bits.h"
#include "io/testing.h"
#include "kernels/cpu/mxfp4.h"
#include "models/config.h"
#include "models/testing.h"

namespace octavo {
namespace {

using Shapes = std::map<std::string, std::vector<int64_t>>;

// The tensors of SmallConfig(family), as published files name them.
Shapes SmallShapes(const std::string& family) {
  const bool gemma = family.starts_with("gemma"), gpt_oss = family == "gpt_oss";
  Shapes shapes = {{"model.embed_tokens.weight", {32, 64}},
                   {"model.norm.weight", {64}},
                   {"lm_head.weight", {32, 64}}};
  for (const std::string& layer :
       {std::string("model.layers.0."), std::string("model.layers.1.")}) {
    shapes[layer + "input_layernorm.weight"] = {64};
    shapes[layer + "post_attention_layernorm.weight"] = {64};
    if (gemma) {
      shapes[layer + "pre_feedforward_layernorm.weight"] = {64};
      shapes[layer + "post_feedforward_layernorm.weight"] = {64};
    }
    for (const auto& [name, out] :
         {std::pair("q_proj", 64), std::pair("k_proj", 32), std::pair("v_proj", 32)}) {
      shapes[layer + "self_attn." + name + ".weight"] = {out, 64};
      if (family == "qwen2" || gpt_oss) shapes[layer + "self_attn." + name + ".bias"] = {out};
    }
    shapes[layer + "self_attn.o_proj.weight"] = {64, 64};
    if (family.starts_with("qwen3") || family == "gemma3_text") {
      shapes[layer + "self_attn.q_norm.weight"] = {16};
      shapes[layer + "self_attn.k_norm.weight"] = {16};
    }
    if (family == "qwen3_moe") {
      shapes[layer + "mlp.gate.weight"] = {4, 64};
      for (int e = 0; e < 4; ++e) {
        const std::string expert = layer + "mlp.experts." + std::to_string(e);
        shapes[expert + ".gate_proj.weight"] = shapes[expert + ".up_proj.weight"] = {32, 64};
        shapes[expert + ".down_proj.weight"] = {64, 32};
      }
    } else if (family == "mixtral") {
      shapes[layer + "block_sparse_moe.gate.weight"] = {4, 64};
      for (int e = 0; e < 4; ++e) {
        const std::string expert = layer + "block_sparse_moe.experts." + std::to_string(e);
        shapes[expert + ".w1.weight"] = shapes[expert + ".w3.weight"] = {96, 64};
        shapes[expert + ".w2.weight"] = {64, 96};
      }
    } else if (gpt_oss) {
      shapes[layer + "self_attn.o_proj.bias"] = {64};
      shapes[layer + "self_attn.sinks"] = {4};
      shapes[layer + "mlp.router.weight"] = {4, 64};
      shapes[layer + "mlp.router.bias"] = {4};
      shapes[layer + "mlp.experts.gate_up_proj"] = {4, 64, 192};
      shapes[layer + "mlp.experts.gate_up_proj_bias"] = {4, 192};
      shapes[layer + "mlp.experts.down_proj"] = {4, 96, 64};
      shapes[layer + "mlp.experts.down_proj_bias"] = {4, 64};
    } else {
      shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = {96, 64};
      shapes[layer + "mlp.down_proj.weight"] = {64, 96};
    }
  }
  return shapes;
}

int64_t Count(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return count;
}

// A tensor whose values are 0.5, 1, ... 3.5 in turn, beginning with `seed`: exact in BF16 and in
// FP4.
float ValueAt(int64_t index, size_t seed) {
  constexpr float kValues[] = {0.5f, 1, 1.5f, 2, 3, 4, 6, -1, -0.5f, -3, 0};
  return kValues[(static_cast<size_t>(index) * 7 + seed) % std::size(kValues)];
}

TestTensor Bf16Tensor(const std::string& name, const std::vector<int64_t>& shape) {
  std::vector<uint16_t> values(Count(shape));
  for (size_t i = 0; i < values.size(); ++i) values[i] = FloatToBF16(ValueAt(i, name.size()));
  return MakeTestTensor(name, "BF16", shape, values);
}

// A checkpoint file of named tensors that a test may change before it is written.
class Model {
 public:
  explicit Model(const std::string& family) : config_(SmallConfig(family)) {
    for (const auto& [name, shape] : SmallShapes(family)) tensors_[name] = Bf16Tensor(name, shape);
  }

  Json& config() { return config_; }
  std::map<std::string, TestTensor>& tensors() { return tensors_; }
  void Put(TestTensor tensor) { tensors_[tensor.name] = std::move(tensor); }
  void Rename(const std::function<std::string(const std::string&)>& rename) {
    std::map<std::string, TestTensor> renamed;
    for (auto& [name, tensor] : tensors_) {
      tensor.name = rename(name);
      renamed[tensor.name] = tensor;
    }
    tensors_ = std::move(renamed);
  }

  const Weights& Load() {
    std::vector<TestTensor> list;
    for (const auto& [name, tensor] : tensors_) list.push_back(tensor);
    folder_.Write("model.safetensors", SafetensorsFile(list));
    folder_.Write("config.json", config_.dump());
    spec_ = ReadModelSpec(folder_.path());
    checkpoint_.emplace(Checkpoint::Open(folder_.path()));
    weights_ = LoadWeights(spec_, *checkpoint_);
    return weights_;
  }
  std::string Message() {
    return ErrorMessage([&] { Load(); });
  }
  const Tensor& InFile(const std::string& name) const { return *checkpoint_->Find(name); }
  const std::filesystem::path& path() const { return folder_.path(); }

 private:
  Json config_;
  std::map<std::string, TestTensor> tensors_;
  TempFolder folder_;
  ModelSpec spec_;
  std::optional<Checkpoint> checkpoint_;
  Weights weights_;
};

void ExpectSame(const Tensor& a, const Tensor& b) {
  ASSERT_EQ(ShapeString(a), ShapeString(b));
  EXPECT_EQ(std::memcmp(a.data, b.data, a.size() * SizeOf(a.dtype)), 0);
}

// `matrix` is MXFP4 and of the values of `widened`.
void ExpectSameWidened(const Tensor& widened, const Tensor& matrix) {
  ASSERT_EQ(matrix.dtype, DType::kMxfp4);
  const int64_t rows = widened.rows(), columns = widened.columns();
  ASSERT_EQ(std::pair(matrix.rows(), matrix.columns()), std::pair(rows, columns));
  std::vector<uint16_t> memory(cpu::Mxfp4WidenedSize(rows, columns));
  const Tensor values = cpu::WidenMxfp4(matrix, 0, rows, memory.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c)
      ASSERT_EQ(values.Row<uint16_t>(r)[c], widened.Row<uint16_t>(r)[c]) << r << ' ' << c;
  }
}

const char* const kFamilies[] = {"llama",   "qwen2",  "qwen3",       "qwen3_moe", "mistral",
                                 "mixtral", "gemma2", "gemma3_text", "gpt_oss"};

TEST(Weights, EveryFamilyIsViewedAndNotCopied) {
  for (const char* family : kFamilies) {
    SCOPED_TRACE(family);
    Model model(family);
    const Weights& weights = model.Load();
    ASSERT_EQ(weights.layers.size(), 2u);
    EXPECT_EQ(weights.embedding.data, model.InFile("model.embed_tokens.weight").data);
    EXPECT_EQ(weights.lm_head.data, model.InFile("lm_head.weight").data);
    const LayerWeights& layer = weights.layers[1];
    const std::string attention = "model.layers.1.self_attn.";
    EXPECT_EQ(layer.q.data, model.InFile(attention + "q_proj.weight").data);
    EXPECT_EQ(layer.k.data, model.InFile(attention + "k_proj.weight").data);
    EXPECT_EQ(layer.v.data, model.InFile(attention + "v_proj.weight").data);
    EXPECT_EQ(layer.o.data, model.InFile(attention + "o_proj.weight").data);
    EXPECT_EQ(static_cast<bool>(layer.k_bias), model.tensors().contains(attention + "k_proj.bias"));
    EXPECT_EQ(static_cast<bool>(layer.o_bias), model.tensors().contains(attention + "o_proj.bias"));
    EXPECT_EQ(static_cast<bool>(layer.k_norm),
              model.tensors().contains(attention + "k_norm.weight"));
    EXPECT_EQ(static_cast<bool>(layer.sinks), model.tensors().contains(attention + "sinks"));
    EXPECT_EQ(static_cast<bool>(layer.pre_ffn_norm), std::string(family).starts_with("gemma"));
    if (layer.pre_ffn_norm) {
      EXPECT_EQ(layer.post_ffn_norm.data,
                model.InFile("model.layers.1.post_feedforward_layernorm.weight").data);
    }
    EXPECT_EQ(layer.post_attention_norm.data,
              model.InFile("model.layers.1.post_attention_layernorm.weight").data);
    EXPECT_EQ(weights.owned.empty(), std::string(family) != "gpt_oss");
  }
}

TEST(Weights, ExpertNames) {
  Model mixtral("mixtral"), qwen("qwen3_moe");
  const LayerWeights& a = mixtral.Load().layers[1];
  const std::string w = "model.layers.1.block_sparse_moe.";
  EXPECT_EQ(a.router.data, mixtral.InFile(w + "gate.weight").data);
  ASSERT_EQ(a.experts.size(), 4u);
  EXPECT_EQ(a.experts[3].gate.data, mixtral.InFile(w + "experts.3.w1.weight").data);
  EXPECT_EQ(a.experts[3].up.data, mixtral.InFile(w + "experts.3.w3.weight").data);
  EXPECT_EQ(a.experts[3].down.data, mixtral.InFile(w + "experts.3.w2.weight").data);
  EXPECT_FALSE(a.dense.gate);
  const LayerWeights& b = qwen.Load().layers[0];
  EXPECT_EQ(b.router.data, qwen.InFile("model.layers.0.mlp.gate.weight").data);
  EXPECT_EQ(b.experts[2].up.data, qwen.InFile("model.layers.0.mlp.experts.2.up_proj.weight").data);
}

TEST(Weights, OtherFloatTypesStayAsTheyAre) {
  Model model("llama");
  model.Put(MakeTestTensor<float>("model.norm.weight", "F32", {64}, std::vector<float>(64, 1.5f)));
  model.Put(MakeTestTensor<uint16_t>("lm_head.weight", "F16", {32, 64},
                                     std::vector<uint16_t>(2048, 0x3C00)));
  const Weights& weights = model.Load();
  EXPECT_EQ(weights.final_norm.dtype, DType::kF32);
  EXPECT_EQ(weights.lm_head.dtype, DType::kF16);
  EXPECT_TRUE(weights.owned.empty());
}

TEST(Weights, TiedWithAndWithoutACopy) {
  Model model("llama");
  model.config()["tie_word_embeddings"] = true;
  const void* head = model.Load().lm_head.data;
  EXPECT_EQ(head, model.InFile("model.embed_tokens.weight").data);
  model.tensors().erase("lm_head.weight");
  const Weights& weights = model.Load();
  EXPECT_EQ(weights.lm_head.data, weights.embedding.data);
  model.config()["tie_word_embeddings"] = false;
  EXPECT_NE(model.Message().find("tensor 'lm_head.weight': missing, expected [32, 64]"),
            std::string::npos);
}

TEST(Weights, MultimodalPrefixes) {
  struct Case {
    const char *prefix, *head, *vision;
  };
  const Case cases[] = {
      {"language_model.model.", "language_model.lm_head.weight", "vision_tower.x.weight"},
      {"model.language_model.", "lm_head.weight", "model.vision_tower.x.weight"}};
  for (const Case& c : cases) {
    Model model("gemma3_text");
    model.config() = {{"model_type", "gemma3"}, {"text_config", model.config()}};
    model.Rename([&](const std::string& name) {
      return name == "lm_head.weight" ? c.head : c.prefix + name.substr(std::strlen("model."));
    });
    model.Put(Bf16Tensor(c.vision, {3}));
    model.Put(Bf16Tensor(std::string(c.vision).substr(0, std::string(c.vision).find("vision")) +
                             "multi_modal_projector.mm_input_projection_weight",
                         {2}));
    ASSERT_EQ(model.Message(), "");
    const void* q = model.Load().layers[1].q.data;
    EXPECT_EQ(q, model.InFile(std::string(c.prefix) + "layers.1.self_attn.q_proj.weight").data);
  }
  Model text("gemma3_text");
  text.Put(Bf16Tensor("vision_tower.x.weight", {3}));
  EXPECT_NE(text.Message().find("tensor 'vision_tower.x.weight'"), std::string::npos);
}

TEST(Weights, BadTensors) {
  struct Case {
    const char* family;
    std::function<void(Model&)> change;
    const char* message;
  };
  const Case cases[] = {
      {"llama", [](Model& m) { m.tensors().erase("model.embed_tokens.weight"); },
       "tensor 'model.embed_tokens.weight': missing"},
      {"llama", [](Model& m) { m.tensors().erase("model.layers.1.mlp.up_proj.weight"); },
       "tensor 'model.layers.1.mlp.up_proj.weight': missing, expected [96, 64]"},
      {"qwen2", [](Model& m) { m.tensors().erase("model.layers.0.self_attn.k_proj.bias"); },
       "tensor 'model.layers.0.self_attn.k_proj.bias': missing, expected [32]"},
      {"qwen3", [](Model& m) { m.tensors().erase("model.layers.0.self_attn.k_norm.weight"); },
       "tensor 'model.layers.0.self_attn.k_norm.weight': missing, expected [16]"},
      {"mixtral",
       [](Model& m) { m.tensors().erase("model.layers.0.block_sparse_moe.experts.2.w3.weight"); },
       "experts.2.w3.weight': missing"},
      {"gpt_oss", [](Model& m) { m.tensors().erase("model.layers.0.self_attn.sinks"); },
       "sinks': missing, expected [4]"},
      {"llama",
       [](Model& m) {
         m.Put(Bf16Tensor("model.layers.0.self_attn.q_proj.weight", {64, 32}));
       },
       "q_proj.weight': expected [64, 64], found [64, 32] bfloat16"},
      {"llama",
       [](Model& m) {
         m.Put(Bf16Tensor("model.layers.0.self_attn.k_proj.weight", {64, 32}));
       },
       "k_proj.weight': expected [32, 64], found [64, 32] bfloat16"},
      {"llama",
       [](Model& m) {
         m.Put(Bf16Tensor("model.norm.weight", {1, 64}));
       },
       "'model.norm.weight': expected [64], found [1, 64] bfloat16"},
      {"llama",
       [](Model& m) {
         m.Put(MakeTestTensor("model.norm.weight", "I32", {64}, std::vector<int32_t>(64)));
       },
       "'model.norm.weight': expected bfloat16, float16 or float32, found [64] int32"},
      {"llama",
       [](Model& m) {
         m.Put(MakeTestTensor("lm_head.weight", "F8_E4M3", {32, 64}, std::vector<uint8_t>(2048)));
       },
       "'lm_head.weight': [32, 64] fp8_e4m3, but the config names no float8 quantisation"},
      {"llama",
       [](Model& m) {
         m.Put(MakeTestTensor("lm_head.weight", "F8_E5M2", {32, 64}, std::vector<uint8_t>(2048)));
       },
       "'lm_head.weight': expected bfloat16, float16 or float32, found [32, 64] fp8_e5m2"},
      {"llama", [](Model& m) { m.Put(Bf16Tensor("model.layers.0.self_attn.q_proj.bias", {64})); },
       "'model.layers.0.self_attn.q_proj.bias': [64] bfloat16 is not a tensor of this llama model "
       "of 2 layers"},
      {"llama", [](Model& m) { m.Put(Bf16Tensor("model.layers.2.input_layernorm.weight", {64})); },
       "'model.layers.2.input_layernorm.weight'"},
      {"llama", [](Model& m) { m.Put(Bf16Tensor("model.layers.0.self_attn.q_norm.weight", {16})); },
       "q_norm.weight'"},
      {"llama", [](Model& m) { m.Put(Bf16Tensor("model.layers.2.self_attn.k_scale", {1})); },
       "layers.2.self_attn.k_scale'"},
      {"llama",
       [](Model& m) { m.Put(Bf16Tensor("model.layers.0.self_attn.k_proj.weight_scale", {1})); },
       "k_proj.weight_scale': [1] bfloat16 is not a tensor"},
      {"llama", [](Model& m) { m.Put(Bf16Tensor("mtp.layers.0.self_attn.k_scale", {1})); },
       "'mtp.layers.0"},
      {"llama", [](Model& m) { m.Put(Bf16Tensor("a\nb", {1})); },
       "tensor 'a\\x0ab': [1] bfloat16 is not"},
      {"qwen3_moe",
       [](Model& m) { m.Put(Bf16Tensor("model.layers.0.mlp.shared_expert.up_proj.weight", {1})); },
       "shared_expert"},
      {"gpt_oss",
       [](Model& m) {
         m.Put(Bf16Tensor("model.layers.0.mlp.experts.gate_up_proj", {4, 192, 64}));
       },
       "gate_up_proj': expected [4, 64, 192], found [4, 192, 64] bfloat16"},
  };
  for (const Case& c : cases) {
    Model model(c.family);
    c.change(model);
    const std::string message = model.Message();
    const bool missing = message.find("': missing") != message.npos;
    EXPECT_TRUE(
        message.starts_with(model.path().string() + (missing ? ": " : "/model.safetensors: ")))
        << message;
    EXPECT_NE(message.find(c.message), message.npos) << c.message << " -> " << message;
    EXPECT_EQ(message.find('\n'), message.npos) << message;
  }
}

TEST(Weights, ErrorsNameTheShard) {
  Model model("llama");
  model.Put(Bf16Tensor("model.norm.weight", {63}));
  std::vector<TestTensor> first, second;
  Json map;
  for (const auto& [name, tensor] : model.tensors()) {
    const bool is_norm = name == "model.norm.weight";
    (is_norm ? second : first).push_back(tensor);
    map[name] = is_norm ? "b.safetensors" : "a.safetensors";
  }
  const TempFolder folder;
  folder.Write("a.safetensors", SafetensorsFile(first));
  folder.Write("b.safetensors", SafetensorsFile(second));
  folder.Write("model.safetensors.index.json", Json({{"weight_map", map}}).dump());
  const Checkpoint checkpoint = Checkpoint::Open(folder.path());
  EXPECT_EQ(ErrorMessage([&] { LoadWeights(ParseConfig(model.config(), ""), checkpoint); }),
            (folder.path() / "b.safetensors").string() +
                ": tensor 'model.norm.weight': expected [64], found [63] bfloat16");
}

TEST(Weights, HarmlessTensors) {
  Model model("llama");
  for (const char* name :
       {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale",
        "model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.v_proj.output_scale",
        "model.layers.0.self_attn.kv_scale", "model.layers.0.self_attn.q_zero_point",
        "model.layers.0.self_attn.v_cache.scale"}) {
    model.Put(Bf16Tensor(name, {1}));
  }
  EXPECT_EQ(model.Message(), "");
}

// Float-8 weights of the small llama: q of layer 0 with one scale, k with one per row.
void MakeFp8(Model& model) {
  model.config()["quantization_config"] = {
      {"quant_method", "compressed-tensors"},
      {"config_groups",
       {{"g", {{"weights", {{"num_bits", 8}, {"type", "float"}, {"strategy", "channel"}}}}}}}};
  const std::string q = "model.layers.0.self_attn.q_proj.", k = "model.layers.0.self_attn.k_proj.";
  std::vector<uint8_t> codes(64 * 64);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i % 0x7F);
  model.Put(MakeTestTensor(q + "weight", "F8_E4M3", {64, 64}, codes));
  model.Put(MakeTestTensor<float>(q + "weight_scale", "F32", {}, {0.013f}));
  model.Put(MakeTestTensor<float>(q + "input_scale", "F32", {}, {2.0f}));
  codes.resize(32 * 64);
  model.Put(MakeTestTensor(k + "weight", "F8_E4M3", {32, 64}, codes));
  std::vector<uint16_t> scales(32);
  for (size_t i = 0; i < scales.size(); ++i)
    scales[i] = FloatToBF16(0.01f * static_cast<float>(i + 1));
  model.Put(MakeTestTensor(k + "weight_scale", "BF16", {32, 1}, scales));
}

TEST(Weights, Fp8IsWidened) {
  Model model("llama");
  MakeFp8(model);
  const LayerWeights& layer = model.Load().layers[0];
  EXPECT_EQ(ShapeString(layer.q), "[64, 64] bfloat16");
  EXPECT_EQ(ShapeString(layer.k), "[32, 64] bfloat16");
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < 64; ++c) {
      const float value = Fp8E4M3::Decode((r * 64 + c) % 0x7F);
      ASSERT_EQ(layer.q.Row<uint16_t>(r)[c], FloatToBF16(value * 0.013f));
      if (r >= 32) continue;
      const float scale = BF16ToFloat(FloatToBF16(0.01f * static_cast<float>(r + 1)));
      ASSERT_EQ(layer.k.Row<uint16_t>(r)[c], FloatToBF16(value * scale));
    }
  }
  EXPECT_EQ(layer.v.data,
            model.InFile("model.layers.0.self_attn.v_proj.weight").data);  // left as it was
}

TEST(Weights, BadFp8Scales) {
  const std::string scale = "model.layers.0.self_attn.q_proj.weight_scale";
  struct Case {
    TestTensor tensor;
    const char* message;
  };
  const auto f32 = [&](std::vector<int64_t> shape, std::vector<float> values) {
    return MakeTestTensor(scale, "F32", std::move(shape), values);
  };
  const Case cases[] = {
      {f32({}, {0}), "expected finite positive scales, found 0 at 0"},
      {f32({1}, {-1}), "expected finite positive scales, found -1 at 0"},
      {f32({1}, {NAN}), "expected finite positive scales, found nan at 0"},
      {f32({1}, {INFINITY}), "expected finite positive scales, found inf at 0"},
      {f32({2}, {1, 1}),
       "expected [1] or [64, 1] of float32, bfloat16 or float16, found [2] float32"},
      {f32({8, 8}, std::vector<float>(64, 1)), "found [8, 8] float32"},
      {MakeTestTensor(scale, "I32", {1}, std::vector<int32_t>{1}), "found [1] int32"},
  };
  for (const Case& c : cases) {
    Model model("llama");
    MakeFp8(model);
    model.Put(c.tensor);
    const std::string message = model.Message();
    EXPECT_NE(message.find("tensor '" + scale + "': "), message.npos) << message;
    EXPECT_NE(message.find(c.message), message.npos) << message;
  }
  Model model("llama");
  MakeFp8(model);
  model.tensors().erase(scale);
  EXPECT_NE(model.Message().find("'" + scale + "': missing, expected [1] or [64, 1]"),
            std::string::npos);
}

TEST(Weights, GptOssStacksAreTransposed) {
  Model model("gpt_oss");
  const LayerWeights& layer = model.Load().layers[1];
  const Tensor &gate_up = model.InFile("model.layers.1.mlp.experts.gate_up_proj"),
               &down = model.InFile("model.layers.1.mlp.experts.down_proj"),
               &bias = model.InFile("model.layers.1.mlp.experts.gate_up_proj_bias"),
               &down_bias = model.InFile("model.layers.1.mlp.experts.down_proj_bias");
  ASSERT_EQ(layer.experts.size(), 4u);
  for (int e = 0; e < 4; ++e) {
    const Expert& expert = layer.experts[e];
    ASSERT_EQ(ShapeString(expert.gate), "[96, 64] bfloat16");
    ASSERT_EQ(ShapeString(expert.down), "[64, 96] bfloat16");
    for (int i = 0; i < 96; ++i) {
      for (int h = 0; h < 64; ++h) {
        ASSERT_EQ(expert.gate.Row<uint16_t>(i)[h], gate_up.Row<uint16_t>(e * 64 + h)[2 * i]);
        ASSERT_EQ(expert.up.Row<uint16_t>(i)[h], gate_up.Row<uint16_t>(e * 64 + h)[2 * i + 1]);
        ASSERT_EQ(expert.down.Row<uint16_t>(h)[i], down.Row<uint16_t>(e * 96 + i)[h]);
      }
      ASSERT_EQ(expert.gate_bias.Row<uint16_t>(0)[i], bias.Row<uint16_t>(e)[2 * i]);
      ASSERT_EQ(expert.up_bias.Row<uint16_t>(0)[i], bias.Row<uint16_t>(e)[2 * i + 1]);
    }
    EXPECT_EQ(ShapeString(expert.up_bias), "[96] bfloat16");
    EXPECT_EQ(ShapeString(expert.down_bias), "[64] bfloat16");
    EXPECT_EQ(expert.down_bias.data, down_bias.Row<uint16_t>(e));
  }
}

uint8_t Fp4Code(float value) {
  constexpr float kMagnitudes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  uint8_t code = 0;
  while (kMagnitudes[code] != std::abs(value)) ++code;
  return value < 0 ? code | 8 : code;
}

// The [experts, in, out] stack `name` of the model as MXFP4 blocks and scales of its transpose.
void PackStack(Model& model, const std::string& name) {
  const TestTensor stack = model.tensors().at(name);
  const int64_t experts = stack.shape[0], in = stack.shape[1], out = stack.shape[2];
  std::vector<uint8_t> blocks(experts * out * in / 2), scales(experts * out * in / 32, 127);
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        const uint8_t code = Fp4Code(ValueAt((e * in + i) * out + o, name.size()));
        blocks[((e * out + o) * in + i) / 2] |= i % 2 == 0 ? code : code << 4;
      }
    }
  }
  model.tensors().erase(name);
  model.Put(MakeTestTensor(name + "_blocks", "U8", {experts, out, in / 32, 16}, blocks));
  model.Put(MakeTestTensor(name + "_scales", "U8", {experts, out, in / 32}, scales));
}

TEST(Weights, GptOssMxfp4EqualsBf16) {
  Model plain("gpt_oss"), packed("gpt_oss");
  packed.config()["quantization_config"] = {{"quant_method", "mxfp4"}};
  for (const char* name : {"gate_up_proj", "down_proj"}) {
    PackStack(packed, std::string("model.layers.0.mlp.experts.") + name);
    PackStack(packed, std::string("model.layers.1.mlp.experts.") + name);
  }
  const Weights &a = plain.Load(), &b = packed.Load();
  for (int l = 0; l < 2; ++l) {
    for (int e = 0; e < 4; ++e) {
      ExpectSameWidened(a.layers[l].experts[e].gate, b.layers[l].experts[e].gate);
      ExpectSameWidened(a.layers[l].experts[e].up, b.layers[l].experts[e].up);
      ExpectSameWidened(a.layers[l].experts[e].down, b.layers[l].experts[e].down);
      ExpectSame(a.layers[l].experts[e].gate_bias, b.layers[l].experts[e].gate_bias);
    }
  }
  TestTensor& scales = packed.tensors().at("model.layers.1.mlp.experts.down_proj_scales");
  scales.bytes[5] = static_cast<char>(0xFF);
  EXPECT_NE(packed.Message().find("layers.1.mlp.experts.down_proj_scales': expected scales up to "
                                  "2^125 (code 252), found code 255"),
            std::string::npos);
  scales.shape = {4, 64, 3, 1};
  EXPECT_NE(
      packed.Message().find("down_proj_scales': expected [4, 64, 3], found [4, 64, 3, 1] uint8"),
      std::string::npos);
}

// One scale that tiles do not hold: its layer becomes bfloat16, of the same values.
TEST(Weights, GptOssMxfp4OfLargeScalesIsWidened) {
  Model plain("gpt_oss"), model("gpt_oss");
  model.config()["quantization_config"] = {{"quant_method", "mxfp4"}};
  for (const char* layer : {"model.layers.0.mlp.experts.", "model.layers.1.mlp.experts."}) {
    PackStack(model, std::string(layer) + "gate_up_proj");
    PackStack(model, std::string(layer) + "down_proj");
  }
  const LayerWeights& expected = plain.Load().layers[1];
  TestTensor& scales = model.tensors().at("model.layers.1.mlp.experts.gate_up_proj_scales");
  for (const int code : {129, 252}) {
    scales.bytes[6 * 2 + 1] =
        static_cast<char>(code);  // expert 0, gate's row 3, columns from 32 on
    const Weights& weights = model.Load();
    EXPECT_EQ(weights.layers[0].experts[0].gate.dtype, DType::kMxfp4);
    const std::vector<Expert>& experts = weights.layers[1].experts;
    for (int e = 0; e < 4; ++e) {
      ExpectSame(experts[e].up, expected.experts[e].up);
      ExpectSame(experts[e].down, expected.experts[e].down);
      ASSERT_EQ(ShapeString(experts[e].gate), "[96, 64] bfloat16");
      for (int r = 0; r < 96; ++r) {
        for (int c = 0; c < 64; ++c) {
          const int power = e == 0 && r == 3 && c >= 32 ? code - 127 : 0;
          EXPECT_EQ(BF16ToFloat(experts[e].gate.Row<uint16_t>(r)[c]),
                    std::ldexp(BF16ToFloat(expected.experts[e].gate.Row<uint16_t>(r)[c]), power));
        }
      }
    }
  }
}

TEST(Weights, NoiseOfMxfp4) {
  Model model("gpt_oss");
  model.config()["quantization_config"] = {{"quant_method", "mxfp4"}};
  TempFolder folder;
  folder.Write("config.json", model.config().dump());
  const Weights weights = MakeDummyWeights(ReadModelSpec(folder.path()));
  EXPECT_EQ(weights.layers[1].q.dtype, DType::kBF16);
  const Tensor& down = weights.layers[1].experts[3].down;
  ASSERT_EQ(ShapeString(down), "[64, 96] mxfp4");
  std::vector<uint16_t> memory(cpu::Mxfp4WidenedSize(64, 96));
  const Tensor values = cpu::WidenMxfp4(down, 0, 64, memory.data());
  double squares = 0;
  for (int64_t r = 0; r < 64; ++r) {
    for (int64_t c = 0; c < 96; ++c)
      squares += std::pow(BF16ToFloat(values.Row<uint16_t>(r)[c]), 2);
  }
  EXPECT_NEAR(std::sqrt(squares / (64 * 96)), 0.02, 0.005);
}

TEST(Weights, Goldens) {
  if (GoldenFolder("llama").empty())
    GTEST_SKIP() << "neither tests/golden nor shared/goldens is there";
  for (const char* name : {"llama", "llama_hd128_tied", "qwen2", "qwen3", "qwen3_moe", "mistral",
                           "mixtral", "gemma2", "gemma3_text", "gpt_oss"}) {
    SCOPED_TRACE(name);
    const auto folder = GoldenFolder(name);
    const ModelSpec spec = ReadModelSpec(folder);
    const Checkpoint checkpoint = Checkpoint::Open(folder);
    const Weights weights = LoadWeights(spec, checkpoint);
    EXPECT_EQ(weights.layers.size(), spec.layers.size());
    EXPECT_EQ(weights.owned.empty(), spec.family != "gpt_oss");
    const Checkpoint golden = Checkpoint::OpenFile(folder / "golden.safetensors");
    EXPECT_EQ(ShapeString(*golden.Find("prompt0.ids")), "[12] int32");
  }
}

}  // namespace
}  // namespace octavo
