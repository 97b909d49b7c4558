// e^x as a polynomial: the library's is too slow for kernels that are bound by arithmetic.
#pragma once
#include "common/vec.h"

namespace qif {
namespace QIF_ISA {

template <class V>
struct BitsOf {
  using type = U32;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};

// e^x for x in [-87, 88], clamped to it; error below 2 units in the last place. The same operations for a vector and
// for one value, so that an element does not depend on where it lies.
template <class V>
inline V exponential(V x) {
  const V low = splat<V>(-87.0f), high = splat<V>(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, from where it moves into the exponent.
  const V shifted = x * 1.44269504089f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  typename BitsOf<V>::type bits, power;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&power, &shifted, sizeof(power));
  bits += power << 23;
  V out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline double exponential(double x) { return std::exp(x); }
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace QIF_ISA
}  // namespace qif
