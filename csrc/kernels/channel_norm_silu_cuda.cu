// channel_norm_silu on the GPU. Bound by memory: forward reads and writes a row once; backward reads two rows and
// writes one, and 2 * channels * 4 bytes of partial sums per chunk of rows. Rows are short (96 to 384 channels), so a
// warp takes several: 4, 8, 16 or 32 lanes keep one row in registers, three packs of 8 each.
#include "kernels/channel_norm_silu.h"
#include "kernels/norm_row.cuh"

namespace qif {
namespace gpu {

constexpr int kChannelThreads = 128;
constexpr int kChannelPacks = 3;
constexpr int kChannelSteps = 4;  // rows that the lanes of a row take one after the other: gamma is read once for them
constexpr float kSmallestNorm = 1e-12f;

// Runs BODY with N, KEEP and LANES for a number of channels: rows in registers up to 768, else streamed by a warp.
#define QIF_CHANNEL_VARIANT(channels, vector, N, KEEP, LANES, ...) \
  if (!(vector)) {                                                 \
    constexpr int N = 1, KEEP = 0, LANES = 32;                     \
    __VA_ARGS__;                                                   \
  } else if ((channels) <= 96) {                                   \
    constexpr int N = 8, KEEP = kChannelPacks, LANES = 4;          \
    __VA_ARGS__;                                                   \
  } else if ((channels) <= 192) {                                  \
    constexpr int N = 8, KEEP = kChannelPacks, LANES = 8;          \
    __VA_ARGS__;                                                   \
  } else if ((channels) <= 384) {                                  \
    constexpr int N = 8, KEEP = kChannelPacks, LANES = 16;         \
    __VA_ARGS__;                                                   \
  } else if ((channels) <= 768) {                                  \
    constexpr int N = 8, KEEP = kChannelPacks, LANES = 32;         \
    __VA_ARGS__;                                                   \
  } else {                                                         \
    constexpr int N = 8, KEEP = 0, LANES = 32;                     \
    __VA_ARGS__;                                                   \
  }

// exp(-u), clamped where float would overflow, long after the sigmoid 1 / (1 + exp(-u)) is 0; NaN stays NaN.
template <class T>
QIF_INLINE float exp_minus(float u) {
  return exponential<T>(-u > kLargestExponent ? kLargestExponent : -u);
}

// sqrt(channels) / max(|x|_2, 1e-12); NaN where a value of the row is.
template <class T, int N, int Keep, int Lanes>
QIF_INLINE float norm_factor(const Row<T, N, Keep, Lanes>& row, int width, int channels, float& norm) {
  float squares = 0.0f;
  each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
    float v[N];
    row.get(k, i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += v[j] * v[j];
  });
  norm = sqrtf(warp_sum<Lanes>(squares));
  return sqrtf(static_cast<float>(channels)) / (norm < kSmallestNorm ? kSmallestNorm : norm);
}

// x + added + residual in the place of x: in its registers, or, where rows are not kept, in `out`.
template <class T, int N, int Keep, int Lanes>
QIF_INLINE void add_to(Row<T, N, Keep, Lanes>& x, const Row<T, N, Keep, Lanes>& added, const T* residual, T* out,
                       int width) {
  Row<T, N, Keep, Lanes> rest;
  if (residual) rest.read(residual, width);
  each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
    float v[N], a[N], r[N];
    x.get(k, i, v);
    added.get(k, i, a);
    if (residual) rest.get(k, i, r);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += residual ? a[j] + r[j] : a[j];
    if constexpr (Keep > 0)
      x.kept[k] = narrow<T>(v);
    else
      store(out + i, v);
  });
  x.source = out;
}

