// The transforms of F(4x4, 3x3) on the points 0, +-a, +-b, infinity, for a vector or one value.
#pragma once
#include <type_traits>

#include "common/vec.h"

namespace qif {
namespace QIF_ISA {

constexpr int kOut = 4, kSide = 6, kPoints = kSide * kSide;
constexpr double kA = 0.625, kB = 1.5;  // ops/conv3x3.py has the same

// t = B^T d; a row of B^T holds the coefficients of prod(x - q) over the points q but its own.
template <class A, class V>
inline void input_1d(const V (&d)[kSide], V (&t)[kSide]) {
  constexpr A a = A(kA), b = A(kB), a2 = a * a, b2 = b * b;
  const V odd_a = a * (d[3] - b2 * d[1]), even_a = d[4] - b2 * d[2];
  const V odd_b = b * (d[3] - a2 * d[1]), even_b = d[4] - a2 * d[2];
  t[0] = (a2 * b2) * d[0] - (a2 + b2) * d[2] + d[4];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = (a2 * b2) * d[1] - (a2 + b2) * d[3] + d[5];
}

// y = A^T m; a row of A^T holds the powers 0 to 3 of the points.
template <class A, class V>
inline void output_1d(const V (&m)[kSide], V (&y)[kOut]) {
  constexpr A a = A(kA), b = A(kB), a2 = a * a, b2 = b * b;
  const V sum_a = m[1] + m[2], difference_a = a * (m[1] - m[2]);
  const V sum_b = m[3] + m[4], difference_b = b * (m[3] - m[4]);
  y[0] = m[0] + sum_a + sum_b;
  y[1] = difference_a + difference_b;
  y[2] = a2 * sum_a + b2 * sum_b;
  y[3] = a2 * difference_a + b2 * difference_b + m[5];
}

template <class V>
struct ScalarOf {
  using type = std::remove_reference_t<decltype(V{}[0])>;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};

// get(y, x) gives a pixel of the 6x6 tile, put(point, v) takes one of the 36 results.
template <class V, class Get, class Put>
inline void transform_input(Get&& get, Put&& put) {
  using A = typename ScalarOf<V>::type;
  V half[kSide][kSide];
  for (int x = 0; x < kSide; ++x) {
    V d[kSide], t[kSide];
    for (int y = 0; y < kSide; ++y) d[y] = get(y, x);
    input_1d<A>(d, t);
    for (int y = 0; y < kSide; ++y) half[y][x] = t[y];
  }
  for (int y = 0; y < kSide; ++y) {
    V t[kSide];
    input_1d<A>(half[y], t);
    for (int x = 0; x < kSide; ++x) put(y * kSide + x, t[x]);
  }
}

// get(point) gives one of the 36 products, put(y, x, v) takes a pixel of the 4x4 tile.
template <class V, class Get, class Put>
inline void transform_output(Get&& get, Put&& put) {
  using A = typename ScalarOf<V>::type;
  V half[kOut][kSide];
  for (int x = 0; x < kSide; ++x) {
    V m[kSide], y[kOut];
    for (int i = 0; i < kSide; ++i) m[i] = get(i * kSide + x);
    output_1d<A>(m, y);
    for (int i = 0; i < kOut; ++i) half[i][x] = y[i];
  }
  for (int i = 0; i < kOut; ++i) {
    V y[kOut];
    output_1d<A>(half[i], y);
    for (int x = 0; x < kOut; ++x) put(i, x, y[x]);
  }
}

}  // namespace QIF_ISA
}  // namespace qif
