// gelu_tanh: out = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3): the tanh approximation of GELU, written
// without the cancellation of 1 + tanh(u) for negative x.
//
// Backward, with s = sigmoid(2u): grad_x = grad_out * (s + 2 x s (1 - s) u'), u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2).
// Arithmetic in float32 (float64 for float64), one rounding on store. `out` may be `x`.
// Traffic: one read and one write. Bound by arithmetic on the CPU, so the exponential is a polynomial of our own.
#pragma once
#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"

namespace qif {

struct GeluTanh {
  const void* x;  // [elements]
  void* out;      // [elements]
  int64_t elements;
  int dtype;
};

struct GeluTanhBackward {
  const void *x, *grad_out;
  void* grad_x;
  int64_t elements;
  int dtype;
};

QIF_DECLARE_CPU(gelu_tanh_forward, GeluTanh)
QIF_DECLARE_CPU(gelu_tanh_backward, GeluTanhBackward)
QIF_DECLARE_CUDA(gelu_tanh_forward, GeluTanh)
QIF_DECLARE_CUDA(gelu_tanh_backward, GeluTanhBackward)

}  // namespace qif
