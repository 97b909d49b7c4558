// gelu_tanh on the GPU. Bound by memory: one read and one write forward, two reads and one write backward.
#include "common/cuda.cuh"
#include "kernels/gelu_tanh.h"

namespace qif {
namespace gpu {

constexpr int kGeluThreads = 256;
constexpr float kRoot = 0.79788456080286535588f, kCube = 0.044715f;  // sqrt(2 / pi)

// exp(-2u); sigmoid(2u) = 1 / (1 + exp(-2u)). Clamped where float would overflow, long after the sigmoid is 0 or 1.
template <class T>
QIF_INLINE float exp_minus_2u(float x) {
  const float e = -2.0f * kRoot * (x + kCube * x * x * x);
  return exponential<T>(e > kLargestExponent ? kLargestExponent : e);  // NaN stays NaN
}

// f(i) for the packs of this thread; `elements` is a multiple of N.
template <int N, class F>
QIF_INLINE void each_element_pack(int64_t elements, F&& f) {
  const int64_t step = int64_t{gridDim.x} * kGeluThreads * N;
  for (int64_t i = (int64_t{blockIdx.x} * kGeluThreads + threadIdx.x) * N; i < elements; i += step) f(i);
}

template <class T, int N>
__global__ void __launch_bounds__(kGeluThreads) gelu_tanh_elements(const T* x, T* out, int64_t elements) {
  each_element_pack<N>(elements, [&](int64_t i) {
    float v[N];
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = quotient<T>(v[j], 1.0f + exp_minus_2u<T>(v[j]));
    store(out + i, v);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kGeluThreads)
    gelu_tanh_elements_backward(const T* x, const T* grad_out, T* grad_x, int64_t elements) {
  each_element_pack<N>(elements, [&](int64_t i) {
    float v[N], g[N];
    load(x + i, v);
    load(grad_out + i, g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float e = exp_minus_2u<T>(v[j]), s = quotient<T>(1.0f, 1.0f + e),
                  rest = e * s;  // rest = 1 - s, without cancellation
      const float slope = kRoot * (1.0f + 3.0f * kCube * v[j] * v[j]);
      g[j] *= s + 2.0f * v[j] * s * rest * slope;
    }
    store(grad_x + i, g);
  });
}

// One pack per thread up to this many blocks, then each thread takes several.
static dim3 gelu_grid(int64_t packs) {
  const int64_t blocks = ceil_div(packs, kGeluThreads), most = 1 << 20;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

template <class T>
static int forward(const GeluTanh& p, void* stream) {
  auto run = [&](auto kernel, int n) {
    return launch(kernel, gelu_grid(p.elements / n), dim3(kGeluThreads), 0, stream, static_cast<const T*>(p.x),
                  static_cast<T*>(p.out), p.elements);
  };
  if (p.elements % 8 == 0 && aligned16({p.x, p.out})) return run(gelu_tanh_elements<T, 8>, 8);
  return run(gelu_tanh_elements<T, 1>, 1);
}

template <class T>
static int backward(const GeluTanhBackward& p, void* stream) {
  auto run = [&](auto kernel, int n) {
    return launch(kernel, gelu_grid(p.elements / n), dim3(kGeluThreads), 0, stream, static_cast<const T*>(p.x),
                  static_cast<const T*>(p.grad_out), static_cast<T*>(p.grad_x), p.elements);
  };
  if (p.elements % 8 == 0 && aligned16({p.x, p.grad_out, p.grad_x})) return run(gelu_tanh_elements_backward<T, 8>, 8);
  return run(gelu_tanh_elements_backward<T, 1>, 1);
}

}  // namespace gpu

int gelu_tanh_forward_cuda(const GeluTanh& p, void*, void* stream) {
  if (!p.elements) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return gpu::forward<T>(p, stream))
}

int gelu_tanh_backward_cuda(const GeluTanhBackward& p, void*, void* stream) {
  if (!p.elements) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return gpu::backward<T>(p, stream))
}

}  // namespace qif
