// Vectors of the width of the instruction set being compiled, on GCC/Clang vector extensions.
//
// Everything here lives in a namespace named after the instruction set (QIF_ISA): the same source is compiled once per
// set, and an inline function shared between two of them would be linked only once, with the wrong instructions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace qif {
namespace QIF_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVecBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));

typedef uint32_t U32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVecBytes / 2)));

// ---- scalar conversion -------------------------------------------------------------------------------------------

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float widen(Half x) {
  // Exponent re-biased by a float multiplication, which also normalises subnormals; inf and NaN keep their mantissa.
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, mag = x.bits & 0x7fff, u = mag << 13;
  float f;
  if (mag >= 0x7c00) {
    u |= 0x7f800000;
    std::memcpy(&f, &u, 4);
  } else {
    std::memcpy(&f, &u, 4);
    f *= 5.192296858534828e+33f;  // 2^112
  }
  std::memcpy(&u, &f, 4);
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void narrow(float* dst, float x) { *dst = x; }
inline void narrow(double* dst, double x) { *dst = x; }
inline void narrow(BFloat16* dst, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  dst->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void narrow(Half* dst, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) {
    dst->bits = static_cast<uint16_t>(sign | 0x7e00);  // NaN
  } else if (mag >= 0x477ff000) {
    dst->bits = static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity: 65520 and above
  } else if (mag < 0x38800000) {
    // Subnormal half: adding 0.5 leaves the value's 2^-24 multiples in the low mantissa bits, rounded to nearest even.
    float f;
    std::memcpy(&f, &mag, 4);
    f += 0.5f;
    std::memcpy(&mag, &f, 4);
    dst->bits = static_cast<uint16_t>(sign | (mag - 0x3f000000));
  } else {
    mag += 0xc8000fff + ((mag >> 13) & 1);
    dst->bits = static_cast<uint16_t>(sign | (mag >> 13));
  }
}

// ---- loads and stores: V is a vector Vec<A> or the scalar A ------------------------------------------------------

template <class V, class A>
inline V splat(A x) {
  V v = {};
  return x - v;  // not x + v, which is no broadcast: it turns -0 into 0
}

template <class V>
inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline V load(const double* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline V load(const BFloat16* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return widen(*p);
  } else {
    U16 h;
    std::memcpy(&h, p, sizeof(h));
    U32 u = __builtin_convertvector(h, U32) << 16;
    V v;
    std::memcpy(&v, &u, sizeof(v));
    return v;
  }
}
template <class V>
inline V load(const Half* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return widen(*p);
  } else {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
    return v;
#endif
  }
}

template <class V>
inline void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class V>
inline void store(double* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class V>
inline void store(BFloat16* p, V v) {
  if constexpr (sizeof(V) == sizeof(float)) {
    narrow(p, v);
  } else {
    U32 u;
    std::memcpy(&u, &v, sizeof(u));
    U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    U32 nan = splat<U32>(0x7fc0u);
    U32 bits = v != v ? nan : rounded;
    U16 h = __builtin_convertvector(bits, U16);
    std::memcpy(p, &h, sizeof(h));
  }
}
template <class V>
inline void store(Half* p, V v) {
  if constexpr (sizeof(V) == sizeof(float)) {
    narrow(p, v);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) narrow(p + i, static_cast<float>(v[i]));
#endif
  }
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

// a * b + c, in one rounding where the instruction set has it.
template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#if defined(__AVX512F__)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#endif

// ---- loops over a row --------------------------------------------------------------------------------------------

template <class V>
struct Lane {
  using type = V;
};

// f(Lane<V>, i) for vectors, then for the scalars of the tail; write it once as a generic lambda.
template <class A, class F>
inline void each(int64_t n, F&& f) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f(Lane<Vec<A>>{}, i);
  for (; i < n; ++i) f(Lane<A>{}, i);
}

template <class A>
inline A horizontal_sum(Vec<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int w = kLanes<A> / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) lanes[i] += lanes[i + w];
  return lanes[0];
}

// Sum of f(Lane<V>, i) in four interleaved vectors, folded as a tree: the error grows with n / (4 * lanes), not n.
template <class A, class F>
inline A reduce(int64_t n, F&& f) {
  constexpr int L = kLanes<A>;
  Vec<A> a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    a += f(Lane<Vec<A>>{}, i);
    b += f(Lane<Vec<A>>{}, i + L);
    c += f(Lane<Vec<A>>{}, i + 2 * L);
    d += f(Lane<Vec<A>>{}, i + 3 * L);
  }
  for (; i + L <= n; i += L) a += f(Lane<Vec<A>>{}, i);
  A tail = 0;
  for (; i < n; ++i) tail += f(Lane<A>{}, i);
  return horizontal_sum<A>((a + b) + (c + d)) + tail;
}

// Neighbours swapped: (v1, v0, v3, v2, ...), the other half of an interleaved complex product.
inline Vec<float> swap_pairs(Vec<float> v) {
#if defined(__AVX512F__)
  return __builtin_shuffle(v, U32{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#elif defined(__AVX__)
  return __builtin_shuffle(v, U32{1, 0, 3, 2, 5, 4, 7, 6});
#else
  return __builtin_shuffle(v, U32{1, 0, 3, 2});
#endif
}
inline Vec<double> swap_pairs(Vec<double> v) {
  typedef uint64_t U64 __attribute__((vector_size(kVecBytes)));
#if defined(__AVX512F__)
  return __builtin_shuffle(v, U64{1, 0, 3, 2, 5, 4, 7, 6});
#elif defined(__AVX__)
  return __builtin_shuffle(v, U64{1, 0, 3, 2});
#else
  return __builtin_shuffle(v, U64{1, 0});
#endif
}

}  // namespace QIF_ISA
}  // namespace qif
