// What the products of linear_group.h do on their accumulators, for the kernels of every architecture.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include <type_traits>

#include "kernels/linear_group.h"

namespace qif {
namespace gemm {

template <class T>
struct EpilogueParams {
  const T *bias = nullptr, *gate = nullptr;
  int64_t gate_stride = 0;
  const int32_t* offsets = nullptr;
  int rows = 0, segments = 1;

  // The segment that holds `row`; empty segments hold none.
  CUTLASS_DEVICE int segment(int row) const {
    if (offsets == nullptr) return row / (rows / segments);
    int low = 0, high = segments - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (offsets[middle + 1] > row)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

// x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): GELU's tanh form without the cancellation of 1 + tanh.
CUTLASS_DEVICE float gelu_tanh(float x) {
  const float e = -1.5957691216057308f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(e > 87.0f ? 87.0f : e));  // NaN stays NaN
}

// float16 saturates instead of overflowing to infinity; NaN stays NaN.
template <class T>
CUTLASS_DEVICE float saturate(float v) {
  if constexpr (std::is_same_v<T, cutlass::half_t>) {
    v = v > 65504.0f ? 65504.0f : v;
    v = v < -65504.0f ? -65504.0f : v;
  }
  return v;
}

template <LinearEpilogue E, class T>
CUTLASS_DEVICE float finish(float accumulator, float bias, float gate, float residual) {
  const float y = accumulator + bias;
  if constexpr (E == LinearEpilogue::kGelu) return gelu_tanh(y);
  if constexpr (E == LinearEpilogue::kGateResidual) return saturate<T>(residual + gate * y);
  return y;
}

template <class T>
inline EpilogueParams<T> epilogue_params(const Linear& l) {
  return {static_cast<const T*>(l.bias), static_cast<const T*>(l.gate), l.gate_stride, l.offsets,
          static_cast<int>(l.rows),      static_cast<int>(l.segments)};
}

}  // namespace gemm
}  // namespace qif
