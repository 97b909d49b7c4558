// c [m, 32] = a [m, k] b [k, 32]: the matrix product that the convolution is made of, its results kept in registers.
#pragma once
#include "common/vec.h"

namespace qif {
namespace QIF_ISA {

constexpr int64_t kPanelWidth = 32;
// Two vectors of results per row; with two of b and one of a they fill the registers: 32, or 16.
#if defined(__AVX512F__)
constexpr int kMostRows = 14;
#else
constexpr int kMostRows = 6;
#endif

// Each result is one sum over k in order, whatever the other rows are.
template <class A, int kRows>
inline void product_rows(const A* a, int64_t k, const A* b, A* c, int64_t c_stride) {
  using V = Vec<A>;
  constexpr int L = kLanes<A>;
  V sum[kRows][2] = {};
  for (int64_t i = 0; i < k; ++i) {
    const V b0 = load<V>(b + i * kPanelWidth), b1 = load<V>(b + i * kPanelWidth + L);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = splat<V>(a[r * k + i]);
      sum[r][0] = multiply_add(x, b0, sum[r][0]);
      sum[r][1] = multiply_add(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(c + r * c_stride, sum[r][0]);
    store(c + r * c_stride + L, sum[r][1]);
  }
}

// The kernel for `rows` rows, 1 <= rows <= kRows.
template <class A, int kRows = kMostRows>
inline void product_rows_of(int64_t rows, const A* a, int64_t k, const A* b, A* c, int64_t c_stride) {
  if constexpr (kRows == 1) {
    product_rows<A, 1>(a, k, b, c, c_stride);
  } else if (rows == kRows) {
    product_rows<A, kRows>(a, k, b, c, c_stride);
  } else {
    product_rows_of<A, kRows - 1>(rows, a, k, b, c, c_stride);
  }
}

// a: [m, k] contiguous; b: [k, 32] contiguous; c: m rows of 32, `c_stride` apart.
template <class A>
inline void panel_product(const A* a, int64_t k, const A* b, A* c, int64_t c_stride, int64_t m) {
  const int64_t parts = (m + kMostRows - 1) / kMostRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = m * part / parts, end = m * (part + 1) / parts;
    for (int64_t j = 0; j < kPanelWidth; j += 2 * kLanes<A>)
      product_rows_of<A>(end - begin, a + begin * k, k, b + j, c + begin * c_stride + j, c_stride);
  }
}

}  // namespace QIF_ISA
}  // namespace qif
