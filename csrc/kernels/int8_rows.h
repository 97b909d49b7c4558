// int8_rows: rows of a matrix in 8 bits, each with one scale, after a rotation that spreads outliers (ConvRot).
//
//   v = gelu_tanh(x) if `gelu`, else x                              float32
//   r = every `group` values of v times the regular Hadamard matrix H, see below; group 1: r = v
//   scale = max |r| / 127 over the row
//   value = round to even(r * (127 / max |r|)) + 128                uint8, 1 to 255
// In float8, on a GPU: scale = max |r| / 448, value = e4m3 nearest to r * (448 / max |r|), ties to even; at most 448.
//
// H = H4 x H4 x ... with H4 = 1/2 [[1 1 1 -1], [1 1 -1 1], [1 -1 1 1], [-1 1 1 1]] is symmetric and its own inverse, so
// that products of rotated rows with rotated weights are those of the rows (arXiv 2512.03673). Its rows add up to the
// same, so that a constant is spread as well. Applied as one stage for each factor, the nearest neighbours first:
// r[i] = ((r[0] + r[1]) + (r[2] + r[3])) / 2 - r[3 - i], which is the same on every instruction set.
//
// A row whose largest magnitude is below 1e-30 is zero; one that is not finite has a scale that is not.
// Values are written as the products read them. On a CPU in tiles, [rows / 16][width / 64][16][64], of rows and width
// filled up to whole tiles; on a GPU in rows, the width filled up to a multiple of 64. What is filled up has any value,
// in float8 one that times zero is zero. Every operation is one of IEEE's, in a stated order, and GELU's exponential a
// polynomial of our own: CPUs and GPUs get the same bits. On a GPU, where a row lies in shared memory, it is at most
// kInt8MostWidth wide. Traffic: x once, a quarter or half of that written.
#pragma once
#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"

namespace qif {

constexpr int64_t kInt8Rows = 16, kInt8Depth = 64;

struct Int8Rows {
  const void* x;   // [rows, width]
  int64_t stride;  // elements from one row to the next
  uint8_t* values;
  float* scales;               // [rows]
  int64_t rows, width, group;  // group: 1, 4, 16, 64 or 256, divides width
  bool gelu;
  int dtype;    // not float64
  bool float8;  // on a GPU
};

constexpr int64_t kInt8MostWidth = 24576;

QIF_DECLARE_CPU(int8_rows, Int8Rows)
QIF_DECLARE_CUDA(int8_rows, Int8Rows)

}  // namespace qif
