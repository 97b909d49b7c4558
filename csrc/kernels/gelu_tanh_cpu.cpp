#include "common/parallel.h"
#include "common/vec.h"
#include "kernels/gelu_tanh.h"

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

template <class A>
constexpr A kRoot = A(0.79788456080286535588);  // sqrt(2 / pi)
template <class A>
constexpr A kCube = A(0.044715);

// e = exp(-2u); sigmoid(2u) = 1 / (1 + e).
template <class V, class A>
inline V exp_minus_2u(V x) {
  return exponential(V(A(-2) * kRoot<A> * (x + kCube<A> * x * x * x)));
}

template <class T>
static void forward(const GeluTanh& p) {
  using A = Accum<T>;
  parallel_ranges(p.elements, p.elements, [&](int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(p.x) + begin;
    T* out = static_cast<T*>(p.out) + begin;
    each<A>(end - begin, [&](auto lane, int64_t i) {
      using V = typename decltype(lane)::type;
      const V v = load<V>(x + i);
      store(out + i, V(v / (A(1) + exp_minus_2u<V, A>(v))));
    });
  });
}

template <class T>
static void backward(const GeluTanhBackward& p) {
  using A = Accum<T>;
  parallel_ranges(p.elements, p.elements, [&](int64_t begin, int64_t end) {
    const T *x = static_cast<const T*>(p.x) + begin, *grad_out = static_cast<const T*>(p.grad_out) + begin;
    T* grad_x = static_cast<T*>(p.grad_x) + begin;
    each<A>(end - begin, [&](auto lane, int64_t i) {
      using V = typename decltype(lane)::type;
      const V v = load<V>(x + i), e = exp_minus_2u<V, A>(v);
      const V s = A(1) / (A(1) + e), rest = e * s;  // rest = 1 - s, without the cancellation
      const V slope = kRoot<A> * (A(1) + A(3) * kCube<A> * v * v);
      store(grad_x + i, V(load<V>(grad_out + i) * (s + A(2) * v * s * rest * slope)));
    });
  });
}

void gelu_tanh_forward(const GeluTanh& p) { QIF_DISPATCH(p.dtype, T, forward<T>(p)) }
void gelu_tanh_backward(const GeluTanhBackward& p) { QIF_DISPATCH(p.dtype, T, backward<T>(p)) }

}  // namespace QIF_ISA
}  // namespace qif
