// conv2d: out = conv(x, w) + bias + residual, stride 1, zeros around, channels last.
//
// float16 and bfloat16 on CUDA only (csrc/cutlass_kernels/conv2d.cu), channels in and out multiples of 8 and rows
// aligned to 16 bytes; elsewhere Python uses torch's convolution. Products of 16-bit values summed in float32, bias and
// residual added there, one rounding on store.
// Traffic: x, w and residual once, out once; the residual sum costs no pass of its own.
#pragma once
#include <cstdint>

#include "common/cuda_dispatch.h"

namespace qif {

struct Conv2d {
  const void* x;         // [batch, height, width, in_channels]
  const void* weight;    // [out_channels, kernel_height, kernel_width, in_channels]
  const void* bias;      // [out_channels] or null
  const void* residual;  // shape of out, or null
  void* out;             // [batch, height + 2 pad - kernel + 1, ..., out_channels]
  int64_t batch, height, width, in_channels, out_channels, kernel_height, kernel_width, pad_height, pad_width;
  int dtype;
};

QIF_DECLARE_CUDA(conv2d_forward, Conv2d)

}  // namespace qif
