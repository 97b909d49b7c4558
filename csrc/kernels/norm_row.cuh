// One row of LayerNorm and modulation on the GPU, forward by a warp and backward by a block: shared by the two ops that
// end in it.
#pragma once
#include "common/fp8.cuh"
#include "kernels/chunks.cuh"

namespace qif {
namespace gpu {

// ---- forward: a warp or a block per row, which it keeps in registers
// -------------------------------------------------------------

constexpr int kRowThreads = 128;

// f(k, i) for every pack of a row: `i` is its first column. Kept packs (Keep > 0) have a fixed number k. Lanes: how
// many neighbouring threads share a row.
template <int N, int Keep, int Lanes = 32, class F>
QIF_INLINE void each_pack(int width, F&& f) {
  const int lane = threadIdx.x % Lanes;
  if constexpr (Keep > 0) {
#pragma unroll
    for (int k = 0; k < Keep; ++k) {
      const int i = (k * Lanes + lane) * N;
      if (i < width) f(k, i);
    }
  } else {
    for (int i = lane * N; i < width; i += Lanes * N) f(0, i);
  }
}

// Keep > 0: the row is read once and held, at most Keep packs in each lane. Keep 0: rows of any width, read from
// memory (in effect from cache) at every pass.
template <class T, int N, int Keep, int Lanes = 32>
struct Row {
  const T* source;
  Pack<T, N> kept[Keep > 0 ? Keep : 1];

  QIF_INLINE void read(const T* row, int width) {
    source = row;
    if constexpr (Keep > 0) each_pack<N, Keep, Lanes>(width, [&](int k, int i) { kept[k] = load_pack<N>(row + i); });
  }
  QIF_INLINE void get(int k, int i, float (&v)[N]) const {
    if constexpr (Keep > 0)
      widen(kept[k], v);
    else
      load(source + i, v);
  }
};

// Over the threads of a row, in shared memory where these are the block. One after the other a row needs several, each
// with a `partial` of its own.
template <int Lanes>
QIF_INLINE float row_sum(float v, Shared<float> partial) {
  if constexpr (Lanes <= 32) {
    return warp_sum<Lanes>(v);
  } else {
    float sum[1] = {v};
    block_sum(sum, partial);
    return sum[0];
  }
}
template <int Lanes>
QIF_INLINE float row_max(float v, Shared<float> partial) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, d));
  if constexpr (Lanes > 32) {
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    for (int w = 0; w < Lanes / 32; ++w) v = fmaxf(v, partial[w]);
  }
  return v;
}
constexpr int kRowShared = 3 * kMaxWarps;  // values for a row's reductions

struct RowStats {
  float mean, rstd;
};

// Two passes: E[(x - mean)^2], never E[x^2] - mean^2.
template <class T, int N, int Keep, int Lanes>
QIF_INLINE RowStats row_stats(const Row<T, N, Keep, Lanes>& row, int width, float eps, Shared<float> partial) {
  float sum = 0.0f;
  each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
    float v[N];
    row.get(k, i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += v[j];
  });
  const float mean = row_sum<Lanes>(sum, partial) / static_cast<float>(width);
  float squares = 0.0f;
  each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
    float v[N];
    row.get(k, i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (v[j] - mean) * (v[j] - mean);
  });
  return {mean, 1.0f / sqrtf(row_sum<Lanes>(squares, partial + kMaxWarps) / static_cast<float>(width) + eps)};
}

// out = (x - mean) * rstd * (1 + scale) + shift; with Fp8 also the rounded `out` of row `r` in `fp8`, from a second
// pass that computes it again. `partial` holds kRowShared values.
template <bool Fp8, class T, int N, int Keep, int Lanes>
QIF_INLINE void norm_modulate_row(const Row<T, N, Keep, Lanes>& row, const Row<T, N, Keep, Lanes>& shift,
                                  const Row<T, N, Keep, Lanes>& scale, T* out, int width, float eps,
                                  Shared<float> partial, const Fp8Rows& fp8, int64_t r) {
  const RowStats s = row_stats(row, width, eps, partial);
  auto modulated = [&](int k, int i, float (&v)[N]) {
    float sh[N], sc[N];
    row.get(k, i, v);
    shift.get(k, i, sh);
    scale.get(k, i, sc);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = (v[j] - s.mean) * s.rstd * (1.0f + sc[j]) + sh[j];
    return narrow<T>(v);
  };
  float largest = 0x1p-100f;  // rows of zeros are not divided by zero
  each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
    float v[N];
    const Pack<T, N> pack = modulated(k, i, v);
    store_pack(out + i, pack);
    if constexpr (Fp8) {
      widen(pack, v);
#pragma unroll
      for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(v[j]));
    }
  });
  if constexpr (Fp8) {
    largest = row_max<Lanes>(largest, partial + 2 * kMaxWarps);
    if (threadIdx.x % Lanes == 0) store_global(fp8.scales + r, largest / kLargestE4m3);
    const float inverse = kLargestE4m3 / largest;
    each_pack<N, Keep, Lanes>(width, [&](int k, int i) {
      float v[N];
      widen(modulated(k, i, v), v);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] *= inverse;
      store_e4m3(fp8.values + r * width + i, v);
    });
  }
}

// Runs BODY with N (values in a pack), KEEP and LANES for a width: 16-byte packs in registers up to 3072, streamed
// beyond; single values where rows are not aligned. Wide rows have a block each, so that few of them do not wait long.
#define QIF_ROW_VARIANT(width, vector, N, KEEP, LANES, ...)         \
  if ((vector) && (width) <= 1024) {                                \
    constexpr int N = 8, KEEP = 4, LANES = 32;                      \
    __VA_ARGS__;                                                    \
  } else if ((vector) && (width) <= 3072) {                         \
    constexpr int N = 8, KEEP = 3, LANES = ::qif::gpu::kRowThreads; \
    __VA_ARGS__;                                                    \
  } else if (vector) {                                              \
    constexpr int N = 8, KEEP = 0, LANES = 32;                      \
    __VA_ARGS__;                                                    \
  } else {                                                          \
    constexpr int N = 1, KEEP = 0, LANES = 32;                      \
    __VA_ARGS__;                                                    \
  }