template <class T, int N, int Keep, int Lanes, bool Add>
__global__ void __launch_bounds__(kChannelThreads) channel_norm_silu_rows(ChannelNormSilu p) {
  constexpr int kRows = kChannelThreads / Lanes;
  const int channels = static_cast<int>(p.channels);
  Row<T, N, Keep, Lanes> gamma, x, added;
  if (!Add || p.gamma) gamma.read(static_cast<const T*>(p.gamma), channels);
  if constexpr (Add) added.read(static_cast<const T*>(p.added), channels);
  for (int step = 0; step < kChannelSteps; ++step) {
    const int64_t r = (int64_t{blockIdx.x} * kChannelSteps + step) * kRows + threadIdx.x / Lanes;
    const int width = r < p.rows ? channels : 0;  // no early return: all lanes of a warp take part in its sums
    T* out = static_cast<T*>(p.out) + r * p.channels;
    x.read(static_cast<const T*>(p.x) + r * p.channels, width);
    if constexpr (Add) {
      add_to(x, added, p.residual ? static_cast<const T*>(p.residual) + r * p.channels : nullptr, out, width);
      if (!p.gamma) {
        if constexpr (Keep > 0) each_pack<N, Keep, Lanes>(width, [&](int k, int i) { store_pack(out + i, x.kept[k]); });
        continue;
      }
    }
    float norm;
    const float factor = norm_factor(x, width, channels, norm);
    each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
      float v[N], g[N], b[N];
      x.get(k, i, v);
      gamma.get(k, i, g);
      if (p.bias) load(static_cast<const T*>(p.bias) + i, b);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float u = v[j] * factor * g[j];
        if (p.bias) u += b[j];
        v[j] = p.silu ? quotient<T>(u, 1.0f + exp_minus<T>(u)) : u;
      }
      store(out + i, v);
    });
  }
}

// A block takes a chunk of rows. The sums over them stay in registers, are added over the lanes that share a column in
// shared memory, and go to partials[chunk][gamma, bias][channels]; without kept rows (Keep 0), a block is one warp and
// adds to its partials in memory.
template <class T, int N, int Keep, int Lanes>
__global__ void __launch_bounds__(Keep > 0 ? kChannelThreads : 32)
    channel_norm_silu_chunk(ChannelNormSiluBackward p, float* partials, int chunk_rows) {
  constexpr bool kKept = Keep > 0;
  constexpr int kRows = kKept ? kChannelThreads / Lanes : 1, kPacks = kKept ? Keep : 1;
  const int channels = static_cast<int>(p.channels);
  const int64_t begin = int64_t{blockIdx.x} * chunk_rows;
  const int64_t end = begin + chunk_rows < p.rows ? begin + chunk_rows : p.rows;
  float* chunk_partials = partials + int64_t{blockIdx.x} * 2 * p.channels;
  Row<T, N, Keep, Lanes> gamma, x, grad_out;
  gamma.read(static_cast<const T*>(p.gamma), channels);
  float sums[2][kPacks][N], kept[kPacks][N];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) sums[0][k][j] = sums[1][k][j] = 0.0f;

  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t r = first + threadIdx.x / Lanes;
    const int width = r < end ? channels : 0;
    x.read(static_cast<const T*>(p.x) + r * p.channels, width);
    grad_out.read(static_cast<const T*>(p.grad_out) + r * p.channels, width);
    float norm;
    const float factor = norm_factor(x, width, channels, norm);
    // The gradient of u, the normalised x, and gamma.
    const auto gradient = [&](int k, int i, float (&g)[N], float (&xhat)[N], float (&weight)[N]) {
      float b[N];
      x.get(k, i, xhat);
      grad_out.get(k, i, g);
      gamma.get(k, i, weight);
      if (p.bias) load(static_cast<const T*>(p.bias) + i, b);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        xhat[j] *= factor;
        if (!p.silu) continue;
        float u = xhat[j] * weight[j];
        if (p.bias) u += b[j];
        const float e = exp_minus<T>(u), s = quotient<T>(1.0f, 1.0f + e);
        g[j] *= s + u * s * (u < 0.0f ? 1.0f - s : e * s);  // 1 - s, without the cancellation
      }
    };
    float dot = 0.0f;
    each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
      float g[N], xhat[N], weight[N];
      gradient(k, i, g, xhat, weight);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if constexpr (kKept) {
          sums[0][k][j] += g[j] * xhat[j];
          sums[1][k][j] += g[j];
        } else {
          float *to_gamma = chunk_partials + i + j, *to_bias = to_gamma + p.channels;
          const bool start = first == begin;
          store_global(to_gamma, g[j] * xhat[j] + (start ? 0.0f : load_global(static_cast<const float*>(to_gamma))));
          store_global(to_bias, g[j] + (start ? 0.0f : load_global(static_cast<const float*>(to_bias))));
        }
        const float d = g[j] * weight[j];
        if constexpr (kKept) kept[k][j] = d;
        dot += d * xhat[j];
      }
    });
    const float slope = warp_sum<Lanes>(dot) / static_cast<float>(channels);
    each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
      float d[N], xhat[N], weight[N];
      if constexpr (kKept) {
        x.get(k, i, xhat);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          xhat[j] *= factor;
          d[j] = kept[k][j];
        }
      } else {
        gradient(k, i, d, xhat, weight);
#pragma unroll
        for (int j = 0; j < N; ++j) d[j] *= weight[j];
      }
