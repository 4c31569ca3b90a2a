#include "models/upload.h"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "base/log.h"

namespace octavo {
namespace {

constexpr int64_t kAlign = 256;

// Calls run(dtype, tensors) for each run of tensors that stand next to each other.
template <class Run>
void ForEachRun(Weights& w, bool tied, const Run& run) {
  using Tensors = std::vector<Tensor*>;
  const auto bf16 = [&](const Tensors& tensors) { run(DType::kBF16, tensors); };
  const auto f32 = [&](const Tensors& tensors) { run(DType::kF32, tensors); };
  bf16({&w.embedding});
  if (tied)
    w.lm_head = w.embedding;
  else
    bf16({&w.lm_head});
  bf16({&w.final_norm});
  for (LayerWeights& l : w.layers) {
    for (Tensor* norm : {&l.input_norm, &l.post_attention_norm, &l.pre_ffn_norm, &l.post_ffn_norm,
                         &l.q_norm, &l.k_norm})
      bf16({norm});
    bf16({&l.q, &l.k, &l.v});
    f32({&l.q_bias, &l.k_bias, &l.v_bias});
    bf16({&l.o});
    f32({&l.o_bias});
    f32({&l.sinks});
    bf16({&l.router});
    f32({&l.router_bias});
    bf16({&l.dense.gate, &l.dense.up});
    bf16({&l.dense.gate_bias, &l.dense.up_bias});
    bf16({&l.dense.down});
    f32({&l.dense.down_bias});
    Tensors matrices, biases;
    for (Expert& e : l.experts) {
      matrices.insert(matrices.end(), {&e.gate, &e.up, &e.down});
      biases.insert(biases.end(), {&e.gate_bias, &e.up_bias, &e.down_bias});
    }
    bf16(matrices);
    bf16(biases);
  }
}

int64_t Bytes(DType dtype, const Tensor& tensor) {
  return tensor ? tensor.size() * static_cast<int64_t>(SizeOf(dtype)) : 0;
}

float ValueAt(const Tensor& t, int64_t row, int64_t column) {
  switch (t.dtype) {
    case DType::kF32:
      return t.Row<float>(row)[column];
    case DType::kF16:
      return Float16::Decode(t.Row<uint16_t>(row)[column]);
    default:
      return BF16ToFloat(t.Row<uint16_t>(row)[column]);
  }
}

void Upload(const Tensor& from, const Tensor& to, Backend& backend) {
  if (from.dtype == to.dtype && from.contiguous()) {
    backend.Upload(to.data, from.data, Bytes(to.dtype, to));
    return;
  }
  Buffer converted(Bytes(to.dtype, to));
  for (int64_t i = 0; i < from.size(); ++i) {
    const float value = ValueAt(from, i / from.columns(), i % from.columns());
    if (to.dtype == DType::kF32)
      reinterpret_cast<float*>(converted.data())[i] = value;
    else
      reinterpret_cast<uint16_t*>(converted.data())[i] = FloatToBF16(value);
  }
  backend.Upload(to.data, converted.data(), converted.size());
}

}  // namespace

Weights UploadWeights(const ModelSpec& spec, const Weights& weights, Backend& backend) {
  const auto start = std::chrono::steady_clock::now();
  Weights out{.embedding = weights.embedding,
              .final_norm = weights.final_norm,
              .lm_head = weights.lm_head,
              .layers = weights.layers,
              .owned = {},
              .device = {}};
  int64_t total = 0;
  ForEachRun(out, spec.tie_word_embeddings, [&](DType dtype, const std::vector<Tensor*>& run) {
    for (const Tensor* tensor : run) total += Bytes(dtype, *tensor);
    total = (total + kAlign - 1) / kAlign * kAlign;
  });
  out.device = backend.Allocate(total);
  if (!out.device.data()) {
    throw Error(ErrorCode::kResourceExhausted,
                fmt::format("out of memory for {:.1f} GiB of weights on {}, which has {:.1f} free",
                            static_cast<double>(total) / (1 << 30), backend.name(),
                            static_cast<double>(backend.memory_info().free) / (1 << 30)));
  }
  int64_t offset = 0;
  ForEachRun(out, spec.tie_word_embeddings, [&](DType dtype, const std::vector<Tensor*>& run) {
    for (Tensor* tensor : run) {
      if (!*tensor) continue;
      const Tensor from = *tensor;
      tensor->data = out.device.data() + offset;
      tensor->dtype = dtype;
      tensor->row_stride = tensor->columns();
      Upload(from, *tensor, backend);
      offset += Bytes(dtype, *tensor);
    }
    offset = (offset + kAlign - 1) / kAlign * kAlign;
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  Log(LogLevel::kInfo,
      fmt::format("weights: {:.2f} GiB to {} in {:.1f} s", static_cast<double>(total) / (1 << 30),
                  backend.name(), seconds.count()));
  return out;
}

}  // namespace octavo
