// channel_norm_silu: u = x / max(|x|_2, 1e-12) * sqrt(C) * gamma + bias over the last dimension, out = u * sigmoid(u),
// or out = u. The norm of the VAE: no epsilon under the root, so a row of zeros gives zeros.
//
// Arithmetic in float32 (float64 for float64), one rounding on store.
// Backward, with r = sqrt(C) / max(|x|_2, 1e-12), s = sigmoid(u), d = grad_out * (s + u s (1 - s)): grad_bias and
// grad_gamma are the sums of d and d * x * r over all rows; grad_x = r * (d gamma - x * sum(d gamma x) / |x|_2^2), the
// second term only where |x|_2 is above 1e-12.
// Traffic: one read and one write of x; 2 more reads backward. CUDA: no float64.
//
// add_channel_norm_silu, on CUDA: the same of s = x + added + residual, rounded once, without the second bias; or s
// itself. What a convolution leaves to do, in one pass.
#pragma once
#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"

namespace qif {

struct ChannelNormSilu {
  const void* x;             // [rows, channels]
  const void *gamma, *bias;  // [channels]; bias may be null
  void* out;                 // [rows, channels]; may be x
  int64_t rows, channels;
  bool silu;
  int dtype;
  const void *added, *residual;  // of add_channel_norm_silu: [channels], [rows, channels]; null elsewhere, or for none
};

struct ChannelNormSiluBackward {
  const void *x, *gamma, *bias, *grad_out;
  void *grad_x, *grad_gamma, *grad_bias;  // grad_bias null where bias is
  int64_t rows, channels;
  bool silu;
  int dtype;
};

QIF_DECLARE_CPU(channel_norm_silu_forward, ChannelNormSilu)
QIF_DECLARE_CPU(channel_norm_silu_backward, ChannelNormSiluBackward)
QIF_DECLARE_CUDA(channel_norm_silu_forward, ChannelNormSilu)
QIF_DECLARE_CUDA(channel_norm_silu_backward, ChannelNormSiluBackward)
int64_t channel_norm_silu_backward_scratch(int64_t rows, int64_t channels);  // bytes

}  // namespace qif
