#include <type_traits>

#include "common/chunks.h"
#include "kernels/gate_residual_norm_modulate.h"
#include "kernels/norm_row.h"

namespace qif {
namespace QIF_ISA {

// float16 saturates instead of overflowing to infinity; NaN stays NaN.
template <class T, class V>
inline V saturate(V v) {
  if constexpr (sizeof(T) == 2 && !std::is_same_v<T, BFloat16>) {
    const V top = splat<V>(65504.0f);
    v = v > top ? top : v;
    v = v < -top ? -top : v;
  }
  return v;
}

template <class T>
static void forward(const GateResidualNormModulate& p) {
  using A = Accum<T>;
  const Segments segments{p.offsets, p.rows, p.segments};
  const int64_t n = p.width;
  parallel_ranges(p.rows, p.rows * n, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(4 * n);
    A *h = buffer.data(), *gate = h + n, *shift = gate + n, *scale = shift + n;
    int64_t s_end = begin;
    for (int64_t r = begin; r < end; ++r) {
      if (r >= s_end) {
        const int64_t s = segments.find(r);
        s_end = segments.end(s);
        widen_row(static_cast<const T*>(p.gate) + s * p.gate_stride, gate, n);
        widen_row(static_cast<const T*>(p.shift) + s * p.shift_stride, shift, n);
        widen_row(static_cast<const T*>(p.scale) + s * p.scale_stride, scale, n);
      }
      const T *x = static_cast<const T*>(p.x) + r * n, *y = static_cast<const T*>(p.y) + r * n;
      T* residual = static_cast<T*>(p.residual) + r * n;
      each<A>(n, [&](auto lane, int64_t i) {
        using V = typename decltype(lane)::type;
        V v = load<V>(x + i) + load<V>(gate + i) * load<V>(y + i);
        store(residual + i, saturate<T>(v));
        store(h + i, load<V>(residual + i));
      });
      norm_modulate_row(h, shift, scale, static_cast<T*>(p.out) + r * n, n, p.eps);
    }
  });
}

template <class T>
static void backward(const GateResidualNormModulateBackward& p) {
  using A = Accum<T>;
  const Segments segments{p.offsets, p.rows, p.segments};
  const int64_t n = p.width;
  const std::vector<Chunk> chunks = make_chunks(segments, kChunkRows);
  std::vector<A> partials(chunks.size() * 3 * n, A(0));
  parallel_ranges(chunks.size(), p.rows * n, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(4 * n);
    A *h = buffer.data(), *gate = h + n, *scale = gate + n, *g = scale + n;
    for (int64_t c = begin; c < end; ++c) {
      A *grad_gate = partials.data() + c * 3 * n, *grad_shift = grad_gate + n, *grad_scale = grad_shift + n;
      widen_row(static_cast<const T*>(p.gate) + chunks[c].segment * p.gate_stride, gate, n);
      widen_row(static_cast<const T*>(p.scale) + chunks[c].segment * p.scale_stride, scale, n);
      for (int64_t r = chunks[c].begin; r < chunks[c].end; ++r) {
        widen_row(static_cast<const T*>(p.residual) + r * n, h, n);
        widen_row(static_cast<const T*>(p.grad_residual) + r * n, g, n);
        norm_modulate_row_backward(h, scale, static_cast<const T*>(p.grad_out) + r * n, g, grad_shift, grad_scale, n,
                                   p.eps);
        const T* y = static_cast<const T*>(p.y) + r * n;
        T *grad_x = static_cast<T*>(p.grad_x) + r * n, *grad_y = static_cast<T*>(p.grad_y) + r * n;
        each<A>(n, [&](auto lane, int64_t i) {
          using V = typename decltype(lane)::type;
          V v = load<V>(g + i);
          store(grad_x + i, v);
          store(grad_y + i, V(v * load<V>(gate + i)));
          store(grad_gate + i, V(load<V>(grad_gate + i) + v * load<V>(y + i)));
        });
      }
    }
  });
  sum_chunks(chunks, partials.data(), 3 * n, static_cast<T*>(p.grad_gate), p.segments, n);
  sum_chunks(chunks, partials.data() + n, 3 * n, static_cast<T*>(p.grad_shift), p.segments, n);
  sum_chunks(chunks, partials.data() + 2 * n, 3 * n, static_cast<T*>(p.grad_scale), p.segments, n);
}

void gate_residual_norm_modulate_forward(const GateResidualNormModulate& p) { QIF_DISPATCH(p.dtype, T, forward<T>(p)) }
void gate_residual_norm_modulate_backward(const GateResidualNormModulateBackward& p) {
  QIF_DISPATCH(p.dtype, T, backward<T>(p))
}

}  // namespace QIF_ISA
}  // namespace qif
