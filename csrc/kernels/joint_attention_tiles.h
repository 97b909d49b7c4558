// What attention on the tile unit (AMX) and its gradients share: products of packed rows, packing, and 2^x.
//
// Of left operands a tile holds 16 rows with 32 numbers of the depth each, of right ones 16 pairs along the depth of 16
// columns.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "common/amx.h"

namespace qif::amx {

using Bits = uint16_t;

constexpr int64_t kTile = 512;  // numbers
constexpr int64_t kBlock = 32;  // rows, and columns, of sums that are made together
constexpr float kLog2E = 1.44269504f;

// ---- sums[32][32] (+)= rows times columns over `steps` tiles of the depth ----
//
// a, b: two tiles of each, `a_stride` and `b_stride` numbers apart; rows of sums are `stride` apart. `between` is
// called once a step: other work, which the tile unit does not wait for.

template <class F>
void multiply(const Bits* a, int64_t a_stride, const Bits* b, int64_t b_stride, int64_t steps, float* sums,
              int64_t stride, bool add, F&& between) {
  tile_barrier();
  if (add) {
    _tile_loadd(0, sums, stride * sizeof(float));
    _tile_loadd(1, sums + 16, stride * sizeof(float));
    _tile_loadd(2, sums + 16 * stride, stride * sizeof(float));
    _tile_loadd(3, sums + 16 * stride + 16, stride * sizeof(float));
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kTile, b += kTile) {
    between();
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_loadd(7, b + b_stride, 64);
    _tile_loadd(5, a + a_stride, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, stride * sizeof(float));
  _tile_stored(1, sums + 16, stride * sizeof(float));
  _tile_stored(2, sums + 16 * stride, stride * sizeof(float));
  _tile_stored(3, sums + 16 * stride + 16, stride * sizeof(float));
  tile_barrier();
}

// ---- packing ----

// Rows of one head: bits [rows][dim], `stride` apart.
struct Matrix {
  const Bits* data;
  int64_t rows, dim, stride;

  __m512i part(int64_t row, int64_t d) const {
    return row < rows ? _mm512_loadu_si512(data + row * stride + d) : _mm512_setzero_si512();
  }
};

// Of 32 keys from `first` on, what their scores need: [2 of 16 keys][dim / 32] tiles.
inline void pack_keys(const Matrix& k, int64_t first, Bits* to) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t d = 0; d < k.dim; d += 32, to += kTile) {
      __m512i rows[16];
      for (int64_t r = 0; r < 16; ++r) rows[r] = k.part(first + 16 * half + r, d);
      transpose(rows, to);
    }
}

// Of two rows of 32 numbers the pairs of their first and of their last 16, as rows of right tiles.
struct Pairs {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));

  __m512i first(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi16(even, low, odd); }
  __m512i last(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi16(even, high, odd); }
};

// Of 32 keys from `first` on, what is summed of their values: [dim / 16] tiles, `panel` numbers apart.
inline void pack_values(const Matrix& v, int64_t first, Bits* to, int64_t panel) {
  const Pairs pairs;
  for (int64_t d = 0; d < v.dim; d += 32, to += 2 * panel)
    for (int64_t r = 0; r < 16; ++r) {
      const __m512i even = v.part(first + 2 * r, d), odd = v.part(first + 2 * r + 1, d);
      _mm512_store_si512(to + 32 * r, pairs.first(even, odd));
      _mm512_store_si512(to + panel + 32 * r, pairs.last(even, odd));
    }
}

// Rows [first, first + 32) of a matrix, as two rows of left tiles.
inline void pack_rows(const Matrix& m, int64_t first, Bits* to) {
  for (int64_t r = 0; r < kBlock; ++r)
    for (int64_t d = 0; d < m.dim; d += 32)
      _mm512_store_si512(to + r / 16 * 16 * m.dim + d / 32 * kTile + r % 16 * 32, m.part(first + r, d));
}

// 2^x, to 8e-5 of it; bfloat16 rounds to 4e-3.
inline __m512 power_of_two(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780245139f), _mm512_set1_ps(0.226067168f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695833536f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999925219f));
  return _mm512_scalef_ps(p, x);  // by 2^floor(x)
}

}  // namespace qif::amx
