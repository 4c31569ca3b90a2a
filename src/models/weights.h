// The weights of a model under the names the decoder uses, and the families' maps from tensor
// names.
//
// BF16, F16 and F32 tensors are views into the mapped checkpoint. Only what must change shape,
// order or type is converted, into `owned`: float-8 weights with scales (widened to BF16),
// gpt_oss's experts, whose gate and up rows or columns alternate: BF16 stacks [experts, in, 2 *
// out] (transposed) and MXFP4 blocks (still MXFP4, in tiles; BF16 in a layer with a scale above 2).
#pragma once

#include <vector>

#include "base/tensor.h"
#include "io/checkpoint.h"
#include "kernels/backend.h"
#include "models/spec.h"

namespace octavo {

struct LayerWeights {
  Tensor input_norm,
      post_attention_norm;             // Llama-like: post_attention_norm is the norm before the FFN
  Tensor pre_ffn_norm, post_ffn_norm;  // Gemma only (LayerSpec::post_norms)
  Tensor q, k, v, o;                   // [out, in]
  Tensor q_bias, k_bias, v_bias, o_bias;  // empty without
  Tensor q_norm, k_norm;                  // [head_dim]
  Tensor sinks;                           // [heads]
  Expert dense;                           // dense FFN
  Tensor router, router_bias;             // [experts, hidden], [experts]
  std::vector<Expert> experts;
};

struct Weights {
  Tensor embedding;   // [vocab, hidden]
  Tensor final_norm;  // [hidden]
  Tensor lm_head;     // [vocab, hidden]; the embedding when tied
  std::vector<LayerWeights> layers;
  std::vector<Buffer> owned;
  Memory device;  // where they are in a backend's own memory: models/upload
};

// Of a weight of the tensor's shape, but of this dtype.
int64_t WeightBytes(DType dtype, const Tensor& tensor);

// Finds, checks (shape, dtype) and if need be converts every tensor the spec asks for. Errors name
// file and tensor: missing, mis-shaped, wrong type, or present and not used (but for known harmless
// names: rotary inv_freq, vision towers, KV scales).
Weights LoadWeights(const ModelSpec& spec, const Checkpoint& checkpoint);

// --load-format dummy: noise of a deviation of 0.02 in every tensor the spec asks for, bfloat16,
// but MXFP4 experts if the config says so. All of a type are views into one buffer as large as the
// largest.
Weights MakeDummyWeights(const ModelSpec& spec);

}  // namespace octavo