template <int Lanes>
dim3 row_grid(int64_t rows) {
  return dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / Lanes)));
}

// ---- backward: a block per chunk of rows, row after row
// ---------------------------------------------------------------

constexpr int kChunkRows = 16;
constexpr int kBlockThreads = 384;

// Columns of a thread: one pack that stays its own (Held), so that its sums over rows stay in registers; or every
// blockDim-th pack, with the sums in `partials`, which only this thread touches.
template <int N, bool Held, class F>
QIF_INLINE void each_own_pack(int width, F&& f) {
  const int first = static_cast<int>(threadIdx.x) * N, step = static_cast<int>(blockDim.x) * N;
  if constexpr (Held) {
    if (first < width) f(first);
  } else {
    for (int i = first; i < width; i += step) f(i);
  }
}

// A row as the block sees it: a thread's own pack, read once, or any of its packs, read at every pass.
template <class T, int N, bool Held>
struct OwnRow {
  const T* source;
  Pack<T, N> kept;

  QIF_INLINE void read(const T* row, int width) {
    source = row;
    if constexpr (Held) each_own_pack<N, true>(width, [&](int i) { kept = load_pack<N>(row + i); });
  }
  QIF_INLINE void get(int i, float (&v)[N]) const {
    if constexpr (Held)
      widen(kept, v);
    else
      load(source + i, v);
  }
};

// The sums over rows of `Outputs` gradients for the thread's columns.
template <int N, bool Held, int Outputs>
struct ColumnSums {
  float* partials;  // [Outputs][width] of this chunk
  int width;
  bool first_row;
  float held[Held ? Outputs : 1][N];

  QIF_INLINE void start(float* chunk_partials, int row_width) {
    partials = chunk_partials;
    width = row_width;
    first_row = true;
    if constexpr (Held) {
#pragma unroll
      for (int o = 0; o < Outputs; ++o)
#pragma unroll
        for (int j = 0; j < N; ++j) held[o][j] = 0.0f;
    }
  }
  template <int O>
  QIF_INLINE void add(int i, const float (&v)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if constexpr (Held) {
        held[O][j] += v[j];
      } else {
        float* p = partials + static_cast<int64_t>(O) * width + i + j;
        store_global(p, first_row ? v[j] : load_global(static_cast<const float*>(p)) + v[j]);
      }
    }
  }
  QIF_INLINE void finish() {
    if constexpr (Held)
      each_own_pack<N, true>(width, [&](int i) {
#pragma unroll
        for (int o = 0; o < Outputs; ++o) store(partials + static_cast<int64_t>(o) * width + i, held[o]);
      });
  }
};

struct RowGradient {
  float mean, rstd, mean_d, mean_dx;

  // rstd * (d - mean(d) - xhat * mean(d * xhat)) with d = grad_out * (1 + scale)
  QIF_INLINE float operator()(float x, float d) const { return rstd * (d - mean_d - (x - mean) * rstd * mean_dx); }
};

// The statistics of a row and of its gradient, in two rounds over the block. mean(d * xhat) is rstd * mean(d * (x -
// mean)), so that it needs no third round.
template <class T, int N, bool Held>
QIF_INLINE RowGradient row_gradient(const OwnRow<T, N, Held>& x, const OwnRow<T, N, Held>& scale,
                                    const OwnRow<T, N, Held>& grad_out, int width, float eps, Shared<float> partial) {
  const float n = static_cast<float>(width);
  float sum[1] = {0.0f};
  each_own_pack<N, Held>(width, [&](int i) {
    float v[N];
    x.get(i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[0] += v[j];
  });
  block_sum(sum, partial);
  const float mean = sum[0] / n;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  each_own_pack<N, Held>(width, [&](int i) {
    float v[N], g[N], sc[N];
    x.get(i, v);
    grad_out.get(i, g);
    scale.get(i, sc);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float c = v[j] - mean, d = g[j] * (1.0f + sc[j]);
      sums[0] += c * c;
      sums[1] += d;
      sums[2] += d * c;
    }
  });
  block_sum(sums, partial + kMaxWarps);
  const float rstd = 1.0f / sqrtf(sums[0] / n + eps);
  return {mean, rstd, sums[1] / n, sums[2] * rstd / n};
}
constexpr int kRowGradientShared = 4 * kMaxWarps;  // values of `partial`

// Runs BODY with N and HELD for a width.
#define QIF_BLOCK_VARIANT(width, vector, N, HELD, ...)        \
  if ((vector) && (width) <= ::qif::gpu::kBlockThreads * 8) { \
    constexpr int N = 8;                                      \
    constexpr bool HELD = true;                               \
    __VA_ARGS__;                                              \
  } else if (vector) {                                        \
    constexpr int N = 8;                                      \
    constexpr bool HELD = false;                              \
    __VA_ARGS__;                                              \
  } else {                                                    \
    constexpr int N = 1;                                      \
    constexpr bool HELD = false;                              \
    __VA_ARGS__;                                              \
  }

inline unsigned block_threads(int64_t width, int n) {
  const int64_t warps = ceil_div(ceil_div(width, n), 32);
  return static_cast<unsigned>(32 * (warps < kBlockThreads / 32 ? warps : kBlockThreads / 32));
}

}  // namespace gpu
}  // namespace qif
