// gate_residual_norm_modulate: residual = x + gate * y; out = LayerNorm(residual) * (1 + scale) + shift.
//
// Both results are returned: `residual` is the stream, `out` the input of the next layer. `residual` is rounded to the
// storage type before the statistics, so that backward can start from the stored tensor; in float16 it saturates at
// +-65504, as the model clips it. Traffic: 2 reads and 2 writes of a row, against 5 and 4 of the separate passes.
// Backward: g = grad_residual + (LayerNorm backward of grad_out); grad_x = g; grad_y = gate * g; grad_gate = sum of
// g * y, grad_shift and grad_scale as in layer_norm_modulate, all reduced over the rows of each segment here.
#pragma once
#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"

namespace qif {

struct GateResidualNormModulate {
  const void *x, *y;                                // [rows, width]
  const void *gate, *shift, *scale;                 // [segments, width]
  int64_t gate_stride, shift_stride, scale_stride;  // elements from one segment to the next
  const int32_t* offsets;                           // [segments + 1]; null: segments of equal length
  void *residual, *out;                             // [rows, width]
  int64_t rows, width, segments;
  double eps;
  int dtype;
};

// The same with `out` once more in float8 e4m3, one scale to a row: value = e4m3 * scale, scale = max |out| / 448.
struct GateResidualNormModulateFp8 {
  GateResidualNormModulate forward;
  void* values;   // [rows, width]
  float* scales;  // [rows]
};

struct GateResidualNormModulateBackward {
  const void *residual, *y;
  const void *gate, *scale;
  int64_t gate_stride, scale_stride;
  const int32_t* offsets;
  const void *grad_residual, *grad_out;       // [rows, width]
  void *grad_x, *grad_y;                      // [rows, width]
  void *grad_gate, *grad_shift, *grad_scale;  // [segments, width]
  int64_t rows, width, segments;
  double eps;
  int dtype;
};

QIF_DECLARE_CPU(gate_residual_norm_modulate_forward, GateResidualNormModulate)
QIF_DECLARE_CPU(gate_residual_norm_modulate_backward, GateResidualNormModulateBackward)
QIF_DECLARE_CUDA(gate_residual_norm_modulate_forward, GateResidualNormModulate)
QIF_DECLARE_CUDA(gate_residual_norm_modulate_fp8_forward, GateResidualNormModulateFp8)
int64_t gate_residual_norm_modulate_backward_scratch(int64_t rows, int64_t width, int64_t segments,
                                                     bool equal);  // bytes
QIF_DECLARE_CUDA(gate_residual_norm_modulate_backward, GateResidualNormModulateBackward)

}  // namespace qif
