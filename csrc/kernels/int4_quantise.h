// int4_quantise: a matrix of rotated weights in the 4 bits of int4_tile.h, with one scale for a row of it and the sums
// of its integers. No data is needed: every 16 numbers get the codes of the smallest squared error that was found, of
// some twenty times that are tried.
//   scale[c] = largest |w| of the row / (127 * 120 / 128)
#pragma once
#include "common/cpu_dispatch.h"

namespace qif {

struct Int4Quantise {
  const float* weight;  // [columns, depth], the depth a multiple of 16
  uint8_t* packed;      // [columns / 16][depth / 64][576]
  float* scales;        // [columns]
  int32_t* sums;        // [columns]
  int64_t columns, depth;
};

// The 8-bit integers, [columns / 16][depth / 64][16][16][4], as int8_pack lays them out.
struct Int4Unpack {
  const uint8_t* packed;
  int8_t* out;
  int64_t tiles;
};

QIF_DECLARE_CPU(int4_quantise, Int4Quantise)
QIF_DECLARE_CPU(int4_unpack_all, Int4Unpack)

}  // namespace qif
