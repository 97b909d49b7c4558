// Rows in 8-bit floating point, e4m3 with one scale to a row: value = e4m3 * scale, scale = largest magnitude / 448.
#pragma once
#include "common/cuda.cuh"

namespace qif {
namespace gpu {

constexpr float kLargestE4m3 = 448.0f;

// Where a kernel puts them; without: null.
struct Fp8Rows {
  uint8_t* values;  // [rows, width]
  float* scales;    // [rows]
};

// To the nearest, ties to even; NaN stays NaN, and what is larger than 448 becomes 448. By integer arithmetic, as GPUs
// before sm_89 and the emulator need it.
QIF_INLINE uint32_t e4m3_bits(float v) {
  const uint32_t sign = to_bits(v) >> 24 & 0x80;
  const float a = fabsf(v);
  if (a != a) return sign | 0x7f;
  if (a >= kLargestE4m3) return sign | 0x7e;
  // Below 2^-6 values are multiples of 2^-9: adding 2^14, whose last place that is, rounds to them.
  if (a < 0.015625f) return sign | (to_bits(a + 16384.0f) & 0xf);
  const uint32_t bits = to_bits(a);
  return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));  // exponents are biased by 127 and 7
}

// Two values in the low half of a word, the first one lower.
QIF_INLINE uint32_t narrow2_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return e4m3_bits(low) | e4m3_bits(high) << 8;
#endif
}

struct alignas(8) Word2 {
  uint32_t w[2];
};

// N is 8 (`p` aligned to 8 bytes) or 1.
template <int N>
QIF_INLINE void store_e4m3(uint8_t* p, const float (&v)[N]) {
  if constexpr (N == 1) {
    store_global(p, static_cast<uint8_t>(narrow2_e4m3(v[0], 0.0f)));
  } else {
    Word2 words;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      words.w[i] = narrow2_e4m3(v[4 * i], v[4 * i + 1]) | narrow2_e4m3(v[4 * i + 2], v[4 * i + 3]) << 16;
    store_global(reinterpret_cast<Word2*>(p), words);
  }
}

}  // namespace gpu
}  // namespace qif
