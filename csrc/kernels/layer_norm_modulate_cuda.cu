// layer_norm_modulate on the GPU. Bound by memory: forward reads and writes a row once, 2 * width * sizeof(T) bytes per
// row, with FP8 rows width + 4 bytes more; backward reads two rows and writes one, and 2 * width * 4 bytes of partial
// sums per 16 rows twice.
#include "kernels/layer_norm_modulate.h"
#include "kernels/norm_row.cuh"

namespace qif {
namespace gpu {

template <class T, int N, int Keep, int Lanes, bool Fp8>
__global__ void __launch_bounds__(kRowThreads) layer_norm_modulate_rows(LayerNormModulate p, Fp8Rows fp8) {
  QIF_SHARED(float, partial, kRowShared);
  const int64_t r = int64_t{blockIdx.x} * (kRowThreads / Lanes) + threadIdx.x / Lanes;
  if (r >= p.rows) return;  // a warp, or no thread of the block
  const int width = static_cast<int>(p.width);
  Row<T, N, Keep, Lanes> row, shift, scale;
  row.read(static_cast<const T*>(p.x) + r * p.width, width);
  const int64_t s = Segments{p.offsets, p.rows, p.segments}.find(r);
  shift.read(static_cast<const T*>(p.shift) + s * p.shift_stride, width);
  scale.read(static_cast<const T*>(p.scale) + s * p.scale_stride, width);
  norm_modulate_row<Fp8>(row, shift, scale, static_cast<T*>(p.out) + r * p.width, width, static_cast<float>(p.eps),
                         partial, fp8, r);
}

template <class T, int N, bool Held>
__global__ void __launch_bounds__(kBlockThreads, 1)
    layer_norm_modulate_chunk(LayerNormModulateBackward p, float* partials) {
  QIF_SHARED(float, shared, kRowGradientShared);
  const Segments segments{p.offsets, p.rows, p.segments};
  const ChunkPlace chunk = find_chunk(segments, blockIdx.x, kChunkRows);
  if (chunk.segment < 0) return;
  const int width = static_cast<int>(p.width);
  OwnRow<T, N, Held> x, grad_out, scale;
  scale.read(static_cast<const T*>(p.scale) + chunk.segment * p.scale_stride, width);
  ColumnSums<N, Held, 2> sums;
  sums.start(partials + int64_t{blockIdx.x} * 2 * p.width, width);
  for (int64_t r = chunk.begin; r < chunk.end; ++r) {
    x.read(static_cast<const T*>(p.x) + r * p.width, width);
    grad_out.read(static_cast<const T*>(p.grad_out) + r * p.width, width);
    const RowGradient gradient = row_gradient(x, scale, grad_out, width, static_cast<float>(p.eps), shared);
    T* grad_x = static_cast<T*>(p.grad_x) + r * p.width;
    each_own_pack<N, Held>(width, [&](int i) {
      float v[N], g[N], sc[N], gx[N];
      x.get(i, v);
      grad_out.get(i, g);
      scale.get(i, sc);
      sums.template add<0>(i, g);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        gx[j] = gradient(v[j], g[j] * (1.0f + sc[j]));
        g[j] *= (v[j] - gradient.mean) * gradient.rstd;
      }
      sums.template add<1>(i, g);
      store(grad_x + i, gx);
    });
    sums.first_row = false;
  }
  sums.finish();
}

template <class T, bool Fp8>
static int forward(const LayerNormModulate& p, const Fp8Rows& fp8, void* stream) {
  const bool vector = p.width % 8 == 0 && p.shift_stride % 8 == 0 && p.scale_stride % 8 == 0 &&
                      aligned16({p.x, p.shift, p.scale, p.out, fp8.values});
  QIF_ROW_VARIANT(p.width, vector, N, Keep, Lanes,
                  return launch(layer_norm_modulate_rows<T, N, Keep, Lanes, Fp8>, row_grid<Lanes>(p.rows),
                                dim3(kRowThreads), 0, stream, p, fp8))
}

template <class T>
static int backward(const LayerNormModulateBackward& p, float* partials, void* stream) {
  const bool vector =
      p.width % 8 == 0 && p.scale_stride % 8 == 0 && aligned16({p.x, p.scale, p.grad_out, p.grad_x, partials});
  const int64_t chunks = most_chunks(p.rows, p.segments, !p.offsets, kChunkRows);
  if (p.rows) {
    int error = kSuccess;
    QIF_BLOCK_VARIANT(p.width, vector, N, Held,
                      error = launch(layer_norm_modulate_chunk<T, N, Held>, dim3(static_cast<unsigned>(chunks)),
                                     dim3(block_threads(p.width, N)), 0, stream, p, partials))
    if (error) return error;
  }
  return launch_sum_chunks<T, 2>(
      {partials, {p.grad_shift, p.grad_scale}, {p.offsets, p.rows, p.segments}, p.width, kChunkRows}, stream);
}

}  // namespace gpu

int layer_norm_modulate_forward_cuda(const LayerNormModulate& p, void*, void* stream) {
  if (!p.rows || !p.width) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return (gpu::forward<T, false>(p, {}, stream)))
}

int layer_norm_modulate_fp8_forward_cuda(const LayerNormModulateFp8& p, void*, void* stream) {
  const LayerNormModulate& f = p.forward;
  if (!f.rows || !f.width) return gpu::kSuccess;
  const gpu::Fp8Rows fp8{static_cast<uint8_t*>(p.values), p.scales};
  QIF_DISPATCH_CUDA(f.dtype, T, return (gpu::forward<T, true>(f, fp8, stream)))
}

int64_t layer_norm_modulate_backward_scratch(int64_t rows, int64_t width, int64_t segments, bool equal) {
  return gpu::most_chunks(rows, segments, equal, gpu::kChunkRows) * 2 * width * static_cast<int64_t>(sizeof(float));
}

int layer_norm_modulate_backward_cuda(const LayerNormModulateBackward& p, void* scratch, void* stream) {
  if (!p.width) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return gpu::backward<T>(p, static_cast<float*>(scratch), stream))
}

}  // namespace qif
