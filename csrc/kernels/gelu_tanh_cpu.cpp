#include "common/parallel.h"
#include "common/vec.h"
#include "kernels/gelu_tanh.h"
#include "kernels/gelu_tanh_value.h"

namespace qif {
namespace QIF_ISA {

template <class T>
static void forward(const GeluTanh& p) {
  using A = Accum<T>;
  parallel_ranges(p.elements, p.elements, [&](int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(p.x) + begin;
    T* out = static_cast<T*>(p.out) + begin;
    each<A>(end - begin, [&](auto lane, int64_t i) {
      using V = typename decltype(lane)::type;
      const V v = load<V>(x + i);
      store(out + i, V(gelu_tanh_value<V, A>(v)));
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