#pragma unroll
      for (int j = 0; j < N; ++j) d[j] = factor * (norm > kSmallestNorm ? d[j] - xhat[j] * slope : d[j]);
      store(static_cast<T*>(p.grad_x) + r * p.channels + i, d);
    });
  }
  if constexpr (kKept) {
    constexpr int kColumns = Lanes * Keep * N;
    QIF_SHARED(float, shared, 2 * kRows * kColumns);
    const int row = threadIdx.x / Lanes;
    each_pack<N, Keep, Lanes>(channels, [&](int k, int i) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        shared[row * kColumns + i + j] = sums[0][k][j];
        shared[(kRows + row) * kColumns + i + j] = sums[1][k][j];
      }
    });
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * channels; i += kChannelThreads) {
      const int output = i < channels ? 0 : 1, column = i - output * channels;
      float sum = 0.0f;
      for (int g = 0; g < kRows; ++g) sum += shared[(output * kRows + g) * kColumns + column];
      store_global(chunk_partials + i, sum);
    }
  }
}

template <class T, bool Add>
static int forward(const ChannelNormSilu& p, void* stream) {
  const bool vector = p.channels % 8 == 0 && aligned16({p.x, p.gamma, p.bias, p.out, p.added, p.residual});
  QIF_CHANNEL_VARIANT(p.channels, vector, N, Keep, Lanes, {
    const int64_t blocks = ceil_div(p.rows, kChannelSteps * (kChannelThreads / Lanes));
    return launch(channel_norm_silu_rows<T, N, Keep, Lanes, Add>, dim3(static_cast<unsigned>(blocks)),
                  dim3(kChannelThreads), 0, stream, p);
  })
}

// At most 1024 chunks, so that adding them costs little, of at least 64 rows; 16 where one warp adds them in sequence.
static int chunk_rows(int64_t rows, int64_t channels) {
  if (channels % 8 || channels > 768) return 16;
  const int64_t n = ceil_div(rows, 1024);
  return static_cast<int>(n < 64 ? 64 : n);
}

template <class T>
static int backward(const ChannelNormSiluBackward& p, float* partials, void* stream) {
  const bool vector = p.channels % 8 == 0 && aligned16({p.x, p.gamma, p.bias, p.grad_out, p.grad_x});
  const int rows = chunk_rows(p.rows, p.channels);
  const dim3 chunks(static_cast<unsigned>(ceil_div(p.rows, rows)));
  int error = kSuccess;
  if (p.rows)
    QIF_CHANNEL_VARIANT(p.channels, vector, N, Keep, Lanes,
                        error = launch(channel_norm_silu_chunk<T, N, Keep, Lanes>, chunks,
                                       dim3(Keep > 0 ? kChannelThreads : 32), 0, stream, p, partials, rows))
  if (error) return error;
  return launch_sum_chunks<T, 2>({partials, {p.grad_gamma, p.grad_bias}, {nullptr, p.rows, 1}, p.channels, rows},
                                 stream);
}

}  // namespace gpu

int channel_norm_silu_forward_cuda(const ChannelNormSilu& p, void*, void* stream) {
  if (!p.rows || !p.channels) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return (p.added ? gpu::forward<T, true> : gpu::forward<T, false>)(p, stream))
}

int64_t channel_norm_silu_backward_scratch(int64_t rows, int64_t channels) {
  return gpu::ceil_div(rows, gpu::chunk_rows(rows, channels)) * 2 * channels * static_cast<int64_t>(sizeof(float));
}

int channel_norm_silu_backward_cuda(const ChannelNormSiluBackward& p, void* scratch, void* stream) {
  if (!p.channels) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return gpu::backward<T>(p, static_cast<float*>(scratch), stream))
}

}  // namespace qif
