// What an attention call computes, for every backend.
#pragma once

#include <cstdint>

namespace octavo {

struct AttentionShape {
  int heads = 0, kv_heads = 0, head_dim = 0;
  int window = 0;  // a query sees its last `window` keys, itself included; 0: all
  bool operator==(const AttentionShape&) const = default;
};

enum class AttentionMath : uint8_t {
  k16Bit,          // queries and probabilities keep 16 bits (CPU: 32); every format
  kFp8,            // prefill on FP8 tensor cores with two-level accumulation; K and V in fp8_e4m3
  kFp8TensorCore,  // the same, accumulated in the tensor cores: loses precision with length
};

}  // namespace octavo
