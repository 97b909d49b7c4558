// conv3x3: out = conv(f(x), w) + bias + residual, a 3x3 convolution with stride 1 and one zero on each side, channels
// last, by Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308); f is channel_norm_silu with `gamma`, or nothing.
// `upsample`: of f(x) enlarged twice by nearest neighbour. Row 2i + p of that convolution sees rows i - 1, i, i + 1 of
// x with weights (w0, w1 + w2, 0) for p = 0 and (0, w0 + w1, w2) for p = 1, so the result is four convolutions of the
// small image, its four phases.
//
// 1-D: y = A^T ((G w) * (B^T d)), 6 products for 4 results, on the points 0, +-a, +-b, infinity with a = 5/8, b = 3/2.
// These are exact in binary and lose less than half of what the usual 0, +-1, +-2 lose. 2-D: 36 products for 16 results
// instead of 144; of an upsampled phase only 25, as its zeros make one of the six points vanish in each direction.
//
// Python transforms the weights: `packed` holds (G w G^T) as [36][phases * panels][channels][kPanel], the output
// channels of each phase in panels of kPanel, the last one filled up with zeros. Arithmetic in float32 (float64 for
// float64), one rounding on store. What a pixel gives does not depend on the blocks that the work is split into.
#pragma once
#include "common/cpu_dispatch.h"

namespace qif {

constexpr int64_t kPanel = 32;

struct Conv3x3 {
  const void* x;         // [batch, height, width, in_channels]
  const void* packed;    // float32; float64 for float64
  const void* bias;      // [out_channels] or null
  const void* residual;  // shape of out, or null
  const void* gamma;     // [in_channels] or null
  void* out;             // [batch, height, width, out_channels], twice the height and width if `upsample`
  int64_t batch, height, width, in_channels, out_channels;
  bool upsample;
  bool pad_rows;  // false: x brings the rows above and below itself, and the result has two rows (upsample: 4) less
  int dtype;
};

QIF_DECLARE_CPU(conv3x3_forward, Conv3x3)

}  // namespace qif
