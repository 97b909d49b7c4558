// layer_norm_modulate: out = LayerNorm(x) * (1 + scale) + shift, LayerNorm without affine parameters.
//
// Statistics and arithmetic in float32 (float64 for float64), one rounding on store.
// Backward, with d = grad_out * (1 + scale): grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)); grad_shift and
// grad_scale are the sums of grad_out and grad_out * xhat over the rows of each segment, reduced here.
// Traffic: one read and one write of x; 2 more reads backward.
#pragma once
#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"

namespace qif {

struct LayerNormModulate {
  const void* x;                       // [rows, width]
  const void *shift, *scale;           // [segments, width]
  int64_t shift_stride, scale_stride;  // elements from one segment to the next
  const int32_t* offsets;              // [segments + 1] first row of each segment; null: segments of equal length
  void* out;                           // [rows, width]
  int64_t rows, width, segments;
  double eps;
  int dtype;
};

// The same with `out` once more in float8 e4m3, one scale to a row: value = e4m3 * scale, scale = max |out| / 448.
struct LayerNormModulateFp8 {
  LayerNormModulate forward;
  void* values;   // [rows, width]
  float* scales;  // [rows]
};

struct LayerNormModulateBackward {
  const void *x, *scale;
  int64_t scale_stride;
  const int32_t* offsets;
  const void* grad_out;           // [rows, width]
  void* grad_x;                   // [rows, width]
  void *grad_shift, *grad_scale;  // [segments, width]
  int64_t rows, width, segments;
  double eps;
  int dtype;
};

QIF_DECLARE_CPU(layer_norm_modulate_forward, LayerNormModulate)
QIF_DECLARE_CPU(layer_norm_modulate_backward, LayerNormModulateBackward)
QIF_DECLARE_CUDA(layer_norm_modulate_forward, LayerNormModulate)
QIF_DECLARE_CUDA(layer_norm_modulate_fp8_forward, LayerNormModulateFp8)
int64_t layer_norm_modulate_backward_scratch(int64_t rows, int64_t width, int64_t segments, bool equal);  // bytes
QIF_DECLARE_CUDA(layer_norm_modulate_backward, LayerNormModulateBackward)

}  // namespace qif
