#include <vector>

#include "common/chunks.h"
#include "kernels/channel_norm_row.h"
#include "kernels/channel_norm_silu.h"
#include "kernels/norm_row.h"

namespace qif {
namespace QIF_ISA {

// gamma and, behind it, bias, in the type of the arithmetic.
template <class T>
static std::vector<Accum<T>> widen_affine(const void* gamma, const void* bias, int64_t n) {
  std::vector<Accum<T>> affine(2 * n);
  widen_row(static_cast<const T*>(gamma), affine.data(), n);
  if (bias) widen_row(static_cast<const T*>(bias), affine.data() + n, n);
  return affine;
}

template <class T>
static void forward(const ChannelNormSilu& p) {
  using A = Accum<T>;
  const int64_t n = p.channels;
  const std::vector<A> affine = widen_affine<T>(p.gamma, p.bias, n);
  const A *gamma = affine.data(), *bias = p.bias ? gamma + n : nullptr;
  parallel_ranges(p.rows, p.rows * n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      channel_norm_row(static_cast<const T*>(p.x) + r * n, gamma, bias, static_cast<T*>(p.out) + r * n, n, p.silu);
  });
}

// Added one after another in float before double takes over: rows are short, so more would lose to torch's tree sums.
constexpr int64_t kRowsInSequence = 16;

template <class T>
static void backward(const ChannelNormSiluBackward& p) {
  using A = Accum<T>;
  const int64_t n = p.channels;
  const std::vector<A> affine = widen_affine<T>(p.gamma, p.bias, n);
  const A *gamma = affine.data(), *bias = p.bias ? gamma + n : nullptr;
  const std::vector<Chunk> chunks = make_chunks(Segments{nullptr, p.rows, 1}, kRowsInSequence);
  std::vector<A> partials(chunks.size() * 2 * n, A(0));
  parallel_ranges(chunks.size(), p.rows * n, [&](int64_t begin, int64_t end) {
    std::vector<A> d(n);
    for (int64_t c = begin; c < end; ++c) {
      A *grad_gamma = partials.data() + c * 2 * n, *grad_bias = grad_gamma + n;
      for (int64_t r = chunks[c].begin; r < chunks[c].end; ++r) {
        const T *x = static_cast<const T*>(p.x) + r * n, *grad_out = static_cast<const T*>(p.grad_out) + r * n;
        T* grad_x = static_cast<T*>(p.grad_x) + r * n;
        const A length = std::sqrt(square_sum<A>(x, n)), root = std::sqrt(A(n));
        // Divided by `norm`, not multiplied by its inverse: a single channel then gives exactly 1, and a gradient of
        // exactly 0.
        const A norm = length > A(kSmallestNorm) ? length : A(kSmallestNorm), factor = root / norm;
        const auto normalised = [&](auto v) { return decltype(v)(v / norm * root); };
        each<A>(n, [&](auto lane, int64_t i) {
          using V = typename decltype(lane)::type;
          const V xhat = normalised(load<V>(x + i));
          V g = load<V>(grad_out + i);
          if (p.silu) {
            V u = xhat * load<V>(gamma + i);
            if (bias) u += load<V>(bias + i);
            const V e = exponential(V(-u)), s = A(1) / (A(1) + e);
            g *= s + u * s * (e * s);  // e s = 1 - s, without the cancellation
          }
          store(grad_gamma + i, V(load<V>(grad_gamma + i) + g * xhat));
          store(grad_bias + i, V(load<V>(grad_bias + i) + g));
          store(d.data() + i, V(g * load<V>(gamma + i)));
        });
        A slope = 0;
        if (length > A(kSmallestNorm)) {
          const A dot = reduce<A>(n, [&](auto lane, int64_t i) {
            using V = typename decltype(lane)::type;
            return V(load<V>(d.data() + i) * normalised(load<V>(x + i)));
          });
          slope = dot / A(n);
        }
        each<A>(n, [&](auto lane, int64_t i) {
          using V = typename decltype(lane)::type;
          store(grad_x + i, V(factor * (load<V>(d.data() + i) - normalised(load<V>(x + i)) * slope)));
        });
      }
    }
  });
  sum_chunks(chunks, partials.data(), 2 * n, static_cast<T*>(p.grad_gamma), 1, n);
  if (p.grad_bias) sum_chunks(chunks, partials.data() + n, 2 * n, static_cast<T*>(p.grad_bias), 1, n);
}

void channel_norm_silu_forward(const ChannelNormSilu& p) { QIF_DISPATCH(p.dtype, T, forward<T>(p)) }
void channel_norm_silu_backward(const ChannelNormSiluBackward& p) { QIF_DISPATCH(p.dtype, T, backward<T>(p)) }

}  // namespace QIF_ISA
}  // namespace qif
