#include "common/parallel.h"
#include "common/segments.h"
#include "common/vec.h"
#include "kernels/guided_step.h"

namespace qif {
namespace QIF_ISA {

template <class V, class T, class A>
inline V combine(const T* cond, const T* uncond, A guidance, int64_t i) {
  const V c = load<V>(cond + i);
  if (!uncond) return c;
  const V u = load<V>(uncond + i);
  return V(u + guidance * (c - u));
}

template <class A>
struct Norms {
  A cond, combined;
  A ratio(bool rescale) const { return rescale && combined > A(0) ? cond / combined : A(1); }
};

template <class T, class A>
inline Norms<A> norms(const T* cond, const T* uncond, A guidance, int64_t n) {
  const A c2 = reduce<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    V c = load<V>(cond + i);
    return V(c * c);
  });
  const A v2 = reduce<A>(n, [&](auto lane, int64_t i) {
    using V = typename decltype(lane)::type;
    V v = combine<V>(cond, uncond, guidance, i);
    return V(v * v);
  });
  return {std::sqrt(c2), std::sqrt(v2)};
}

template <class T>
static void forward(const GuidedStep& p) {
  using A = Accum<T>;
  const Segments segments{p.offsets, p.rows, p.segments};
  const int64_t n = p.channels;
  const A guidance = static_cast<A>(p.guidance);
  const bool rescale = p.rescale && p.uncond;
  parallel_ranges(p.rows, p.rows * n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T *sample = static_cast<const T*>(p.sample) + r * n, *cond = static_cast<const T*>(p.cond) + r * n;
      const T* uncond = p.uncond ? static_cast<const T*>(p.uncond) + r * n : nullptr;
      T* out = static_cast<T*>(p.out) + r * n;
      const A ratio = rescale ? norms(cond, uncond, guidance, n).ratio(true) : A(1);
      const A dt = static_cast<A>(p.dt[segments.find(r)]);
      each<A>(n, [&](auto lane, int64_t i) {
        using V = typename decltype(lane)::type;
        store(out + i, V(load<V>(sample + i) + dt * (combine<V>(cond, uncond, guidance, i) * ratio)));
      });
    }
  });
}

// With g = dt * grad_out, c = cond, v = combined, k = |c| / |v|, a = g . v:
//   grad_v = k * (g - v * a / |v|^2);  grad_cond = guidance * grad_v + c * a / (|v| |c|);
//   grad_uncond = (1 - guidance) * grad_v
template <class T>
static void backward(const GuidedStepBackward& b) {
  using A = Accum<T>;
  const GuidedStep& p = b.forward;
  const Segments segments{p.offsets, p.rows, p.segments};
  const int64_t n = p.channels;
  const A guidance = static_cast<A>(p.guidance);
  parallel_ranges(p.rows, p.rows * n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* cond = static_cast<const T*>(p.cond) + r * n;
      const T* uncond = p.uncond ? static_cast<const T*>(p.uncond) + r * n : nullptr;
      const T* grad_out = static_cast<const T*>(p.out) + r * n;
      T* grad_cond = static_cast<T*>(b.grad_cond) + r * n;
      T* grad_uncond = uncond ? static_cast<T*>(b.grad_uncond) + r * n : nullptr;
      const A dt = static_cast<A>(p.dt[segments.find(r)]);
      A k = A(1), along_v = A(0), along_c = A(0);
      if (p.rescale && uncond) {
        const Norms<A> s = norms(cond, uncond, guidance, n);
        k = s.ratio(true);
        if (s.combined > A(0)) {
          const A a = reduce<A>(n, [&](auto lane, int64_t i) {
            using V = typename decltype(lane)::type;
            return V(dt * load<V>(grad_out + i) * combine<V>(cond, uncond, guidance, i));
          });
          along_v = a / (s.combined * s.combined);
          along_c = s.cond > A(0) ? a / (s.combined * s.cond) : A(0);
        }
      }
      each<A>(n, [&](auto lane, int64_t i) {
        using V = typename decltype(lane)::type;
        V v = combine<V>(cond, uncond, guidance, i);
        V grad_v = k * (dt * load<V>(grad_out + i) - v * along_v);
        V grad_c = (uncond ? guidance : A(1)) * grad_v + load<V>(cond + i) * along_c;
        store(grad_cond + i, grad_c);
        if (uncond) store(grad_uncond + i, V((A(1) - guidance) * grad_v));
      });
    }
  });
}

void guided_step_forward(const GuidedStep& p) { QIF_DISPATCH(p.dtype, T, forward<T>(p)) }
void guided_step_backward(const GuidedStepBackward& p) { QIF_DISPATCH(p.forward.dtype, T, backward<T>(p)) }

}  // namespace QIF_ISA
}  // namespace qif
