// One row of the VAE's channel norm with SiLU: shared by channel_norm_silu and the convolution that begins with it.
#pragma once
#include "common/exponential.h"

namespace qif {
namespace QIF_ISA {

constexpr double kSmallestNorm = 1e-12;

// The sum of squares of a row.
template <class A, class T>
inline A square_sum(const T* x, int64_t n) {
  return reduce<A>(n, [&](auto lane, int64_t i) {
    const auto v = load<typename decltype(lane)::type>(x + i);
    return decltype(+v)(v * v);
  });
}

// gamma, bias: of the type of the arithmetic; bias null for none. `out` may be `x`.
template <class A, class T, class Out>
inline void channel_norm_row(const T* x, const A* gamma, const A* bias, Out* out, int64_t n, bool silu) {
  // In double: what the factor errs by is common to all channels, and would add up in the convolution behind.
  const double norm = std::sqrt(static_cast<double>(square_sum<A>(x, n)));
  const A factor = static_cast<A>(std::sqrt(double(n)) / (norm > kSmallestNorm ? norm : kSmallestNorm));
  each<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    V u = load<V>(x + i) * factor * load<V>(gamma + i);
    if (bias) u += load<V>(bias + i);
    if (silu) u = u / (A(1) + exponential(V(-u)));
    store(out + i, u);
  });
}

}  // namespace QIF_ISA
}  // namespace qif
