// Tiles of rows of one head in shared memory and their products on tensor cores: shared by attention forward and
// backward. A block of four warps works on the rows of one tile, 16 or 32 of them to a warp, and streams past it the
// rows of the other side, the next while it computes with the last.
#pragma once
#include <type_traits>

#include "common/mma.cuh"
#include "kernels/joint_attention.h"

namespace qif {
namespace gpu {

constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// First rows of the samples. Passed by value: a captured graph keeps them, and no copy to the device is needed.
constexpr int kSamplesPerLaunch = 128;
struct SampleOffsets {
  int32_t q[kSamplesPerLaunch + 1], k[kSamplesPerLaunch + 1];
  int count;
};

// The same on the device, for lengths that a captured graph may not keep.
struct DeviceOffsets {
  const int32_t* first;
  QIF_INLINE int32_t operator[](int sample) const { return load_global(first + sample); }
};

// What the kernels get. `grad_*`, `out` and `delta` as the direction needs them.
struct AttentionArguments {
  const void *q, *k, *v, *grad_out;
  void *out, *grad_q, *grad_k, *grad_v;
  float *lse, *delta;  // [heads, q_rows]
  int64_t q_rows, row_stride;
  float scale;  // 1 / sqrt(head_dim)
  SampleOffsets samples;
  DeviceOffsets cu_q, cu_k;  // forward: in place of those in `samples`, where not null
};

// The rows of one tile, and those of the other side of the same sample.
struct TilePlace {
  int64_t begin, end, other_begin, other_end;
};

// Tile number `tile` of all samples; false: there is none.
template <class Offsets>
QIF_INLINE bool find_tile(Offsets rows, Offsets other, int samples, int tile, int tile_rows, TilePlace& place) {
  for (int s = 0; s < samples; ++s) {
    const int tiles = (rows[s + 1] - rows[s] + tile_rows - 1) / tile_rows;
    if (tile < tiles) {
      place = {int64_t{rows[s]} + tile * tile_rows, rows[s + 1], other[s], other[s + 1]};
      return true;
    }
    tile -= tiles;
  }
  return false;
}

// Where the eight values `chunk` of a row lie in a tile of rows of E values: spread so that eight rows at one chunk, as
// load_matrices reads them, lie in different banks.
template <int E>
QIF_INLINE int in_tile(int row, int chunk) {
  return row * E + (chunk ^ (E == 32 ? row / 2 % 4 : row % 8)) * 8;
}

// Queues the copy of rows begin, begin + 1, ... of a head into a tile; zeros from `end` on.
template <int E, int Rows, class T>
QIF_INLINE void copy_tile(Shared<T> tile, const T* head, int64_t row_stride, int64_t begin, int64_t end) {
  static_assert(Rows * E / 8 % kAttentionThreads == 0, "every thread copies as much");
#pragma unroll
  for (int i = threadIdx.x; i < Rows * E / 8; i += kAttentionThreads) {
    const int row = i / (E / 8), chunk = i % (E / 8);
    const bool valid = begin + row < end;
    copy_async(tile + in_tile<E>(row, chunk), head + (begin + (valid ? row : 0)) * row_stride + chunk * 8, valid);
  }
}

// acc[r] = A B^T: rows `row` + 16 r, ... of tile A with the 8 * Columns rows of tile B.
template <int E, class T, int RowTiles, int Columns>
QIF_INLINE void multiply_rows(Shared<T> a, int row, Shared<T> b, float (&acc)[RowTiles][Columns][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < RowTiles; ++r)
#pragma unroll
    for (int n = 0; n < Columns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][n][i] = 0.0f;
#pragma unroll
  for (int c = 0; c < E / 8; c += 2) {
    uint32_t fa[RowTiles][4];
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
      load_matrices<false>(a + in_tile<E>(row + 16 * r + lane % 16, c + lane / 16), fa[r]);
#pragma unroll
    for (int n = 0; n < Columns; n += 2) {
      uint32_t fb[4];
      load_matrices<false>(b + in_tile<E>(8 * n + lane / 16 * 8 + lane % 8, c + lane / 8 % 2), fb);
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        multiply_add<T>(fa[r], fb[0], fb[1], acc[r][n]);
        multiply_add<T>(fa[r], fb[2], fb[3], acc[r][n + 1]);
      }
    }
  }
}

// out[r] += W B: `weights` lie as multiply_rows left them, rounded here to T; their columns are the rows of tile B.
template <int E, class T, int RowTiles, int Columns>
QIF_INLINE void multiply_weights(const float (&weights)[RowTiles][Columns][4], Shared<T> b,
                                 float (&out)[RowTiles][E / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < Columns; k += 2) {
    uint32_t fa[RowTiles][4];
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      // A product lies in registers as the left side of the next one.
      fa[r][0] = narrow2(T{}, weights[r][k][0], weights[r][k][1]);
      fa[r][1] = narrow2(T{}, weights[r][k][2], weights[r][k][3]);
      fa[r][2] = narrow2(T{}, weights[r][k + 1][0], weights[r][k + 1][1]);
      fa[r][3] = narrow2(T{}, weights[r][k + 1][2], weights[r][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < E / 8; n += 2) {
      uint32_t fb[4];
      load_matrices<true>(b + in_tile<E>(8 * k + lane % 16, n + lane / 16), fb);
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        multiply_add<T>(fa[r], fb[0], fb[1], out[r][n]);
        multiply_add<T>(fa[r], fb[2], fb[3], out[r][n + 1]);
      }
    }
  }
}

// Rounds factor[r][half] * out[r] and stores it in the warp's rows begin + row, ... of a head, as far as `end`. It goes
// through the warp's own rows of `tile`, so that the stores are of 16 bytes; nobody else may still read these.
template <int E, class T, int RowTiles>
QIF_INLINE void store_rows(const float (&out)[RowTiles][E / 8][4], const float (&factor)[RowTiles][2], Shared<T> tile,
                           int row, T* head, int64_t row_stride, int64_t begin, int64_t end) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < RowTiles; ++r)
