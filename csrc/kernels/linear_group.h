// linear_qkv, linear_gelu, linear_gate_residual: up to six products x W^T + bias of one depth and number of columns in
// one launch, each with its own rows and weights, and with what follows them done on the accumulators:
//   none           out = y (linear_qkv)
//   gelu           out = gelu_tanh(y)
//   gate_residual  out = residual + gate[segment of the row] * y; in float16 it saturates at +-65504
// where y = x W^T + bias in float32, rounded only as part of `out`.
//
// The image and the text stream of a block are problems of one launch: a few text rows read as many weights as the
// image rows do, and alone they would leave most of the GPU idle while they wait for memory. Traffic: every weight and
// every input once per group of tiles that shares it, every output once; 2 * rows * columns * depth operations.
//
// float16 and bfloat16 on CUDA only (csrc/cutlass_kernels); elsewhere Python uses torch's products.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace qif {

constexpr int kMaxLinears = 6;  // linear_qkv's; the others take two

enum class LinearEpilogue : int { kNone = 0, kGelu = 1, kGateResidual = 2 };

struct Linear {
  const void *x, *weight, *bias;  // [rows, depth], [columns, depth], [columns]
  void* out;                      // [rows, columns]
  int64_t rows;
  // gate_residual alone:
  const void *residual, *gate;  // [rows, columns], [segments, columns]
  int64_t gate_stride;          // elements from one segment to the next
  const int32_t* offsets;       // [segments + 1] first row of each segment; null: segments of equal length
  int64_t segments;
};

struct LinearGroup {
  Linear linear[kMaxLinears];
  int count;
  int64_t columns, depth;  // multiples of 8; all pointers to matrices are aligned to 16 bytes
  int tile;                // 0: large tiles for many rows; 1: smaller ones
  int dtype;               // float16 or bfloat16
};

// Each queues the work on `stream` and returns 0 or a cudaError_t; of the group's epilogue it is named after. _sm90
// runs on Hopper, _sm80 on the other GPUs.
int linear_qkv_sm80(const LinearGroup& group, void* stream);
int linear_qkv_sm90(const LinearGroup& group, void* stream);
int linear_gelu_sm80(const LinearGroup& group, void* stream);
int linear_gelu_sm90(const LinearGroup& group, void* stream);
int linear_gate_residual_sm80(const LinearGroup& group, void* stream);
int linear_gate_residual_sm90(const LinearGroup& group, void* stream);

}  // namespace qif
