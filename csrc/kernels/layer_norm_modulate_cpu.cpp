#include "common/chunks.h"
#include "kernels/layer_norm_modulate.h"
#include "kernels/norm_row.h"

namespace qif {
namespace QIF_ISA {

template <class T>
static void forward(const LayerNormModulate& p) {
  using A = Accum<T>;
  const Segments segments{p.offsets, p.rows, p.segments};
  const int64_t n = p.width;
  parallel_ranges(p.rows, p.rows * n, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(3 * n);
    A *x = buffer.data(), *shift = x + n, *scale = shift + n;
    int64_t s = -1, s_end = begin;
    for (int64_t r = begin; r < end; ++r) {
      if (r >= s_end) {
        s = segments.find(r);
        s_end = segments.end(s);
        widen_row(static_cast<const T*>(p.shift) + s * p.shift_stride, shift, n);
        widen_row(static_cast<const T*>(p.scale) + s * p.scale_stride, scale, n);
      }
      widen_row(static_cast<const T*>(p.x) + r * n, x, n);
      norm_modulate_row(x, shift, scale, static_cast<T*>(p.out) + r * n, n, p.eps);
    }
  });
}

template <class T>
static void backward(const LayerNormModulateBackward& p) {
  using A = Accum<T>;
  const Segments segments{p.offsets, p.rows, p.segments};
  const int64_t n = p.width;
  const std::vector<Chunk> chunks = make_chunks(segments, kChunkRows);
  std::vector<A> partials(chunks.size() * 2 * n, A(0));
  parallel_ranges(chunks.size(), p.rows * n, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(3 * n);
    A *x = buffer.data(), *scale = x + n, *grad_x = scale + n;
    for (int64_t c = begin; c < end; ++c) {
      A *grad_shift = partials.data() + c * 2 * n, *grad_scale = grad_shift + n;
      widen_row(static_cast<const T*>(p.scale) + chunks[c].segment * p.scale_stride, scale, n);
      for (int64_t r = chunks[c].begin; r < chunks[c].end; ++r) {
        widen_row(static_cast<const T*>(p.x) + r * n, x, n);
        for (int64_t i = 0; i < n; ++i) grad_x[i] = A(0);
        norm_modulate_row_backward(x, scale, static_cast<const T*>(p.grad_out) + r * n, grad_x, grad_shift, grad_scale,
                                   n, p.eps);
        T* out = static_cast<T*>(p.grad_x) + r * n;
        each<A>(n, [&](auto lane, int64_t i) { store(out + i, load<typename decltype(lane)::type>(grad_x + i)); });
      }
    }
  });
  sum_chunks(chunks, partials.data(), 2 * n, static_cast<T*>(p.grad_shift), p.segments, n);
  sum_chunks(chunks, partials.data() + n, 2 * n, static_cast<T*>(p.grad_scale), p.segments, n);
}

void layer_norm_modulate_forward(const LayerNormModulate& p) { QIF_DISPATCH(p.dtype, T, forward<T>(p)) }
void layer_norm_modulate_backward(const LayerNormModulateBackward& p) { QIF_DISPATCH(p.dtype, T, backward<T>(p)) }

}  // namespace QIF_ISA
}  // namespace qif
