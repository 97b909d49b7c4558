// One row of LayerNorm and modulation, forward and backward: shared by the two ops that end in it.
#pragma once
#include "common/segments.h"
#include "common/vec.h"

namespace qif {
namespace QIF_ISA {

// Rows per partial sum of a broadcast gradient. Chunks start at segment starts and do not depend on the thread count,
// so the same rows give the same bits alone, in a batch, and on any number of threads.
constexpr int64_t kChunkRows = 64;

template <class T, class A>
inline void widen_row(const T* src, A* dst, int64_t n) {
  each<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    store(dst + i, load<V>(src + i));
  });
}

template <class A>
struct RowStats {
  A mean, rstd;
};

// Two passes over a row that is in L1: E[(x - mean)^2], never E[x^2] - mean^2.
template <class A>
inline RowStats<A> row_stats(const A* x, int64_t n, double eps) {
  const A mean = reduce<A>(n, [&](auto lane, int64_t i) { return load<typename decltype(lane)::type>(x + i); }) / A(n);
  const A var = reduce<A>(n,
                          [&](auto lane, int64_t i) {
                            using V = typename decltype(lane)::type;
                            V d = load<V>(x + i) - mean;
                            return V(d * d);
                          }) /
                A(n);
  return {mean, A(1) / std::sqrt(var + A(eps))};
}

// out = (x - mean) * rstd * (1 + scale) + shift
template <class T, class A>
inline void norm_modulate_row(const A* x, const A* shift, const A* scale, T* out, int64_t n, double eps) {
  const RowStats<A> s = row_stats(x, n, eps);
  each<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    V xhat = (load<V>(x + i) - s.mean) * s.rstd;
    store(out + i, V(xhat * (A(1) + load<V>(scale + i)) + load<V>(shift + i)));
  });
}

// grad_x = rstd * (d - mean(d) - xhat * mean(d * xhat)) with d = grad_out * (1 + scale), added to `grad_x`.
// Adds this row to the sums grad_shift += grad_out and grad_scale += grad_out * xhat.
template <class T, class A>
inline void norm_modulate_row_backward(const A* x, const A* scale, const T* grad_out, A* grad_x, A* grad_shift,
                                       A* grad_scale, int64_t n, double eps) {
  const RowStats<A> s = row_stats(x, n, eps);
  const A mean_d = reduce<A>(n,
                             [&](auto lane, int64_t i) {
                               using V = typename decltype(lane)::type;
                               return V(load<V>(grad_out + i) * (A(1) + load<V>(scale + i)));
                             }) /
                   A(n);
  const A mean_dx = reduce<A>(n,
                              [&](auto lane, int64_t i) {
                                using V = typename decltype(lane)::type;
                                V xhat = (load<V>(x + i) - s.mean) * s.rstd;
                                return V(load<V>(grad_out + i) * (A(1) + load<V>(scale + i)) * xhat);
                              }) /
                    A(n);
  each<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    V g = load<V>(grad_out + i), xhat = (load<V>(x + i) - s.mean) * s.rstd;
    V d = g * (A(1) + load<V>(scale + i));
    store(grad_x + i, V(load<V>(grad_x + i) + s.rstd * (d - mean_d - xhat * mean_dx)));
    store(grad_shift + i, V(load<V>(grad_shift + i) + g));
    store(grad_scale + i, V(load<V>(grad_scale + i) + g * xhat));
  });
}

}  // namespace QIF_ISA
}  // namespace qif
