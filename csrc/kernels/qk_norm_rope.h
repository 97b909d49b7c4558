// qk_norm_rope: per-head RMSNorm and interleaved RoPE of q and k of both streams, written with v into joint buffers.
//
//   n = x * weight / sqrt(mean(x^2) + eps)                     over each head's `head_dim` values
//   out[2i] = n[2i] cos - n[2i+1] sin;  out[2i+1] = n[2i+1] cos + n[2i] sin
//
// Row r of a stream belongs to the sample s with cu[s] <= r < cu[s + 1]; the joint order is [text, image] in each
// sample, so text rows move down by the image rows of earlier samples, and image rows by the text rows up to and
// including their own sample. Arithmetic in float32 (float64 for float64), one rounding on store.
// Traffic: one read and one write of q, k, v. Backward reads q, k again and sums the weight gradients here.
#pragma once
#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"

namespace qif {

struct QkNormRopeStream {
  const void *q, *k, *v;                 // [rows, heads, head_dim], contiguous in the last two; q null: not computed
  int64_t q_stride, k_stride, v_stride;  // elements from one row to the next
  const void *q_weight, *k_weight;       // [head_dim]
  const float* rope;                     // [rows, head_dim / 2, 2]: cos, sin
  const int32_t* cu;                     // [samples + 1]
  int64_t rows;
};

struct QkNormRope {
  QkNormRopeStream txt, img;
  void *q, *k, *v;  // [txt.rows + img.rows, heads, head_dim]; q of image rows only if txt.q is null
  int64_t samples, heads, head_dim;
  double eps;
  int dtype;
};

struct QkNormRopeStreamGrad {
  void *q, *k, *v;            // [rows, heads, head_dim]; q null where the stream's q was
  void *q_weight, *k_weight;  // [head_dim]
};

struct QkNormRopeBackward {
  QkNormRope forward;  // q, k, v hold the incoming gradients
  QkNormRopeStreamGrad txt, img;
};

QIF_DECLARE_CPU(qk_norm_rope_forward, QkNormRope)
QIF_DECLARE_CPU(qk_norm_rope_backward, QkNormRopeBackward)
QIF_DECLARE_CUDA(qk_norm_rope_forward, QkNormRope)
int64_t qk_norm_rope_backward_scratch(int64_t txt_rows, int64_t img_rows, int64_t head_dim);  // bytes
QIF_DECLARE_CUDA(qk_norm_rope_backward, QkNormRopeBackward)

}  // namespace qif
