// joint_attention forward on the GPU. Bound by arithmetic: 4 * queries * keys * head_dim FLOP on tensor cores for each
// head, one read of q and one write of out; k and v come from L2 once for each tile of queries. mma.sync reaches about
// two thirds of the peak of GPUs from sm_90 on.
#include "kernels/attention_tile.cuh"

namespace qif {
namespace gpu {

template <int E>
struct ForwardTile {
  static constexpr int kRowTiles = 2, kQueries = kAttentionWarps * 16 * kRowTiles, kKeys = E == 128 ? 32 : 64;
  static constexpr int kValues = (kQueries + 4 * kKeys) * E;  // q, and two stages of k and v
};

// Softmax over keys that come tile by tile: the weights of a tile replace its scores, relative to the largest score so
// far; what was summed before is scaled when that grows.
template <int E, int RowTiles, int Columns>
struct OnlineSoftmax {
  float largest[RowTiles][2], sum[RowTiles][2];  // of the lane's rows; the sum of its own columns

  QIF_INLINE OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[r][half] = -INFINITY;
        sum[r][half] = 0.0f;
      }
  }

  // `scale` is that of the scores, in powers of two.
  QIF_INLINE void add(float (&scores)[RowTiles][Columns][4], float (&out)[RowTiles][E / 8][4], float scale) {
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = largest[r][half];
#pragma unroll
        for (int n = 0; n < Columns; ++n) m = fmaxf(m, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
        const float shrink = exp2_approximate((largest[r][half] - m) * scale);
        largest[r][half] = m;
        float s = 0.0f;
#pragma unroll
        for (int n = 0; n < Columns; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[r][n][i] = exp2_approximate((scores[r][n][i] - m) * scale);
            s += scores[r][n][i];
          }
        sum[r][half] = sum[r][half] * shrink + s;
#pragma unroll
        for (int n = 0; n < E / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) out[r][n][i] *= shrink;
      }
  }
};

template <class T, int E>
__global__ void __launch_bounds__(kAttentionThreads)
    joint_attention_forward_tile(const __grid_constant__ AttentionArguments p) {
  using Tile = ForwardTile<E>;
  constexpr int kRowTiles = Tile::kRowTiles, kKeys = Tile::kKeys;
  TilePlace place;
  const bool found = p.cu_q.first
                         ? find_tile(p.cu_q, p.cu_k, p.samples.count, blockIdx.x, Tile::kQueries, place)
                         : find_tile(p.samples.q, p.samples.k, p.samples.count, blockIdx.x, Tile::kQueries, place);
  if (!found) return;
  const Shared<T> q = dynamic_shared<T>();
  const int64_t column = int64_t{blockIdx.y} * E;
  const T *k_head = static_cast<const T*>(p.k) + column, *v_head = static_cast<const T*>(p.v) + column;
  const int tiles = static_cast<int>(place.other_end - place.other_begin + kKeys - 1) / kKeys;
  auto stage = [&](int tile) { return q + (Tile::kQueries + tile % 2 * 2 * kKeys) * E; };
  auto copy_stage = [&](int tile) {
    const int64_t begin = place.other_begin + int64_t{tile} * kKeys;
    if (tile < tiles) {
      copy_tile<E, kKeys>(stage(tile), k_head, p.row_stride, begin, place.other_end);
      copy_tile<E, kKeys>(stage(tile) + kKeys * E, v_head, p.row_stride, begin, place.other_end);
    }
    commit_copies();
  };
  copy_tile<E, Tile::kQueries>(q, static_cast<const T*>(p.q) + column, p.row_stride, place.begin, place.end);
  copy_stage(0);

  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * kRowTiles;
  float out[kRowTiles][E / 8][4] = {};
  OnlineSoftmax<E, kRowTiles, kKeys / 8> softmax;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_stage(tile + 1);
    wait_copies<1>();
    __syncthreads();
    float scores[kRowTiles][kKeys / 8][4];
    multiply_rows<E>(q, row, stage(tile), scores);
    const int left = static_cast<int>(place.other_end - place.other_begin) - tile * kKeys;
    if (left < kKeys) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (8 * n + lane % 4 * 2 + i % 2 >= left) scores[r][n][i] = -INFINITY;
    }
    softmax.add(scores, out, p.scale * kLog2E);
    multiply_weights<E>(scores, stage(tile) + kKeys * E, out);
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();  // also without any tile: the own rows were copied by all

  float factor[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[r][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      factor[r][half] = tiles ? 1.0f / sum : 0.0f;
      const int64_t query = place.begin + row + 16 * r + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < place.end)
        store_global(p.lse + blockIdx.y * p.q_rows + query,
                     tiles ? softmax.largest[r][half] * p.scale + logf(sum) : -INFINITY);
    }
  store_rows<E>(out, factor, q, row, static_cast<T*>(p.out) + column, p.row_stride, place.begin, place.end);
}

template <class T, int E>
static int forward(const JointAttention& p, void* stream) {
  using Tile = ForwardTile<E>;
  return each_launch(p, attention_arguments(p), Tile::kQueries, Tile::kKeys,
                     [&](const AttentionArguments& a, unsigned query_tiles, unsigned) {
                       if (!query_tiles) return kSuccess;
                       return launch(joint_attention_forward_tile<T, E>,
                                     dim3(query_tiles, static_cast<unsigned>(p.heads)), dim3(kAttentionThreads),
                                     Tile::kValues * sizeof(T), stream, a);
                     });
}

}  // namespace gpu

int joint_attention_forward_cuda(const JointAttention& p, void*, void* stream) {
  if (!p.heads) return gpu::kSuccess;
  QIF_DISPATCH_ATTENTION(p, T, E, return (gpu::forward<T, E>(p, stream)))
}

}  // namespace qif
