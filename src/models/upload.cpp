#include "models/upload.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include <fmt/format.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "base/log.h"
#include "base/thread_pool.h"

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
    const bool mxfp4 = !l.experts.empty() && l.experts[0].gate.dtype == DType::kMxfp4;
    for (Expert& e : l.experts) {
      matrices.insert(matrices.end(), {&e.gate, &e.up, &e.down});
      biases.insert(biases.end(), {&e.gate_bias, &e.up_bias, &e.down_bias});
    }
    run(mxfp4 ? DType::kMxfp4 : DType::kBF16, matrices);
    bf16(biases);
  }
}

void Convert(const std::byte* from, DType from_dtype, std::byte* to, DType to_dtype,
             int64_t count) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, count * SizeOf(to_dtype));
    return;
  }
  const auto write = [&](const auto* in, auto decode) {
    for (int64_t i = 0; i < count; ++i) {
      if (to_dtype == DType::kF32)
        reinterpret_cast<float*>(to)[i] = decode(in[i]);
      else
        reinterpret_cast<uint16_t*>(to)[i] = FloatToBF16(decode(in[i]));
    }
  };
  if (from_dtype == DType::kF32)
    write(reinterpret_cast<const float*>(from), [](float x) { return x; });
  else if (from_dtype == DType::kF16)
    write(reinterpret_cast<const uint16_t*>(from), Float16::Decode);
  else
    write(reinterpret_cast<const uint16_t*>(from), BF16ToFloat);
}

// What is added in ascending order of its places on the device goes there in stretches. The
// backend's Wait is all the order there is: before a stretch is sent, the one before it has
// arrived, so its buffer is free to be filled again.
class Staging {
 public:
  Staging(Backend& backend, int threads, std::function<void(const std::byte* end)> arrived)
      : backend_(backend), pool_(threads), arrived_(std::move(arrived)) {
    for (Memory& buffer : buffers_) {
      buffer = backend.AllocateHost(kStagingBytes);
      if (!buffer.data()) {
        throw Error(ErrorCode::kResourceExhausted,
                    fmt::format("out of memory for {} MiB to send weights from",
                                std::size(buffers_) * kStagingBytes >> 20));
      }
    }
  }

  void Add(const Tensor& from, const Tensor& to) {
    const int64_t row = from.contiguous() ? from.size() : from.columns();
    const int64_t from_size = SizeOf(from.dtype), to_size = SizeOf(to.dtype);
    for (int64_t begin = 0; begin < from.size();) {
      const int64_t column = begin % row;
      const int64_t count = std::min(row - column, kPieceBytes / to_size);
      Add({.from = static_cast<const std::byte*>(from.data) +
                   (begin / row * from.row_stride + column) * from_size,
           .from_dtype = from.dtype,
           .to = static_cast<std::byte*>(to.data) + begin * to_size,
           .to_dtype = to.dtype,
           .count = count});
      begin += count;
    }
  }

  // Sends the rest; all has arrived when it returns.
  void Finish() {
    Send();
    backend_.Wait();
  }

 private:
  static constexpr int64_t kStagingBytes = 16 << 20;  // a transfer of 0.3 ms
  static constexpr int64_t kPieceBytes = 256 << 10;   // enough of them for every thread

  struct Piece {
    const std::byte* from;
    DType from_dtype;
    std::byte* to;  // on the device
    DType to_dtype;
    int64_t count;  // elements
    std::byte* end() const { return to + count * static_cast<int64_t>(SizeOf(to_dtype)); }
  };

  void Add(const Piece& piece) {
    if (!pieces_.empty() && piece.end() - pieces_[0].to > kStagingBytes) Send();
    pieces_.push_back(piece);
  }

  void Send() {
    if (pieces_.empty()) return;
    std::byte* const begin = pieces_[0].to;
    std::byte* const buffer = buffers_[current_].data();
    pool_.ForEach(std::ssize(pieces_), [&](int64_t i, int) {
      const Piece& p = pieces_[i];
      if (i > 0)
        std::fill(buffer + (pieces_[i - 1].end() - begin), buffer + (p.to - begin), std::byte{});
      Convert(p.from, p.from_dtype, buffer + (p.to - begin), p.to_dtype, p.count);
    });
    backend_.Wait();
    arrived_(begin);
    backend_.Upload(begin, buffer, pieces_.back().end() - begin);
    pieces_.clear();
    current_ = 1 - current_;
  }

  Backend& backend_;
  ThreadPool pool_;
  std::function<void(const std::byte*)> arrived_;
  Memory buffers_[2];
  int current_ = 0;
  std::vector<Piece> pieces_;  // of the current buffer
};

}  // namespace

Weights UploadWeights(const ModelSpec& spec, const Weights& weights, Backend& backend, int threads,
                      const UploadProgress& progress) {
  const auto start = std::chrono::steady_clock::now();
  Weights out{.embedding = weights.embedding,
              .final_norm = weights.final_norm,
              .lm_head = weights.lm_head,
              .layers = weights.layers,
              .owned = {},
              .device = {}};
  int64_t total = 0;
  ForEachRun(out, spec.tie_word_embeddings, [&](DType dtype, const std::vector<Tensor*>& run) {
    for (const Tensor* tensor : run) {
      if (*tensor) total += WeightBytes(dtype, *tensor);
    }
    total = (total + kAlign - 1) / kAlign * kAlign;
  });
  out.device = backend.Allocate(total);
  if (!out.device.data()) {
    throw Error(ErrorCode::kResourceExhausted,
                fmt::format("out of memory for {:.1f} GiB of weights on {}, which has {:.1f} free",
                            static_cast<double>(total) / (1 << 30), backend.name(),
                            static_cast<double>(backend.memory_info().free) / (1 << 30)));
  }
  Staging staging(backend, threads, [&](const std::byte* end) {
    if (progress) progress(end - out.device.data(), total);
  });
  int64_t offset = 0;
  ForEachRun(out, spec.tie_word_embeddings, [&](DType dtype, const std::vector<Tensor*>& run) {
    for (Tensor* tensor : run) {
      if (!*tensor) continue;
      const Tensor from = *tensor;
      tensor->data = out.device.data() + offset;
      tensor->dtype = dtype;
      tensor->row_stride = tensor->columns();
      const int64_t bytes = WeightBytes(dtype, from);
      if (dtype == DType::kMxfp4)
        staging.Add(Tensor(from.data, DType::kU8, {bytes}),
                    Tensor(tensor->data, DType::kU8, {bytes}));
      else
        staging.Add(from, *tensor);
      offset += bytes;
    }
    offset = (offset + kAlign - 1) / kAlign * kAlign;
  });
  staging.Finish();
  if (progress) progress(total, total);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  Log(LogLevel::kInfo,
      fmt::format("weights: {:.2f} GiB to {} in {:.1f} s", static_cast<double>(total) / (1 << 30),
                  backend.name(), seconds.count()));
  return out;
}

}  // namespace octavo
