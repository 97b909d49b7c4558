// qk_norm_rope on the GPU: a block per token, a group of lanes per head with eight values each. Bound by memory:
// forward reads and writes q, k and v once, 6 * heads * head_dim * sizeof(T) bytes per token; backward reads 5 and
// writes 3 rows. Rotation tables (4 * head_dim bytes per token) and weights come from cache for all but the first head.
#include "kernels/chunks.cuh"
#include "kernels/qk_norm_rope.h"

namespace qif {
namespace gpu {

constexpr int kTokenThreads = 256;
constexpr int kTokensPerChunk = 8;

// What a launch works on: the tokens of one stream.
struct Tokens {
  QkNormRopeStream stream;
  const int32_t *before, *before_q;  // rows of the other stream that stand before sample s: before[s]; null: none
  int lanes;                         // per head: a power of two up to 32, head_dim / 8 of them with values
  bool vector;                       // rows of q, k, v are aligned to 16 bytes
};

// Eight values that may be unaligned.
template <class T>
QIF_INLINE void load8(const T* p, bool vector, float (&v)[8]) {
  if (vector) {
    load(p, v);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float one[1];
      load(p + j, one);
      v[j] = one[0];
    }
  }
}

struct TokenPlace {
  int64_t joint, joint_q;  // rows in the joint buffers
};

QIF_INLINE TokenPlace find_token(const Tokens& t, int64_t row, int64_t samples) {
  const int64_t s = Segments{t.stream.cu, t.stream.rows, samples}.find(row);
  return {row + (t.before ? t.before[s] : 0), row + (t.before_q ? t.before_q[s] : 0)};
}

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
  bool holds;      // whether the lane has values: head_dim / 8 need not be a power of two
  float rope[8];

  QIF_INLINE HeadLane(int lanes_per_head, int64_t head_dim) {
    lanes = lanes_per_head;
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    groups = kTokenThreads / lanes;
    column = lane * 8;
    holds = column < head_dim;
  }
  QIF_INLINE void read_rope(const float* token_rope) {
    if (holds) load(token_rope + column, rope);
  }
  QIF_INLINE void read_weight(const void* weight, float (&w)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = 0.0f;
    if (weight && holds) load8(static_cast<const T*>(weight) + column, false, w);
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

template <class T>
QIF_INLINE void norm_rope_heads(const HeadLane<T>& own, const T* src, const float (&w)[8], T* dst, const QkNormRope& p,
                                bool vector) {
  // The bound is the same for all lanes of a warp, as its shuffles ask.
  for (int64_t first = 0; first < p.heads; first += own.groups) {
    const int64_t h = first + own.group;
    const bool holds = own.holds && h < p.heads;
    float v[8] = {};
    if (holds) load8(src + h * p.head_dim + own.column, vector, v);
    const float r = inverse_rms(v, own.lanes, p.head_dim, static_cast<float>(p.eps));
    if (!holds) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = v[j] * r * w[j];
    own.rotate(v);
    store(dst + h * p.head_dim + own.column, v);
  }
}

template <class T>
QIF_INLINE void copy_row(const T* src, T* dst, int64_t values, bool vector) {
  if (vector) {
    for (int64_t i = threadIdx.x * 8; i < values; i += kTokenThreads * 8) store_pack(dst + i, load_pack<8>(src + i));
  } else {
    for (int64_t i = threadIdx.x; i < values; i += kTokenThreads) store_pack(dst + i, load_pack<1>(src + i));
  }
}

template <class T>
QIF_INLINE void norm_rope_token(const QkNormRope& p, const Tokens& t, int64_t row) {
  const int64_t values = p.heads * p.head_dim;
  const TokenPlace place = find_token(t, row, p.samples);
  HeadLane<T> own(t.lanes, p.head_dim);
  own.read_rope(t.stream.rope + row * p.head_dim);
  float w[8];
  if (t.stream.q) {
    own.read_weight(t.stream.q_weight, w);
    norm_rope_heads(own, static_cast<const T*>(t.stream.q) + row * t.stream.q_stride, w,
                    static_cast<T*>(p.q) + place.joint_q * values, p, t.vector);
  }
  own.read_weight(t.stream.k_weight, w);
  norm_rope_heads(own, static_cast<const T*>(t.stream.k) + row * t.stream.k_stride, w,
                  static_cast<T*>(p.k) + place.joint * values, p, t.vector);
  copy_row(static_cast<const T*>(t.stream.v) + row * t.stream.v_stride, static_cast<T*>(p.v) + place.joint * values,
           values, t.vector);
}

template <class T>
__global__ void __launch_bounds__(kTokenThreads, 4) qk_norm_rope_tokens(QkNormRope p, Tokens txt, Tokens img) {
  // Two calls, not a choice of arguments: that would copy the parameters to local memory.
  if (int64_t{blockIdx.x} < txt.stream.rows)
    norm_rope_token<T>(p, txt, blockIdx.x);
  else
    norm_rope_token<T>(p, img, blockIdx.x - txt.stream.rows);
}

// With g the gradient before the rotation, xhat = x * r and d = g * weight:
// grad_x = r * (d - xhat * mean(d * xhat)); the lane's sum of g * xhat goes to `grad_w`.
template <class T>
QIF_INLINE void norm_rope_heads_backward(const HeadLane<T>& own, const T* src, const float (&w)[8], const T* grad_out,
                                         T* grad_src, float (&grad_w)[8], const QkNormRope& p, bool vector) {
  for (int64_t first = 0; first < p.heads; first += own.groups) {
    const int64_t h = first + own.group, at = h * p.head_dim + own.column;
    const bool holds = own.holds && h < p.heads;
    float x[8] = {}, g[8] = {};
    if (holds) {
      load8(src + at, vector, x);
      load(grad_out + at, g);
      own.rotate_back(g);
    }
    const float r = inverse_rms(x, own.lanes, p.head_dim, static_cast<float>(p.eps));
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] *= r;
      sum += g[j] * w[j] * x[j];
    }
    const float mean = group_sum(sum, own.lanes) / static_cast<float>(p.head_dim);
    if (!holds) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      grad_w[j] += g[j] * x[j];
      g[j] = r * (g[j] * w[j] - x[j] * mean);
    }
    store(grad_src + at, g);
  }
}

