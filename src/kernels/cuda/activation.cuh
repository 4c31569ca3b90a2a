// Activation of kernels/backend.h, in float32.
#pragma once

#include "kernels/backend.h"

namespace octavo::cuda {

__device__ __forceinline__ float Activated(Activation activation, float limit, float gate,
                                           float up) {
  switch (activation) {
    case Activation::kSilu:
      return gate / (1.0f + expf(-gate)) * up;
    case Activation::kGeluTanh: {
      constexpr float kSqrt2OverPi = 0.7978845608028654f;
      const float inner = kSqrt2OverPi * (gate + 0.044715f * gate * gate * gate);
      return 0.5f * gate * (1.0f + tanhf(inner)) * up;
    }
    default: {  // kSwigluOai
      gate = fminf(gate, limit);
      up = fminf(fmaxf(up, -limit), limit);
      return (up + 1.0f) * gate / (1.0f + expf(-1.702f * gate));
    }
  }
}

}  // namespace octavo::cuda
