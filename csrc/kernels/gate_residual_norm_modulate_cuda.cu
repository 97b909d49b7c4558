// gate_residual_norm_modulate on the GPU. Bound by memory: forward reads two rows and writes two, 4 * width * sizeof(T)
// bytes per row, with FP8 rows width + 4 more; backward reads four and writes two, and 3 * width * 4 bytes of partial
// sums per 16 rows twice.
#include <type_traits>

#include "kernels/gate_residual_norm_modulate.h"
#include "kernels/norm_row.cuh"

namespace qif {
namespace gpu {

// float16 saturates instead of overflowing to infinity; NaN stays NaN.
template <class T>
QIF_INLINE float saturate(float v) {
  if constexpr (std::is_same_v<T, Half>) {
    v = v > 65504.0f ? 65504.0f : v;
    v = v < -65504.0f ? -65504.0f : v;
  }
  return v;
}

template <class T, int N, int Keep, int Lanes, bool Fp8>
__global__ void __launch_bounds__(kRowThreads)
    gate_residual_norm_modulate_rows(GateResidualNormModulate p, Fp8Rows fp8) {
  QIF_SHARED(float, partial, kRowShared);
  const int64_t r = int64_t{blockIdx.x} * (kRowThreads / Lanes) + threadIdx.x / Lanes;
  if (r >= p.rows) return;  // a warp, or no thread of the block
  const int width = static_cast<int>(p.width);
  T* residual = static_cast<T*>(p.residual) + r * p.width;
  Row<T, N, Keep, Lanes> row, y, gate, shift, scale;  // read ahead of the first store, behind which no load moves
  row.read(static_cast<const T*>(p.x) + r * p.width, width);
  y.read(static_cast<const T*>(p.y) + r * p.width, width);
  const int64_t s = Segments{p.offsets, p.rows, p.segments}.find(r);
  gate.read(static_cast<const T*>(p.gate) + s * p.gate_stride, width);
  shift.read(static_cast<const T*>(p.shift) + s * p.shift_stride, width);
  scale.read(static_cast<const T*>(p.scale) + s * p.scale_stride, width);
  // The rounded residual takes the place of x; streamed rows are read back by the lane that wrote them.
  each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
    float v[N], g[N], yv[N];
    row.get(k, i, v);
    gate.get(k, i, g);
    y.get(k, i, yv);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = saturate<T>(v[j] + g[j] * yv[j]);
    const Pack<T, N> pack = narrow<T>(v);
    if constexpr (Keep > 0) row.kept[k] = pack;
    store_pack(residual + i, pack);
  });
  row.source = residual;
  norm_modulate_row<Fp8>(row, shift, scale, static_cast<T*>(p.out) + r * p.width, width, static_cast<float>(p.eps),
                         partial, fp8, r);
}

template <class T, int N, bool Held>
struct GradientRows {
  OwnRow<T, N, Held> h, y, grad_residual, grad_out;
};

template <class T, int N, bool Held>
__global__ void __launch_bounds__(kBlockThreads, 1)
    gate_residual_norm_modulate_chunk(GateResidualNormModulateBackward p, float* partials) {
  QIF_SHARED(float, shared, kRowGradientShared);
  const Segments segments{p.offsets, p.rows, p.segments};
  const ChunkPlace chunk = find_chunk(segments, blockIdx.x, kChunkRows);
  if (chunk.segment < 0) return;
  const int width = static_cast<int>(p.width);
  const auto read = [&](int64_t r) {
    GradientRows<T, N, Held> rows;
    rows.h.read(static_cast<const T*>(p.residual) + r * p.width, width);
    rows.grad_out.read(static_cast<const T*>(p.grad_out) + r * p.width, width);
    rows.y.read(static_cast<const T*>(p.y) + r * p.width, width);
    rows.grad_residual.read(static_cast<const T*>(p.grad_residual) + r * p.width, width);
    return rows;
  };
  GradientRows<T, N, Held> next;
  if constexpr (Held) next = read(chunk.begin);
  OwnRow<T, N, Held> scale, gate;
  scale.read(static_cast<const T*>(p.scale) + chunk.segment * p.scale_stride, width);
  gate.read(static_cast<const T*>(p.gate) + chunk.segment * p.gate_stride, width);
  ColumnSums<N, Held, 3> sums;
  sums.start(partials + int64_t{blockIdx.x} * 3 * p.width, width);
  for (int64_t r = chunk.begin; r < chunk.end; ++r) {
    GradientRows<T, N, Held> now;
    if constexpr (Held) {
      now = next;
      if (r + 1 < chunk.end) next = read(r + 1);  // while this one is computed: the block is alone on its processor
    } else {
      now = read(r);
    }
    const auto &h = now.h, &y = now.y, &grad_residual = now.grad_residual, &grad_out = now.grad_out;
    const RowGradient gradient = row_gradient(h, scale, grad_out, width, static_cast<float>(p.eps), shared);
    T *grad_x = static_cast<T*>(p.grad_x) + r * p.width, *grad_y = static_cast<T*>(p.grad_y) + r * p.width;
    each_own_pack<N, Held>(width, [&](int i) {
      float v[N], g[N], other[N], total[N];
      h.get(i, v);
      grad_out.get(i, g);
      scale.get(i, other);
      grad_residual.get(i, total);
      sums.template add<1>(i, g);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        total[j] += gradient(v[j], g[j] * (1.0f + other[j]));
        g[j] *= (v[j] - gradient.mean) * gradient.rstd;
      }
      sums.template add<2>(i, g);
      store(grad_x + i, total);
      y.get(i, v);
      gate.get(i, other);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        v[j] *= total[j];
        total[j] *= other[j];
      }
      sums.template add<0>(i, v);
      store(grad_y + i, total);
    });
    sums.first_row = false;
  }
  sums.finish();
}

