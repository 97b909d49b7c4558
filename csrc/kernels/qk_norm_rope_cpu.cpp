#include "common/chunks.h"
#include "kernels/qk_norm_rope.h"

namespace qif {
namespace QIF_ISA {

// Rows of one stream, the sample they belong to and how far they move in the joint buffers.
struct Placement {
  Segments own;
  const int32_t* other;  // rows of the other stream that stand before sample s: other[s]
  int64_t joint(int64_t row, int64_t sample) const { return row + (other ? other[sample] : 0); }
};

// cos and sin of one token spread over a head, so that rotation is n * cos + swap_pairs(n) * sin.
template <class A>
static void spread_rope(const float* rope, A* cos, A* sin, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; i += 2) {
    cos[i] = cos[i + 1] = rope[i];
    sin[i + 1] = rope[i + 1];
    sin[i] = -sin[i + 1];
  }
}

// The rotation back, in place.
template <class A>
static void rotate_back(A* g, const A* cos, const A* sin, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Vec<A> v = load<Vec<A>>(g + i);
    store(g + i, Vec<A>(v * load<Vec<A>>(cos + i) - swap_pairs(v) * load<Vec<A>>(sin + i)));
  }
  for (; i < n; i += 2) {
    const A a = g[i], b = g[i + 1];
    g[i] = a * cos[i] - b * sin[i];
    g[i + 1] = b * cos[i + 1] - a * sin[i + 1];
  }
}

template <class T, class A>
static A inverse_rms(const T* x, int64_t n, double eps) {
  const A sum = reduce<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    V v = load<V>(x + i);
    return V(v * v);
  });
  return A(1) / std::sqrt(sum / A(n) + A(eps));
}

template <class T, class A>
static void norm_rope_head(const T* src, const A* weight, const A* cos, const A* sin, T* dst, int64_t n, double eps) {
  const A r = inverse_rms<T, A>(src, n, eps);
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Vec<A> v = load<Vec<A>>(src + i) * r * load<Vec<A>>(weight + i);
    store(dst + i, Vec<A>(v * load<Vec<A>>(cos + i) + swap_pairs(v) * load<Vec<A>>(sin + i)));
  }
  for (; i < n; i += 2) {
    const A a = widen(src[i]) * r * weight[i], b = widen(src[i + 1]) * r * weight[i + 1];
    narrow(dst + i, a * cos[i] + b * sin[i]);
    narrow(dst + i + 1, b * cos[i + 1] + a * sin[i + 1]);
  }
}

// With g the gradient before the rotation, xhat = x * r and d = g * weight:
// grad_x = r * (d - xhat * mean(d * xhat)); grad_weight += g * xhat.
template <class T, class A>
static void norm_rope_head_backward(const T* src, const A* weight, const A* cos, const A* sin, const T* grad_out,
                                    T* grad_src, A* grad_weight, A* x, A* g, int64_t n, double eps) {
  each<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    store(x + i, load<V>(src + i));
    store(g + i, load<V>(grad_out + i));
  });
  rotate_back(g, cos, sin, n);
  const A r = inverse_rms<A, A>(x, n, eps);
  const A mean = reduce<A>(n,
                           [&](auto lane, int64_t i) {
                             using V = typename decltype(lane)::type;
                             return V(load<V>(g + i) * load<V>(weight + i) * load<V>(x + i) * r);
                           }) /
                 A(n);
  each<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    V gi = load<V>(g + i), xhat = load<V>(x + i) * r;
    store(grad_src + i, V(r * (gi * load<V>(weight + i) - xhat * mean)));
    store(grad_weight + i, V(load<V>(grad_weight + i) + gi * xhat));
  });
}

template <class T>
static void widen_weight(const void* src, Accum<T>* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(static_cast<const T*>(src)[i]);
}

template <class T>
static void forward_stream(const QkNormRope& p, const QkNormRopeStream& s, const Placement& place,
                           const Placement& q_place) {
  using A = Accum<T>;
  const int64_t e = p.head_dim, row = p.heads * e;
  parallel_ranges(s.rows, s.rows * row * 3, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(4 * e);
    A *wq = buffer.data(), *wk = wq + e, *cos = wk + e, *sin = cos + e;
    if (s.q) widen_weight<T>(s.q_weight, wq, e);
    widen_weight<T>(s.k_weight, wk, e);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t sample = place.own.find(r), joint = place.joint(r, sample) * row;
      const int64_t joint_q = q_place.joint(r, sample) * row;
      spread_rope(s.rope + r * e, cos, sin, e);
      const T *q = static_cast<const T*>(s.q) + r * s.q_stride, *k = static_cast<const T*>(s.k) + r * s.k_stride;
      for (int64_t h = 0; h < p.heads; ++h) {
        if (s.q) norm_rope_head(q + h * e, wq, cos, sin, static_cast<T*>(p.q) + joint_q + h * e, e, p.eps);
        norm_rope_head(k + h * e, wk, cos, sin, static_cast<T*>(p.k) + joint + h * e, e, p.eps);
      }
      std::memcpy(static_cast<T*>(p.v) + joint, static_cast<const T*>(s.v) + r * s.v_stride, row * sizeof(T));
    }
  });
}

