// Weights in 4 bits: levels of a codebook times a scale for every 16 numbers of the depth, which are 8-bit integers
// again with one scale for a column:
//   weight[c][d] = (level[code] * times + 64) >> 7     times in 8..120, an integer for 16 numbers, but not 64
// so that linear_int8 multiplies them as it does others. The levels are odd, so that nothing lies halfway between two
// integers and every way to round gives the same; they are symmetric and fit Gaussian numbers, which
// rotation makes of any (docs/quantization.md has how they were chosen).
//
// A tile is 16 columns with 64 numbers of the depth, as in linear_int8.h: for every four numbers of the depth 32 bytes,
// in the low half of byte i what is number i of that layout, in the high half number i + 32; then [4][16] bytes, the
// times of every 16 numbers of the depth.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qif {

constexpr int64_t kInt4Group = 16, kInt4Codes = 512, kInt4Tile = kInt4Codes + 64;
constexpr int kInt4Shift = 7, kInt4LeastTimes = 8, kInt4MostTimes = 120;
alignas(16) constexpr int8_t kInt4Levels[16] = {-127, -105, -79, -61, -45, -31, -19, -5,
                                                5,    19,   31,  45,  61,  79,  105, 127};

namespace QIF_ISA {

inline int int4_value(int code, int times) {
  return (kInt4Levels[code] * times + (1 << (kInt4Shift - 1))) >> kInt4Shift;
}

// The tile's 8-bit integers, [16][16][4].
inline void int4_unpack(const uint8_t* tile, int8_t* out) {
#if defined(__AVX512BW__)
  const __m512i levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kInt4Levels)));
  const __m256i half = _mm256_set1_epi8(15);
  const __m512i odd = _mm512_set1_epi16(static_cast<int16_t>(0xFF00));
  for (int g = 0; g < 4; ++g) {
    const __m512i wide =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + kInt4Codes + 16 * g)));
    const __m512i times = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
    for (int q = 4 * g; q < 4 * g + 4; ++q) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32 * q));
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), half);
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(codes, half)), high, 1);
      const __m512i level = _mm512_shuffle_epi8(levels, both);
      // (256 level * times + 2^14) >> 15, of the even numbers and of the odd ones
      const __m512i a = _mm512_mulhrs_epi16(_mm512_slli_epi16(level, 8), times);
      const __m512i b = _mm512_mulhrs_epi16(_mm512_and_si512(level, odd), times);
      const __m512i value = _mm512_mask_mov_epi8(a, 0xAAAAAAAAAAAAAAAAull, _mm512_slli_epi16(b, 8));
      _mm512_storeu_si512(out + 64 * q, value);
    }
  }
#elif defined(__AVX2__)
  const __m256i levels = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kInt4Levels)));
  const __m256i half = _mm256_set1_epi8(15), odd = _mm256_set1_epi16(static_cast<int16_t>(0xFF00));
  for (int g = 0; g < 4; ++g)
    for (int side = 0; side < 2; ++side) {
      const uint8_t* at = tile + kInt4Codes + 16 * g + 8 * side;
      const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
      const __m256i times = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
      for (int q = 4 * g; q < 4 * g + 4; ++q) {
        __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32 * q));
        if (side) codes = _mm256_srli_epi16(codes, 4);
        const __m256i level = _mm256_shuffle_epi8(levels, _mm256_and_si256(codes, half));
        const __m256i a = _mm256_mulhrs_epi16(_mm256_slli_epi16(level, 8), times);
        const __m256i b = _mm256_mulhrs_epi16(_mm256_and_si256(level, odd), times);
        const __m256i value = _mm256_blendv_epi8(a, _mm256_slli_epi16(b, 8), odd);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 64 * q + 32 * side), value);
      }
    }
#else
  for (int i = 0; i < 1024; ++i) {
    const int q = i / 64, place = i % 64, code = tile[32 * q + place % 32] >> (place / 32 * 4) & 15;
    out[i] = static_cast<int8_t>(int4_value(code, tile[kInt4Codes + q / 4 * 16 + place / 4]));
  }
#endif
}

}  // namespace QIF_ISA
}  // namespace qif
