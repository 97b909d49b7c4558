// Storage types and the type their arithmetic is done in. Codes are shared with Python (ops/_library.py).
#pragma once
#include <cstdint>

namespace qif {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// 16-bit and 32-bit storage computes in float, float64 in double.
template <class T>
struct AccumOf {
  using type = float;
};
template <>
struct AccumOf<double> {
  using type = double;
};
template <class T>
using Accum = typename AccumOf<T>::type;

}  // namespace qif
