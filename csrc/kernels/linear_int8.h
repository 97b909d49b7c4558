// linear_int8: products of 8-bit rows with 8-bit weights, summed in 32-bit integers.
//   y[r][c] = (sum_d (values[r][d] - 128) weight[c][d]) * (scales[r] weight_scales[c]) + bias[c]      float32
//   out = y, or residual + gate[segment of the row] * y, which saturates in float16; one rounding
//
// Rows come from int8_rows. On a CPU weights are packed once by int8_pack: [columns / 16][depth / 64][16][16][4],
// four numbers of the depth of 16 columns together, which is a row of the tile unit's second operand and a vector of
// the dot-product instructions; columns and depth are filled up with zeros. The instructions multiply unsigned numbers
// with signed ones: sums of the weights, times 128, are taken off the integers. The integers are exact (127 * 255 *
// 66000 fits), so that all units give the same bits.
//
// Weights in 4 bits (int4_tile.h) become integers of 8, two panels of 16 columns and kDeep tiles of the depth at a
// time, in the first-level cache: once for each block of some hundred rows.
//
// On a GPU rows and weights in 8 bits are matrices [rows, depth] and [columns, depth], the depth filled up to a
// multiple of 64, weights with zeros: what mma.m16n8k32 takes by way of ldmatrix, and Hopper's wgmma by tensor maps
// (cutlass_kernels/linear_int8_sm90.cuh). Weights in 4 bits are the same tiles. The same operations follow: the same
// bits again.
//
// In float8 (linear_fp8, on a GPU from sm_89 on) rows and weights are e4m3 in the same matrices, summed in float32;
// there is no offset and `sums` is not read. How many digits of a sum tensor cores keep, and in which order they add,
// is theirs.
//
// Traffic: rows once, weights once for each block of some hundred rows; 2 * rows * columns * depth operations.
#pragma once
#include <vector>

#include "common/cpu_dispatch.h"
#include "common/cuda_dispatch.h"
#include "kernels/int8_rows.h"

namespace qif {

struct Int8Product {
  const uint8_t* values;  // integers plus 128, or e4m3
  const float* scales;
  const int8_t* weight;          // packed, on a GPU rows; or e4m3
  const float* weight_scales;    // [columns]
  const int32_t* sums;           // [columns] of the weights
  const void* bias;              // [columns] or null
  void* out;                     // [rows, columns]
  int64_t rows, columns, depth;  // on a GPU the filled up depth
  // null, or both
  const void *residual, *gate;  // [rows, columns], [segments, columns]
  int64_t gate_stride;          // elements from one segment to the next
  const int32_t* offsets;       // [segments + 1] first row of each segment; null: segments of equal length
  int64_t segments;
  int dtype;  // of bias, out, residual and gate; not float64
  bool four;  // the weight is in the 4 bits of int4_tile.h, which become 8 on the way
};

constexpr int64_t kInt8Columns = 16;

struct Int8Pack {
  const int8_t* weight;  // [columns, depth]
  int8_t* packed;
  int32_t* sums;
  int64_t columns, depth;
};

QIF_DECLARE_CPU(int8_pack, Int8Pack)

QIF_DECLARE_CUDA(linear_int8, std::vector<Int8Product>)
QIF_DECLARE_CUDA(linear_fp8, std::vector<Int8Product>)

// On Hopper: weights in 8 bits, results of 16, as many columns as a multiple of 8; what is read by tensor maps or in
// pairs is aligned to 16 bytes or to pairs. csrc/cutlass_kernels.
int linear_int8_sm90(const std::vector<Int8Product>& products, void* stream);

// The units that multiply, the best last; one for each build of linear_int8_unit.cpp.
enum class Int8Unit { kPlain, kAvx2, kAvxVnni, kAvx512Vnni, kAmx };
bool int8_unit_available(Int8Unit unit);
void linear_int8(const Int8Product* products, int64_t count, Int8Unit unit);

#define QIF_INT8_UNIT(NAMESPACE)                                \
  namespace NAMESPACE {                                         \
  void linear_int8(const Int8Product* products, int64_t count); \
  }
QIF_INT8_UNIT(int8_plain)
QIF_INT8_UNIT(int8_avx2)
QIF_INT8_UNIT(int8_avx_vnni)
QIF_INT8_UNIT(int8_avx512_vnni)
QIF_INT8_UNIT(int8_amx)
#undef QIF_INT8_UNIT

}  // namespace qif
