// qk_norm_rope on the GPU: a group of lanes per head with eight values each, a block for as many heads of a token as
// its groups. Bound by memory: forward reads and writes q, k and v once, 6 * heads * head_dim * sizeof(T) bytes per
// token; backward reads 5 and writes 3 rows. Rotation tables (4 * head_dim bytes per token) and weights come from cache
// for all but the first head. All that a head needs is read before any of it is used, as each wait costs as much as a
// head.
#include "kernels/chunks.cuh"
#include "kernels/qk_norm_rope.h"

namespace qif {
namespace gpu {

constexpr int kTokenThreads = 192;  // at most: 12 heads of 128 values
constexpr int kTokensPerChunk = 8;

// What a launch works on: the tokens of one stream.
struct Tokens {
  QkNormRopeStream stream;
  const int32_t *before, *before_q;  // rows of the other stream that stand before sample s: before[s]; null: none
  int lanes;                         // per head: a power of two up to 32, head_dim / 8 of them with values
  bool vector;                       // rows of q, k, v and the weights are aligned to 16 bytes
};

// Eight values that may be unaligned.
template <class T>
QIF_INLINE Pack<T, 8> load8(const T* p, bool vector) {
  if (vector) return load_pack<8>(p);
  Pack<T, 8> pack = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t one = load_pack<1>(p + j).w[0];
    if constexpr (sizeof(T) == 2)
      pack.w[j / 2] |= one << 16 * (j % 2);
    else
      pack.w[j] = one;
  }
  return pack;
}

struct TokenPlace {
  int64_t joint, joint_q;  // rows in the joint buffers
};

// Where rows go, with the last sample remembered: rows that follow each other are mostly of one.
struct Places {
  int64_t end = 0, shift = 0, shift_q = 0;

  QIF_INLINE TokenPlace find(const Tokens& t, int64_t row, int64_t samples) {
    if (row >= end) {
      const Segments segments{t.stream.cu, t.stream.rows, samples};
      const int64_t s = segments.find(row);
      end = segments.end(s);
      shift = t.before ? t.before[s] : 0;
      shift_q = t.before_q ? t.before_q[s] : 0;
    }
    return {row + shift, row + shift_q};
  }
};

QIF_INLINE float group_sum(float v, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

QIF_INLINE float inverse_rms(const float (&v)[8], int lanes, int64_t head_dim, float eps) {
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) squares += v[j] * v[j];
  return 1.0f / sqrtf(group_sum(squares, lanes) / static_cast<float>(head_dim) + eps);
}

// This lane's part of a head: four pairs, each rotated by (cos, sin).
template <class T>
struct HeadLane {
  int lanes, lane, group, groups;
  int64_t column;  // of its first value in the head
  bool inside;     // whether the lane has values: head_dim / 8 need not be a power of two
  float rope[8];

  QIF_INLINE HeadLane(int lanes_per_head, int64_t head_dim) {
    lanes = lanes_per_head;
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    groups = blockDim.x / lanes;
    column = lane * 8;
    inside = column < head_dim;
  }
  QIF_INLINE void read_rope(const float* token_rope) {
    if (inside) load(token_rope + column, rope);
  }
  QIF_INLINE Pack<T, 8> read_weight(const void* weight, bool vector) const {
    return weight && inside ? load8(static_cast<const T*>(weight) + column, vector) : Pack<T, 8>{};
  }
  QIF_INLINE void rotate(float (&v)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float a = v[j], b = v[j + 1], cos = rope[j], sin = rope[j + 1];
      v[j] = a * cos - b * sin;
      v[j + 1] = b * cos + a * sin;
    }
  }
  QIF_INLINE void rotate_back(float (&v)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float a = v[j], b = v[j + 1], cos = rope[j], sin = rope[j + 1];
      v[j] = a * cos + b * sin;
      v[j + 1] = b * cos - a * sin;
    }
  }
};

// A head of q or k; lanes that hold none of it take part in the sum.
template <class T>
QIF_INLINE void norm_rope_head(const HeadLane<T>& own, const Pack<T, 8>& x, const Pack<T, 8>& weight, T* dst,
                               bool holds, const QkNormRope& p) {
  float v[8], w[8];
  widen(x, v);
  widen(weight, w);
  const float r = inverse_rms(v, own.lanes, p.head_dim, static_cast<float>(p.eps));
  if (!holds) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = v[j] * r * w[j];
  own.rotate(v);
  store(dst, v);
}