template <class T, bool Fp8>
static int forward(const GateResidualNormModulate& p, const Fp8Rows& fp8, void* stream) {
  const bool vector = p.width % 8 == 0 && p.gate_stride % 8 == 0 && p.shift_stride % 8 == 0 &&
                      p.scale_stride % 8 == 0 &&
                      aligned16({p.x, p.y, p.gate, p.shift, p.scale, p.residual, p.out, fp8.values});
  QIF_ROW_VARIANT(p.width, vector, N, Keep, Lanes,
                  return launch(gate_residual_norm_modulate_rows<T, N, Keep, Lanes, Fp8>, row_grid<Lanes>(p.rows),
                                dim3(kRowThreads), 0, stream, p, fp8))
}

template <class T>
static int backward(const GateResidualNormModulateBackward& p, float* partials, void* stream) {
  const bool vector =
      p.width % 8 == 0 && p.gate_stride % 8 == 0 && p.scale_stride % 8 == 0 &&
      aligned16({p.residual, p.y, p.gate, p.scale, p.grad_residual, p.grad_out, p.grad_x, p.grad_y, partials});
  const int64_t chunks = most_chunks(p.rows, p.segments, !p.offsets, kChunkRows);
  if (p.rows) {
    int error = kSuccess;
    QIF_BLOCK_VARIANT(p.width, vector, N, Held,
                      error = launch(gate_residual_norm_modulate_chunk<T, N, Held>, dim3(static_cast<unsigned>(chunks)),
                                     dim3(block_threads(p.width, N)), 0, stream, p, partials))
    if (error) return error;
  }
  return launch_sum_chunks<T, 3>(
      {partials, {p.grad_gate, p.grad_shift, p.grad_scale}, {p.offsets, p.rows, p.segments}, p.width, kChunkRows},
      stream);
}

}  // namespace gpu

int gate_residual_norm_modulate_forward_cuda(const GateResidualNormModulate& p, void*, void* stream) {
  if (!p.rows || !p.width) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return (gpu::forward<T, false>(p, {}, stream)))
}

int gate_residual_norm_modulate_fp8_forward_cuda(const GateResidualNormModulateFp8& p, void*, void* stream) {
  const GateResidualNormModulate& f = p.forward;
  if (!f.rows || !f.width) return gpu::kSuccess;
  const gpu::Fp8Rows fp8{static_cast<uint8_t*>(p.values), p.scales};
  QIF_DISPATCH_CUDA(f.dtype, T, return (gpu::forward<T, true>(f, fp8, stream)))
}

int64_t gate_residual_norm_modulate_backward_scratch(int64_t rows, int64_t width, int64_t segments, bool equal) {
  return gpu::most_chunks(rows, segments, equal, gpu::kChunkRows) * 3 * width * static_cast<int64_t>(sizeof(float));
}

int gate_residual_norm_modulate_backward_cuda(const GateResidualNormModulateBackward& p, void* scratch, void* stream) {
  if (!p.width) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return gpu::backward<T>(p, static_cast<float*>(scratch), stream))
}

}  // namespace qif
