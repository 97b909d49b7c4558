// guided_step on the GPU: eight lanes per token, which is one latent token of 64 channels in 16-byte packs; longer
// tokens take several packs per lane. Bound by memory, and at a few megabytes by the launch: 3 reads and 1 write.
#include "common/cuda.cuh"
#include "kernels/guided_step.h"

namespace qif {
namespace gpu {

constexpr int kStepThreads = 128, kStepLanes = 8;

// f(i) for the packs of a token that belong to this lane.
template <int N, class F>
QIF_INLINE void each_token_pack(int channels, F&& f) {
  for (int i = static_cast<int>(threadIdx.x % kStepLanes) * N; i < channels; i += kStepLanes * N) f(i);
}

template <class T, int N>
struct Token {
  const T *cond, *uncond;  // uncond null: no guidance
  float guidance;

  QIF_INLINE void get(int i, float (&c)[N], float (&v)[N]) const {
    load(cond + i, c);
    if (uncond) {
      load(uncond + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] += guidance * (c[j] - v[j]);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = c[j];
    }
  }
};

struct Norms {
  float cond, combined, along;  // along: the sum of combined * dt * grad_out, backward
  QIF_INLINE float ratio() const { return combined > 0.0f ? cond / combined : 1.0f; }
};

// Every lane of the warp takes part, also those without a token.
template <class T, int N>
QIF_INLINE Norms norms(const Token<T, N>& token, const T* grad_out, float dt, int channels) {
  float c2 = 0.0f, v2 = 0.0f, along = 0.0f;
  each_token_pack<N>(channels, [&](int i) {
    float c[N], v[N];
    token.get(i, c, v);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      c2 += c[j] * c[j];
      v2 += v[j] * v[j];
    }
    if (grad_out) {
      load(grad_out + i, c);
#pragma unroll
      for (int j = 0; j < N; ++j) along += dt * c[j] * v[j];
    }
  });
  return {sqrtf(warp_sum<kStepLanes>(c2)), sqrtf(warp_sum<kStepLanes>(v2)), warp_sum<kStepLanes>(along)};
}

template <class T, int N>
__global__ void __launch_bounds__(kStepThreads) guided_step_tokens(GuidedStep p) {
  const int64_t r = (int64_t{blockIdx.x} * kStepThreads + threadIdx.x) / kStepLanes;
  const bool exists = r < p.rows;
  const int channels = exists ? static_cast<int>(p.channels) : 0;
  const int64_t begin = exists ? r * p.channels : 0;
  const Token<T, N> token{static_cast<const T*>(p.cond) + begin,
                          p.uncond ? static_cast<const T*>(p.uncond) + begin : nullptr, static_cast<float>(p.guidance)};
  const float ratio =
      p.rescale && p.uncond ? norms(token, static_cast<const T*>(nullptr), 0.0f, channels).ratio() : 1.0f;
  if (!exists) return;
  const float dt = load_global(p.dt + Segments{p.offsets, p.rows, p.segments}.find(r));
  each_token_pack<N>(channels, [&](int i) {
    float c[N], v[N];
    token.get(i, c, v);
    load(static_cast<const T*>(p.sample) + begin + i, c);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = c[j] + dt * (v[j] * ratio);
    store(static_cast<T*>(p.out) + begin + i, v);
  });
}

// With g = dt * grad_out, c = cond, v = combined, k = |c| / |v|, a = g . v:
//   grad_v = k * (g - v * a / |v|^2);  grad_cond = guidance * grad_v + c * a / (|v| |c|);
//   grad_uncond = (1 - guidance) * grad_v
template <class T, int N>
__global__ void __launch_bounds__(kStepThreads) guided_step_tokens_backward(GuidedStepBackward b) {
  const GuidedStep& p = b.forward;
  const int64_t r = (int64_t{blockIdx.x} * kStepThreads + threadIdx.x) / kStepLanes;
  const bool exists = r < p.rows;
  const int channels = exists ? static_cast<int>(p.channels) : 0;
  const int64_t begin = exists ? r * p.channels : 0;
  const Token<T, N> token{static_cast<const T*>(p.cond) + begin,
                          p.uncond ? static_cast<const T*>(p.uncond) + begin : nullptr, static_cast<float>(p.guidance)};
  const T* grad_out = static_cast<const T*>(p.out) + begin;
  const float dt = exists ? load_global(p.dt + Segments{p.offsets, p.rows, p.segments}.find(r)) : 0.0f;
  float k = 1.0f, along_v = 0.0f, along_c = 0.0f;
  if (p.rescale && p.uncond) {
    const Norms s = norms(token, grad_out, dt, channels);
    k = s.ratio();
    if (s.combined > 0.0f) {
      along_v = s.along / (s.combined * s.combined);
      along_c = s.cond > 0.0f ? s.along / (s.combined * s.cond) : 0.0f;
    }
  }
  if (!exists) return;
  const float guidance = p.uncond ? token.guidance : 1.0f;
  each_token_pack<N>(channels, [&](int i) {
    float c[N], v[N], g[N];
    token.get(i, c, v);
    load(grad_out + i, g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float grad_v = k * (dt * g[j] - v[j] * along_v);
      c[j] = guidance * grad_v + c[j] * along_c;
      v[j] = (1.0f - guidance) * grad_v;
    }
    store(static_cast<T*>(b.grad_cond) + begin + i, c);
    if (p.uncond) store(static_cast<T*>(b.grad_uncond) + begin + i, v);
  });
}

static dim3 step_grid(const GuidedStep& p) {
  return dim3(static_cast<unsigned>(ceil_div(p.rows * kStepLanes, kStepThreads)));
}

template <class T>
static int forward(const GuidedStep& p, void* stream) {
  const bool vector = p.channels % 8 == 0 && aligned16({p.sample, p.cond, p.uncond, p.out});
  return vector ? launch(guided_step_tokens<T, 8>, step_grid(p), dim3(kStepThreads), 0, stream, p)
                : launch(guided_step_tokens<T, 1>, step_grid(p), dim3(kStepThreads), 0, stream, p);
}

template <class T>
static int backward(const GuidedStepBackward& b, void* stream) {
  const GuidedStep& p = b.forward;
  const bool vector = p.channels % 8 == 0 && aligned16({p.cond, p.uncond, p.out, b.grad_cond, b.grad_uncond});
  return vector ? launch(guided_step_tokens_backward<T, 8>, step_grid(p), dim3(kStepThreads), 0, stream, b)
                : launch(guided_step_tokens_backward<T, 1>, step_grid(p), dim3(kStepThreads), 0, stream, b);
}

}  // namespace gpu

int guided_step_forward_cuda(const GuidedStep& p, void*, void* stream) {
  if (!p.rows || !p.channels) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return gpu::forward<T>(p, stream))
}

int guided_step_backward_cuda(const GuidedStepBackward& b, void*, void* stream) {
  if (!b.forward.rows || !b.forward.channels) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(b.forward.dtype, T, return gpu::backward<T>(b, stream))
}

}  // namespace qif