template <class T>
QIF_INLINE void norm_rope_token(const QkNormRope& p, const Tokens& t, int64_t row) {
  const int64_t values = p.heads * p.head_dim;
  HeadLane<T> own(t.lanes, p.head_dim);
  const int64_t h = int64_t{blockIdx.y} * own.groups + own.group, at = h * p.head_dim + own.column;
  const bool holds = own.inside && h < p.heads;
  const QkNormRopeStream& s = t.stream;
  const auto read = [&](const void* source, int64_t stride) {
    return source && holds ? load8(static_cast<const T*>(source) + row * stride + at, t.vector) : Pack<T, 8>{};
  };
  const Pack<T, 8> q = read(s.q, s.q_stride), k = read(s.k, s.k_stride), v = read(s.v, s.v_stride);
  own.read_rope(s.rope + row * p.head_dim);
  const Pack<T, 8> wq = own.read_weight(s.q ? s.q_weight : nullptr, t.vector);
  const Pack<T, 8> wk = own.read_weight(s.k_weight, t.vector);
  const TokenPlace place = Places{}.find(t, row, p.samples);
  if (holds) store_pack(static_cast<T*>(p.v) + place.joint * values + at, v);
  if (s.q) norm_rope_head(own, q, wq, static_cast<T*>(p.q) + place.joint_q * values + at, holds, p);
  norm_rope_head(own, k, wk, static_cast<T*>(p.k) + place.joint * values + at, holds, p);
}

template <class T>
__global__ void __launch_bounds__(kTokenThreads, sizeof(T) == 2 ? 5 : 3)
    qk_norm_rope_tokens(QkNormRope p, Tokens txt, Tokens img) {
  // Two calls, not a choice of arguments: that would copy the parameters to local memory.
  if (int64_t{blockIdx.x} < txt.stream.rows)
    norm_rope_token<T>(p, txt, blockIdx.x);
  else
    norm_rope_token<T>(p, img, blockIdx.x - txt.stream.rows);
}

// With g the gradient before the rotation, xhat = x * r and d = g * weight:
// grad_x = r * (d - xhat * mean(d * xhat)); the lane's sum of g * xhat goes to `grad_w`.
template <class T>
QIF_INLINE void norm_rope_head_backward(const HeadLane<T>& own, const Pack<T, 8>& source, const Pack<T, 8>& weight,
                                        const Pack<T, 8>& grad_out, T* grad_src, float (&grad_w)[8], bool holds,
                                        const QkNormRope& p) {
  float x[8], g[8], w[8];
  widen(source, x);
  widen(grad_out, g);
  widen(weight, w);
  if (holds) own.rotate_back(g);
  const float r = inverse_rms(x, own.lanes, p.head_dim, static_cast<float>(p.eps));
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    x[j] *= r;
    sum += g[j] * w[j] * x[j];
  }
  const float mean = group_sum(sum, own.lanes) / static_cast<float>(p.head_dim);
  if (!holds) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    grad_w[j] += g[j] * x[j];
    g[j] = r * (g[j] * w[j] - x[j] * mean);
  }
  store(grad_src, g);
}

