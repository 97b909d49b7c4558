// GELU in its tanh approximation, of a vector or one value: x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
#pragma once
#include "common/exponential.h"
#include "common/vec.h"

namespace qif {
namespace QIF_ISA {

template <class A>
constexpr A kRoot = A(0.79788456080286535588);  // sqrt(2 / pi)
template <class A>
constexpr A kCube = A(0.044715);

// e = exp(-2u); sigmoid(2u) = 1 / (1 + e).
template <class V, class A>
inline V exp_minus_2u(V x) {
  return exponential(V(A(-2) * kRoot<A> * (x + kCube<A> * x * x * x)));
}

template <class V, class A>
inline V gelu_tanh_value(V x) {
  return x / (A(1) + exp_minus_2u<V, A>(x));
}

}  // namespace QIF_ISA
}  // namespace qif
