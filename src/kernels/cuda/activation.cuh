// Activation of kernels/backend.h in float32, without branches: unrolled over a tile's
// accumulators, a switch with tanhf in it made 142 KB of instructions.
#pragma once

#include "kernels/backend.h"

namespace octavo::cuda {

// Each is g * sigmoid(s) * u, since (1 + tanh(y)) / 2 = sigmoid(2 y).
class Activator {
 public:
  __device__ __forceinline__ Activator(Activation activation, float limit) {
    constexpr float kTwoRoots = 2 * 0.7978845608028654f;  // of 2 / pi
    const bool gelu = activation == Activation::kGeluTanh;
    const bool swiglu_oai = activation == Activation::kSwigluOai;
    linear_ = gelu ? kTwoRoots : swiglu_oai ? 1.702f : 1.0f;
    cubic_ = gelu ? kTwoRoots * 0.044715f : 0.0f;
    limit_ = swiglu_oai ? limit : INFINITY;
    added_ = swiglu_oai ? 1.0f : 0.0f;
  }
  __device__ __forceinline__ float operator()(float gate, float up) const {
    const float g = Min(gate, limit_);
    const float u = Max(Min(up, limit_), -limit_) + added_;
    const float square = fminf(g * g, 1e30f);  // lest 0 * infinity be added
    const float s = g * fmaf(cubic_, square, linear_);
    return __fdividef(g, 1.0f + __expf(-s)) * u;
  }

 private:
  // NaN if either is.
  static __device__ __forceinline__ float Min(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
  }
  static __device__ __forceinline__ float Max(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
  }

  float linear_, cubic_, limit_, added_;
};

}  // namespace octavo::cuda