template <class T>
static void backward_stream(const QkNormRope& p, const QkNormRopeStream& s, const QkNormRopeStreamGrad& g,
                            const Placement& place, const Placement& q_place) {
  using A = Accum<T>;
  const int64_t e = p.head_dim, row = p.heads * e;
  // The weights are shared by all samples and heads: one segment, and short chunks, as every row adds once per head.
  const std::vector<Chunk> chunks = make_chunks(Segments{nullptr, s.rows, 1}, 4);
  std::vector<A> partials(chunks.size() * 2 * e, A(0));
  parallel_ranges(chunks.size(), s.rows * row * 3, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(6 * e);
    A *wq = buffer.data(), *wk = wq + e, *cos = wk + e, *sin = cos + e, *x = sin + e, *go = x + e;
    if (s.q) widen_weight<T>(s.q_weight, wq, e);
    widen_weight<T>(s.k_weight, wk, e);
    for (int64_t c = begin; c < end; ++c) {
      A *grad_wq = partials.data() + c * 2 * e, *grad_wk = grad_wq + e;
      for (int64_t r = chunks[c].begin; r < chunks[c].end; ++r) {
        const int64_t sample = place.own.find(r), joint = place.joint(r, sample) * row;
        const int64_t joint_q = q_place.joint(r, sample) * row;
        spread_rope(s.rope + r * e, cos, sin, e);
        for (int64_t h = 0; h < p.heads; ++h) {
          const int64_t o = h * e;
          if (s.q)
            norm_rope_head_backward(static_cast<const T*>(s.q) + r * s.q_stride + o, wq, cos, sin,
                                    static_cast<const T*>(p.q) + joint_q + o, static_cast<T*>(g.q) + r * row + o,
                                    grad_wq, x, go, e, p.eps);
          norm_rope_head_backward(static_cast<const T*>(s.k) + r * s.k_stride + o, wk, cos, sin,
                                  static_cast<const T*>(p.k) + joint + o, static_cast<T*>(g.k) + r * row + o, grad_wk,
                                  x, go, e, p.eps);
        }
        std::memcpy(static_cast<T*>(g.v) + r * row, static_cast<const T*>(p.v) + joint, row * sizeof(T));
      }
    }
  });
  if (s.q) sum_chunks(chunks, partials.data(), 2 * e, static_cast<T*>(g.q_weight), 1, e);
  sum_chunks(chunks, partials.data() + e, 2 * e, static_cast<T*>(g.k_weight), 1, e);
}

// Text rows stand behind the image rows of earlier samples, image rows behind the text rows of their own as well.
static Placement text_placement(const QkNormRope& p) { return {{p.txt.cu, p.txt.rows, p.samples}, p.img.cu}; }
static Placement image_placement(const QkNormRope& p) { return {{p.img.cu, p.img.rows, p.samples}, p.txt.cu + 1}; }
// q of the image rows alone when the text has none: rows keep their place.
static Placement image_q_placement(const QkNormRope& p) {
  return {{p.img.cu, p.img.rows, p.samples}, p.txt.q ? p.txt.cu + 1 : nullptr};
}

void qk_norm_rope_forward(const QkNormRope& p) {
  QIF_DISPATCH(p.dtype, T, {
    forward_stream<T>(p, p.txt, text_placement(p), text_placement(p));
    forward_stream<T>(p, p.img, image_placement(p), image_q_placement(p));
  })
}

void qk_norm_rope_backward(const QkNormRopeBackward& b) {
  const QkNormRope& p = b.forward;
  QIF_DISPATCH(p.dtype, T, {
    backward_stream<T>(p, p.txt, b.txt, text_placement(p), text_placement(p));
    backward_stream<T>(p, p.img, b.img, image_placement(p), image_q_placement(p));
  })
}

}  // namespace QIF_ISA
}  // namespace qif
