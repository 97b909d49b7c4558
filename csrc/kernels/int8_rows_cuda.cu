// int8_rows on the GPU, with the CPU's arithmetic, and the same rows in float8. One block for a row, which lies in
// shared memory between the two halves of its rotation: each thread takes 16 values that are neighbours, then 16 that
// lie 16 apart, and does two stages on them in registers. Bound by memory, and with GELU, whose polynomial is not
// contracted, by instructions.
#include "common/cuda.cuh"
#include "common/fp8.cuh"
#include "kernels/int8_rows.h"

namespace qif {
namespace gpu {

constexpr int kRowThreads = 256, kPiece = 16;

// Where four values of the row lie in shared memory: neither pieces of 16 nor values 16 apart meet in a bank.
QIF_INLINE int place_of_four(int four) { return four ^ (four >> 3 & 3); }

// A stage of the rotation on values `Stride` apart (int8_row.h).
template <int Stride>
QIF_INLINE void rotate(float (&x)[kPiece]) {
#pragma unroll
  for (int first = 0; first < kPiece; first += 4 * Stride)
#pragma unroll
    for (int i = first; i < first + Stride; ++i) {
      const float a = x[i], b = x[i + Stride], c = x[i + 2 * Stride], d = x[i + 3 * Stride];
      const float half = times(0.5f, plus(plus(a, b), plus(c, d)));
      x[i] = plus(half, -d);
      x[i + Stride] = plus(half, -c);
      x[i + 2 * Stride] = plus(half, -b);
      x[i + 3 * Stride] = plus(half, -a);
    }
}

// gelu_tanh_value.h and exponential.h, operation by operation.
QIF_INLINE float gelu_value(float v) {
  const float cube = times(times(times(0.044715f, v), v), v);
  float x = times(-2.0f * 0.79788456080286535588f, plus(v, cube));
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = plus(times(x, 1.44269504089f), 12582912.0f), n = plus(shifted, -12582912.0f);
  const float r = plus(plus(x, -times(n, 0.693359375f)), -times(n, -2.12194440e-4f));
  float p = plus(times(r, 1.9875691500e-4f), 1.3981999507e-3f);
  p = plus(times(p, r), 8.3334519073e-3f);
  p = plus(times(p, r), 4.1665795894e-2f);
  p = plus(times(p, r), 1.6666665459e-1f);
  p = plus(times(p, r), 5.0000001201e-1f);
  p = plus(plus(times(times(p, r), r), r), 1.0f);
  return v / plus(1.0f, from_bits(to_bits(p) + (to_bits(shifted) << 23)));
}

QIF_INLINE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

QIF_INLINE uint32_t largest_bits(const float (&v)[kPiece], uint32_t most) {
#pragma unroll
  for (int i = 0; i < kPiece; ++i) most = larger(most, to_bits(v[i]) & 0x7fffffffu);
  return most;
}

// Over the block, for every thread.
QIF_INLINE uint32_t block_largest(uint32_t most, Shared<uint32_t> of_warps) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, d));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
  __syncthreads();
  most = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) most = larger(most, of_warps[w]);
  return most;
}

// Whole packs where `Aligned`, values one by one else; what lies beyond the row is zero.
template <bool Aligned, class T>
QIF_INLINE void load_piece(const T* row, int begin, int width, float (&v)[kPiece]) {
  if (Aligned && begin + kPiece <= width) {
#pragma unroll
    for (int i = 0; i < kPiece; i += 8) {
      float half[8];
      load(row + begin + i, half);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i + j] = half[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    float one[1] = {0.0f};
    if (begin + i < width) load(row + begin + i, one);
    v[i] = one[0];
  }
}

// Four rotated values in the bytes of a word.
template <bool Float8>
QIF_INLINE uint32_t rounded(const Word4& four, float inverse) {
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = times(from_bits(four.w[j]), inverse);
  if (Float8) return narrow2_e4m3(v[0], v[1]) | narrow2_e4m3(v[2], v[3]) << 16;
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j)  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    word |= ((to_bits(plus(v[j], 12582912.0f)) + 128u) & 0xffu) << 8 * j;
  return word;
}