// The groups' sums in order: partial[column] for the block.
template <class T>
QIF_INLINE void sum_groups(const HeadLane<T>& own, const float (&v)[8], Shared<float> shared, float* partial,
                           int64_t head_dim) {
#pragma unroll
  for (int j = 0; j < 8; ++j) shared[threadIdx.x * 8 + j] = v[j];
  __syncthreads();
  for (int64_t c = threadIdx.x; c < head_dim; c += blockDim.x) {
    float sum = 0.0f;
    for (int g = 0; g < own.groups; ++g) sum += shared[g * own.lanes * 8 + c];
    store_global(partial + c, sum);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kTokenThreads)
    qk_norm_rope_chunk(QkNormRope p, Tokens t, QkNormRopeStreamGrad grad, float* partials) {
  QIF_SHARED(float, shared, kTokenThreads * 8);
  const int64_t begin = int64_t{blockIdx.x} * kTokensPerChunk, values = p.heads * p.head_dim;
  const int64_t end = begin + kTokensPerChunk < t.stream.rows ? begin + kTokensPerChunk : t.stream.rows;
  HeadLane<T> own(t.lanes, p.head_dim);
  const QkNormRopeStream& s = t.stream;
  const Pack<T, 8> wq = own.read_weight(s.q ? s.q_weight : nullptr, t.vector);
  const Pack<T, 8> wk = own.read_weight(s.k_weight, t.vector);
  float grad_wq[8] = {}, grad_wk[8] = {};
  Places places;
  for (int64_t row = begin; row < end; ++row) {
    const TokenPlace place = places.find(t, row, p.samples);
    own.read_rope(s.rope + row * p.head_dim);
    // The bound is the same for all lanes of a warp, as its shuffles ask.
    for (int64_t first = 0; first < p.heads; first += own.groups) {
      const int64_t at = (first + own.group) * p.head_dim + own.column;
      const bool holds = own.inside && first + own.group < p.heads;
      const auto read = [&](const void* source, int64_t offset, bool vector) {
        return source && holds ? load8(static_cast<const T*>(source) + offset + at, vector) : Pack<T, 8>{};
      };
      const Pack<T, 8> q = read(s.q, row * s.q_stride, t.vector), k = read(s.k, row * s.k_stride, t.vector);
      const Pack<T, 8> grad_q = read(s.q ? p.q : nullptr, place.joint_q * values, true);
      const Pack<T, 8> grad_k = read(p.k, place.joint * values, true);
      const Pack<T, 8> grad_v = read(p.v, place.joint * values, true);
      if (holds) store_pack(static_cast<T*>(grad.v) + row * values + at, grad_v);
      if (s.q)
        norm_rope_head_backward(own, q, wq, grad_q, static_cast<T*>(grad.q) + row * values + at, grad_wq, holds, p);
      norm_rope_head_backward(own, k, wk, grad_k, static_cast<T*>(grad.k) + row * values + at, grad_wk, holds, p);
    }
  }
  float* own_partials = partials + int64_t{blockIdx.x} * 2 * p.head_dim;
  sum_groups(own, grad_wq, shared, own_partials, p.head_dim);
  sum_groups(own, grad_wk, shared, own_partials + p.head_dim, p.head_dim);
}

// ---- launchers
// --------------------------------------------------------------------------------------------------------

static Tokens tokens(const QkNormRope& p, const QkNormRopeStream& s, const int32_t* before, const int32_t* before_q) {
  int lanes = 1;
  while (lanes * 8 < p.head_dim) lanes *= 2;
  const bool vector = s.q_stride % 8 == 0 && s.k_stride % 8 == 0 && s.v_stride % 8 == 0 &&
                      aligned16({s.q, s.k, s.v, s.q_weight, s.k_weight});
  return {s, before, before_q, lanes, vector};
}
// Text rows stand behind the image rows of earlier samples, image rows behind the text rows of their own as well; q of
// the image alone, when the text has none, stays where it is.
static Tokens text_tokens(const QkNormRope& p) { return tokens(p, p.txt, p.img.cu, p.img.cu); }
static Tokens image_tokens(const QkNormRope& p) {
  return tokens(p, p.img, p.txt.cu + 1, p.txt.q ? p.txt.cu + 1 : nullptr);
}

// Warps for all heads, as many as a block may have.
static unsigned token_threads(const QkNormRope& p, int lanes) {
  const int64_t threads = ceil_div(p.heads * lanes, 32) * 32;
  return static_cast<unsigned>(threads < kTokenThreads ? threads : kTokenThreads);
}

template <class T>
static int forward(const QkNormRope& p, void* stream) {
  const Tokens txt = text_tokens(p);
  const unsigned threads = token_threads(p, txt.lanes);
  const dim3 grid(static_cast<unsigned>(p.txt.rows + p.img.rows),
                  static_cast<unsigned>(ceil_div(p.heads * txt.lanes, threads)));
  return launch(qk_norm_rope_tokens<T>, grid, dim3(threads), 0, stream, p, txt, image_tokens(p));
}

template <class T>
static int backward_stream(const QkNormRope& p, const Tokens& t, const QkNormRopeStreamGrad& grad, float* partials,
                           void* stream) {
  const int64_t rows = t.stream.rows;
  if (rows) {
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, kTokensPerChunk)));
    const int error =
        launch(qk_norm_rope_chunk<T>, grid, dim3(token_threads(p, t.lanes)), 0, stream, p, t, grad, partials);
    if (error) return error;
  }
  // Also without rows, and for q that was not computed: the gradients are zeros then.
  return launch_sum_chunks<T, 2>(
      {partials, {grad.q_weight, grad.k_weight}, {nullptr, rows, 1}, p.head_dim, kTokensPerChunk}, stream);
}

template <class T>
static int backward(const QkNormRopeBackward& b, float* partials, void* stream) {
  const QkNormRope& p = b.forward;
  const int error = backward_stream<T>(p, text_tokens(p), b.txt, partials, stream);
  if (error) return error;
  partials += ceil_div(p.txt.rows, kTokensPerChunk) * 2 * p.head_dim;
  return backward_stream<T>(p, image_tokens(p), b.img, partials, stream);
}

}  // namespace gpu

int qk_norm_rope_forward_cuda(const QkNormRope& p, void*, void* stream) {
  if (p.txt.rows + p.img.rows == 0 || p.heads * p.head_dim == 0) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return gpu::forward<T>(p, stream))
}

int64_t qk_norm_rope_backward_scratch(int64_t txt_rows, int64_t img_rows, int64_t head_dim) {
  const int64_t chunks = gpu::ceil_div(txt_rows, gpu::kTokensPerChunk) + gpu::ceil_div(img_rows, gpu::kTokensPerChunk);
  return chunks * 2 * head_dim * static_cast<int64_t>(sizeof(float));
}

int qk_norm_rope_backward_cuda(const QkNormRopeBackward& b, void* scratch, void* stream) {
  if (b.forward.heads * b.forward.head_dim == 0) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(b.forward.dtype, T, return gpu::backward<T>(b, static_cast<float*>(scratch), stream))
}

}  // namespace qif
