// picture_statistics: what the data filters measure of an RGB picture, in one pass over its bytes.
//
//   Y = 0.299 R + 0.587 G + 0.114 B                                                        (BT.601)
//   sums[0] = sum Y                     sums[1] = sum (max - min) / max(max, 1) over R, G, B of a pixel
//   sums[2] = sum of squared differences of Y between neighbours in a column; sums[3]: in a row
//   sums[4] = sum (Y * [[0, 1, 0], [1, -4, 1], [0, 1, 0]])^2      over the pixels that have all neighbours
//   sums[5] = sum |Y * [[1, -2, 1], [-2, 4, -2], [1, -2, 1]]|     over the same
//   histogram[c][v] = number of pixels whose colour c is v
//
// Arithmetic in float32, sums of rows as trees, over rows in float64. Traffic: 1 read, 1 write of Y.
#pragma once
#include "common/cpu_dispatch.h"

namespace qif {

struct PictureStatistics {
  const uint8_t* rgb;     // [height, width, 3]
  float* luma;            // [height, width]
  int64_t* histogram;     // [3, 256]
  double* sums;           // [6]
  int64_t height, width;  // at least 1
};

QIF_DECLARE_CPU(picture_statistics, PictureStatistics)

}  // namespace qif