#pragma unroll
    for (int n = 0; n < E / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        shared_cast<uint32_t>(tile + in_tile<E>(row + 16 * r + 8 * half + lane / 4, n) + lane % 4 * 2)[0] =
            narrow2(T{}, out[r][n][2 * half] * factor[r][half], out[r][n][2 * half + 1] * factor[r][half]);
  __syncwarp();
#pragma unroll
  for (int i = lane; i < RowTiles * 16 * E / 8; i += 32) {
    const int own = row + i / (E / 8), chunk = i % (E / 8);
    if (begin + own < end)
      store_global(reinterpret_cast<Word4*>(head + (begin + own) * row_stride + chunk * 8),
                   static_cast<Word4>(shared_cast<Word4>(tile + in_tile<E>(own, chunk))[0]));
  }
  __syncwarp();
}

// ---- launch

// Calls run(arguments, tiles of queries, tiles of keys) for groups of samples that fit into a launch.
template <class Run>
int each_launch(const JointAttention& p, AttentionArguments arguments, int query_tile, int key_tile, Run run) {
  SampleOffsets& s = arguments.samples;
  const size_t samples = p.q_lens.size();
  int64_t q_row = 0, k_row = 0;
  for (size_t first = 0; first < samples; first += kSamplesPerLaunch) {
    s.count = static_cast<int>(samples - first < kSamplesPerLaunch ? samples - first : kSamplesPerLaunch);
    s.q[0] = static_cast<int32_t>(q_row);
    s.k[0] = static_cast<int32_t>(k_row);
    int64_t q_tiles = 0, k_tiles = 0;
    for (int i = 0; i < s.count; ++i) {
      s.q[i + 1] = static_cast<int32_t>(q_row += p.q_lens[first + i]);
      s.k[i + 1] = static_cast<int32_t>(k_row += p.k_lens[first + i]);
      q_tiles += ceil_div(p.q_lens[first + i], query_tile);
      k_tiles += ceil_div(p.k_lens[first + i], key_tile);
    }
    if (p.cu_q) {  // of any lengths: no more than one tile of each sample is not full
      arguments.cu_q.first = p.cu_q + first;
      arguments.cu_k.first = p.cu_k + first;
      q_tiles = ceil_div(arguments.q_rows, query_tile) + s.count;
    }
    if (const int error = run(arguments, static_cast<unsigned>(q_tiles), static_cast<unsigned>(k_tiles))) return error;
  }
  return kSuccess;
}

inline AttentionArguments attention_arguments(const JointAttention& p) {
  AttentionArguments a{};
  a.q = p.q;
  a.k = p.k;
  a.v = p.v;
  a.out = p.out;
  a.lse = p.lse;
  for (const int64_t n : p.q_lens) a.q_rows += n;
  a.row_stride = p.heads * p.head_dim;
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  return a;
}

}  // namespace gpu
}  // namespace qif

// Runs BODY with T and E for a dtype and a head width.
#define QIF_DISPATCH_ATTENTION(p, T, E, ...) \
  if ((p).dtype == ::qif::kFloat16) {        \
    using T = ::qif::Half;                   \
    QIF_DISPATCH_HEAD(p, E, __VA_ARGS__)     \
  } else {                                   \
    using T = ::qif::BFloat16;               \
    QIF_DISPATCH_HEAD(p, E, __VA_ARGS__)     \
  }
#define QIF_DISPATCH_HEAD(p, E, ...) \
  if ((p).head_dim == 32) {          \
    constexpr int E = 32;            \
    __VA_ARGS__;                     \
  } else if ((p).head_dim == 64) {   \
    constexpr int E = 64;            \
    __VA_ARGS__;                     \
  } else {                           \
    constexpr int E = 128;           \
    __VA_ARGS__;                     \
  }
