// joint_attention backward on the GPU. Bound by arithmetic: seven matrix products of 2 * queries * keys * head_dim FLOP
// for each head, three for grad_q and four for grad_k and grad_v: two more than with atomic sums, which would not give
// the same bits twice.
#include "kernels/attention_tile.cuh"

namespace qif {
namespace gpu {

// Rows of the block's own side, and of the other side in a step.
template <int E>
struct BackwardTile {
  static constexpr int kRows = kAttentionWarps * 16, kOthers = E == 128 ? 32 : 64;
  static constexpr int kValues = (2 * kRows + 4 * kOthers) * E;  // own two tensors, two stages of the other two
};

// delta = sum(grad_out * out) of each row of each head: E / 8 lanes to a row. Bound by memory, two reads.
constexpr int kDeltaThreads = 256;
template <class T, int E>
__global__ void __launch_bounds__(kDeltaThreads)
    joint_attention_delta(const T* grad_out, const T* out, float* delta, int64_t q_rows) {
  constexpr int kLanes = E / 8;
  const int64_t row = int64_t{blockIdx.x} * (kDeltaThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t at = (row * gridDim.y + blockIdx.y) * E + threadIdx.x % kLanes * 8;
  float sum = 0.0f;
  if (row < q_rows) {
    float g[8], o[8];
    load(grad_out + at, g);
    load(out + at, o);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += g[j] * o[j];
  }
  sum = warp_sum<kLanes>(sum);
  if (row < q_rows && threadIdx.x % kLanes == 0) store_global(delta + blockIdx.y * q_rows + row, sum);
}

// A block's two own tiles, and two stages of the two tiles of the other side.
template <class T, int E>
struct Stages {
  using Tile = BackwardTile<E>;
  Shared<T> own[2], other;
  const T* heads[2];
  int64_t row_stride, begin, end;
  int tiles;

  QIF_INLINE Shared<T> get(int tile, int which) const { return other + (tile % 2 * 2 + which) * Tile::kOthers * E; }
  QIF_INLINE void copy(int tile) const {
    const int64_t first = begin + int64_t{tile} * Tile::kOthers;
    if (tile < tiles) {
      copy_tile<E, Tile::kOthers>(get(tile, 0), heads[0], row_stride, first, end);
      copy_tile<E, Tile::kOthers>(get(tile, 1), heads[1], row_stride, first, end);
    }
    commit_copies();
  }
  // The first copies: own rows and the first stage.
  QIF_INLINE void start(const TilePlace& place, const T* own0, const T* own1, const T* other0, const T* other1,
                        int64_t stride) {
    own[0] = dynamic_shared<T>();
    own[1] = own[0] + Tile::kRows * E;
    other = own[1] + Tile::kRows * E;
    heads[0] = other0;
    heads[1] = other1;
    row_stride = stride;
    begin = place.other_begin;
    end = place.other_end;
    tiles = static_cast<int>(end - begin + Tile::kOthers - 1) / Tile::kOthers;
    copy_tile<E, Tile::kRows>(own[0], own0, stride, place.begin, place.end);
    copy_tile<E, Tile::kRows>(own[1], own1, stride, place.begin, place.end);
    copy(0);
  }
};

// grad_q of a tile of queries: dS = P * (grad_out v^T - delta), grad_q = scale * dS k.
template <class T, int E>
__global__ void __launch_bounds__(kAttentionThreads)
    joint_attention_backward_q(const __grid_constant__ AttentionArguments p) {
  using Tile = BackwardTile<E>;
  constexpr int kColumns = Tile::kOthers / 8;
  TilePlace place;
  if (!find_tile(p.samples.q, p.samples.k, p.samples.count, blockIdx.x, Tile::kRows, place)) return;
  const int64_t column = int64_t{blockIdx.y} * E;
  Stages<T, E> stages;
  stages.start(place, static_cast<const T*>(p.q) + column, static_cast<const T*>(p.grad_out) + column,
               static_cast<const T*>(p.k) + column, static_cast<const T*>(p.v) + column, p.row_stride);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  float lse[2] = {INFINITY, INFINITY}, delta[2] = {};  // 2^-inf: rows past the end weigh nothing
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t query = place.begin + row + 8 * half + lane / 4;
    if (query < place.end) {
      lse[half] = load_global(static_cast<const float*>(p.lse) + blockIdx.y * p.q_rows + query) * kLog2E;
      delta[half] = load_global(static_cast<const float*>(p.delta) + blockIdx.y * p.q_rows + query);
    }
  }
  float grad[1][E / 8][4] = {};
  for (int tile = 0; tile < stages.tiles; ++tile) {
    stages.copy(tile + 1);
    wait_copies<1>();
    __syncthreads();
    float weights[1][kColumns][4], slopes[1][kColumns][4];
    multiply_rows<E>(stages.own[0], row, stages.get(tile, 0), weights);
    multiply_rows<E>(stages.own[1], row, stages.get(tile, 1), slopes);
    const int left = static_cast<int>(stages.end - stages.begin) - tile * Tile::kOthers;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2_approximate(weights[0][n][i] * (p.scale * kLog2E) - lse[i / 2]);
        const bool valid = 8 * n + lane % 4 * 2 + i % 2 < left;
        slopes[0][n][i] = valid ? weight * (slopes[0][n][i] - delta[i / 2]) : 0.0f;
      }
    multiply_weights<E>(slopes, stages.get(tile, 0), grad);
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();  // also without any tile: the own rows were copied by all
  const float factor[1][2] = {{p.scale, p.scale}};
  store_rows<E>(grad, factor, stages.own[0], row, static_cast<T*>(p.grad_q) + column, p.row_stride, place.begin,
                place.end);
}

// grad_k and grad_v of a tile of keys, everything transposed: P^T = exp(k q^T - lse), dS^T = P^T * (v grad_out^T -
// delta); grad_v = P^T grad_out, grad_k = scale * dS^T q.
template <class T, int E>
__global__ void __launch_bounds__(kAttentionThreads)
    joint_attention_backward_kv(const __grid_constant__ AttentionArguments p) {
  using Tile = BackwardTile<E>;
  constexpr int kColumns = Tile::kOthers / 8;
  TilePlace place;
  if (!find_tile(p.samples.k, p.samples.q, p.samples.count, blockIdx.x, Tile::kRows, place)) return;
  const int64_t column = int64_t{blockIdx.y} * E;
  Stages<T, E> stages;
  stages.start(place, static_cast<const T*>(p.k) + column, static_cast<const T*>(p.v) + column,
               static_cast<const T*>(p.q) + column, static_cast<const T*>(p.grad_out) + column, p.row_stride);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  const float *lse = p.lse + blockIdx.y * p.q_rows, *delta = p.delta + blockIdx.y * p.q_rows;
  float grad_k[1][E / 8][4] = {}, grad_v[1][E / 8][4] = {};
  for (int tile = 0; tile < stages.tiles; ++tile) {
    stages.copy(tile + 1);
    wait_copies<1>();
    __syncthreads();
    float weights[1][kColumns][4], slopes[1][kColumns][4];
    multiply_rows<E>(stages.own[0], row, stages.get(tile, 0), weights);
    multiply_rows<E>(stages.own[1], row, stages.get(tile, 1), slopes);
    const int64_t first = stages.begin + int64_t{tile} * Tile::kOthers + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t query = first + 8 * n + odd;
        const bool valid = query < stages.end;
        const float own_lse = valid ? load_global(lse + query) * kLog2E : INFINITY;
        const float own_delta = valid ? load_global(delta + query) : 0.0f;
#pragma unroll
        for (int i = odd; i < 4; i += 2) {
          weights[0][n][i] = exp2_approximate(weights[0][n][i] * (p.scale * kLog2E) - own_lse);
          slopes[0][n][i] = weights[0][n][i] * (slopes[0][n][i] - own_delta);
        }
      }
    multiply_weights<E>(weights, stages.get(tile, 1), grad_v);
    multiply_weights<E>(slopes, stages.get(tile, 0), grad_k);
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();  // also without any tile: the own rows were copied by all
  const float factor_k[1][2] = {{p.scale, p.scale}}, factor_v[1][2] = {{1.0f, 1.0f}};
  store_rows<E>(grad_k, factor_k, stages.own[0], row, static_cast<T*>(p.grad_k) + column, p.row_stride, place.begin,
                place.end);
  store_rows<E>(grad_v, factor_v, stages.own[1], row, static_cast<T*>(p.grad_v) + column, p.row_stride, place.begin,
                place.end);
}

template <class T, int E>
static int backward(const JointAttentionBackward& b, float* delta, void* stream) {
  using Tile = BackwardTile<E>;
  const JointAttention& p = b.forward;
  AttentionArguments arguments = attention_arguments(p);
  arguments.grad_out = b.grad_out;
  arguments.grad_q = b.grad_q;
  arguments.grad_k = b.grad_k;
  arguments.grad_v = b.grad_v;
  arguments.delta = delta;
  const unsigned heads = static_cast<unsigned>(p.heads);
  const size_t bytes = Tile::kValues * sizeof(T);
  if (arguments.q_rows) {
    const dim3 grid(static_cast<unsigned>(ceil_div(arguments.q_rows, kDeltaThreads / (E / 8))), heads);
    const int error = launch(joint_attention_delta<T, E>, grid, dim3(kDeltaThreads), 0, stream,
                             static_cast<const T*>(b.grad_out), static_cast<const T*>(p.out), delta, arguments.q_rows);
    if (error) return error;
  }
  return each_launch(p, arguments, Tile::kRows, Tile::kRows,
                     [&](const AttentionArguments& a, unsigned query_tiles, unsigned key_tiles) {
                       int error = kSuccess;
                       if (query_tiles)
                         error = launch(joint_attention_backward_q<T, E>, dim3(query_tiles, heads),
                                        dim3(kAttentionThreads), bytes, stream, a);
                       if (!error && key_tiles)
                         error = launch(joint_attention_backward_kv<T, E>, dim3(key_tiles, heads),
                                        dim3(kAttentionThreads), bytes, stream, a);
                       return error;
                     });
}

}  // namespace gpu

int64_t joint_attention_backward_scratch(int64_t q_rows, int64_t heads) {
  return q_rows * heads * static_cast<int64_t>(sizeof(float));
}

int joint_attention_backward_cuda(const JointAttentionBackward& b, void* scratch, void* stream) {
  if (!b.forward.heads) return gpu::kSuccess;
  QIF_DISPATCH_ATTENTION(b.forward, T, E, return (gpu::backward<T, E>(b, static_cast<float*>(scratch), stream)))
}

}  // namespace qif