// `whole` is the width with its last group or tile filled up, as many values of shared memory.
template <class T, bool Aligned, bool Float8>
__global__ void __launch_bounds__(kRowThreads) int8_rows_row(const T* x, int64_t stride, uint8_t* values, float* scales,
                                                             int width, int whole, int group, bool gelu) {
  const int64_t r = blockIdx.x;
  const T* from = x + r * stride;
  QIF_SHARED(uint32_t, of_warps, kMaxWarps);
  const Shared<float> row = dynamic_shared<float>();
  const Shared<Word4> fours = shared_cast<Word4>(row);
  uint32_t most = 0;
  float v[kPiece];
  for (int piece = threadIdx.x; piece < whole / kPiece; piece += blockDim.x) {
    load_piece<Aligned>(from, piece * kPiece, width, v);
    if (gelu) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[i] = gelu_value(v[i]);
    }
    if (group >= 4) rotate<1>(v);
    if (group >= 16) rotate<4>(v);
    most = largest_bits(v, most);
#pragma unroll
    for (int i = 0; i < kPiece; i += 4) {
      Word4 four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.w[j] = to_bits(v[i + j]);
      fours[place_of_four(piece * 4 + i / 4)] = four;
    }
  }
  if (group >= 64) {
    most = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < whole / kPiece; i += blockDim.x) {
      // Neighbours in a half warp; the other half, 256 values on, goes through its own with each two exchanged, which
      // leaves what a stage computes and keeps the two out of each other's banks.
      const int first = i / 16 * 256 + i % 16, odd = i / 16 & 1;
      auto at = [&](int k) {
        const int value = first + (k ^ odd) * 16;
        return place_of_four(value / 4) * 4 + value % 4;
      };
#pragma unroll
      for (int k = 0; k < kPiece; ++k) v[k] = row[at(k)];
      rotate<1>(v);
      if (group == 256) rotate<4>(v);
      most = largest_bits(v, most);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) row[at(k)] = v[k];
    }
  }
  const float largest = from_bits(block_largest(most, of_warps));  // its barrier is that of the row, too
  const bool zero = largest < 1e-30f;
  constexpr float kLargest = Float8 ? kLargestE4m3 : 127.0f;
  const float inverse = zero ? 0.0f : kLargest / largest;
  if (threadIdx.x == 0) store_global(scales + r, zero ? 0.0f : largest / kLargest);
  const int64_t steps = (width + kInt8Depth - 1) / kInt8Depth;
  Word4* out = reinterpret_cast<Word4*>(values + r * steps * kInt8Depth);
  for (int piece = threadIdx.x; piece < steps * (kInt8Depth / kPiece); piece += blockDim.x) {
    Word4 bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) bytes.w[i] = rounded<Float8>(fours[place_of_four(piece * 4 + i)], inverse);
    store_global(out + piece, bytes);
  }
}

template <class T, bool Float8>
static int rows_of(const Int8Rows& p, void* stream) {
  const int width = static_cast<int>(p.width), step = p.group >= 64 ? 256 : static_cast<int>(kInt8Depth);
  const int whole = (width + step - 1) / step * step;
  const int threads = static_cast<int>(ceil_div(whole / kPiece, 32)) * 32;
  const bool aligned = aligned16({p.x}) && p.stride * sizeof(T) % 16 == 0;
  return launch(aligned ? int8_rows_row<T, true, Float8> : int8_rows_row<T, false, Float8>,
                dim3(static_cast<unsigned>(p.rows)), dim3(threads < kRowThreads ? threads : kRowThreads),
                whole * sizeof(float), stream, static_cast<const T*>(p.x), p.stride, p.values, p.scales, width, whole,
                static_cast<int>(p.group), p.gelu);
}

}  // namespace gpu

int int8_rows_cuda(const Int8Rows& p, void*, void* stream) {
  if (!p.rows) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(p.dtype, T, return p.float8 ? gpu::rows_of<T, true>(p, stream) : gpu::rows_of<T, false>(p, stream))
}

}  // namespace qif