// The groups' sums in order: partial[column] for the block.
template <class T>
QIF_INLINE void sum_groups(const HeadLane<T>& own, const float (&v)[8], Shared<float> shared, float* partial,
                           int64_t head_dim) {
#pragma unroll
  for (int j = 0; j < 8; ++j) shared[threadIdx.x * 8 + j] = v[j];
  __syncthreads();
  for (int64_t c = threadIdx.x; c < head_dim; c += kTokenThreads) {
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
  float wq[8], wk[8], grad_wq[8] = {}, grad_wk[8] = {};
  own.read_weight(t.stream.q ? t.stream.q_weight : nullptr, wq);
  own.read_weight(t.stream.k_weight, wk);
  for (int64_t row = begin; row < end; ++row) {
    const TokenPlace place = find_token(t, row, p.samples);
    own.read_rope(t.stream.rope + row * p.head_dim);
    if (t.stream.q)
      norm_rope_heads_backward(own, static_cast<const T*>(t.stream.q) + row * t.stream.q_stride, wq,
                               static_cast<const T*>(p.q) + place.joint_q * values,
                               static_cast<T*>(grad.q) + row * values, grad_wq, p, t.vector);
    norm_rope_heads_backward(own, static_cast<const T*>(t.stream.k) + row * t.stream.k_stride, wk,
                             static_cast<const T*>(p.k) + place.joint * values, static_cast<T*>(grad.k) + row * values,
                             grad_wk, p, t.vector);
    copy_row(static_cast<const T*>(p.v) + place.joint * values, static_cast<T*>(grad.v) + row * values, values, true);
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
  const bool vector = s.q_stride % 8 == 0 && s.k_stride % 8 == 0 && s.v_stride % 8 == 0 && aligned16({s.q, s.k, s.v});
  return {s, before, before_q, lanes, vector};
}
// Text rows stand behind the image rows of earlier samples, image rows behind the text rows of their own as well; q of
// the image alone, when the text has none, stays where it is.
static Tokens text_tokens(const QkNormRope& p) { return tokens(p, p.txt, p.img.cu, p.img.cu); }
static Tokens image_tokens(const QkNormRope& p) {
  return tokens(p, p.img, p.txt.cu + 1, p.txt.q ? p.txt.cu + 1 : nullptr);
}

template <class T>
static int forward(const QkNormRope& p, void* stream) {
  return launch(qk_norm_rope_tokens<T>, dim3(static_cast<unsigned>(p.txt.rows + p.img.rows)), dim3(kTokenThreads), 0,
                stream, p, text_tokens(p), image_tokens(p));
}

template <class T>
static int backward_stream(const QkNormRope& p, const Tokens& t, const QkNormRopeStreamGrad& grad, float* partials,
                           void* stream) {
  const int64_t rows = t.stream.rows;
  if (rows) {
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, kTokensPerChunk)));
    const int error = launch(qk_norm_rope_chunk<T>, grid, dim3(kTokenThreads), 0, stream, p, t, grad, partials);
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
