// guided_step: true classifier-free guidance with per-token norm rescale, and the Euler step, in one pass.
//
//   v = uncond + guidance * (cond - uncond);  v *= |cond| / |v| over the last dimension (if rescale)
//   out = sample + dt * v                     without uncond: v = cond
//
// A token whose combined v is exactly zero stays zero. dt is one value per segment of rows (mixed schedules).
// Arithmetic in float32 (float64 for float64), one rounding on store. Traffic: 3 reads and 1 write.
#pragma once
#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"

namespace qif {

struct GuidedStep {
  const void *sample, *cond, *uncond;  // [rows, channels]; uncond null: no guidance
  const float* dt;                     // [segments]
  const int32_t* offsets;              // [segments + 1]; null: segments of equal length
  void* out;                           // [rows, channels]
  int64_t rows, channels, segments;
  double guidance;
  int rescale, dtype;
};

struct GuidedStepBackward {
  GuidedStep forward;             // out holds the incoming gradient
  void *grad_cond, *grad_uncond;  // [rows, channels]; the gradient of sample is the incoming one
};

QIF_DECLARE_CPU(guided_step_forward, GuidedStep)
QIF_DECLARE_CPU(guided_step_backward, GuidedStepBackward)
QIF_DECLARE_CUDA(guided_step_forward, GuidedStep)
QIF_DECLARE_CUDA(guided_step_backward, GuidedStepBackward)

}  // namespace qif
