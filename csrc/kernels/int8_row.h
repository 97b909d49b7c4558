// One row of int8_rows, rotated and rounded while it is in the first-level cache: shared by the ops that end in it.
#pragma once
#include "common/vec.h"
#include "kernels/int8_rows.h"

namespace qif {
namespace QIF_ISA {

using F32 = Vec<float>;
constexpr int kFloats = kLanes<float>;
typedef uint8_t U8 __attribute__((vector_size(kFloats)));

// x[i ^ kBits] for every lane i.
template <int kBits>
inline F32 exchange(F32 x) {
  U32 at;
  for (int i = 0; i < kFloats; ++i) at[i] = i ^ kBits;
  return __builtin_shuffle(x, at);
}

// A stage among the lanes of a vector, whose indices differ in the two bits from kStride on.
template <int kStride>
inline F32 stage_in_lanes(F32 x) {
  const F32 pairs = x + exchange<kStride>(x);
  return 0.5f * (pairs + exchange<2 * kStride>(pairs)) - exchange<3 * kStride>(x);
}

// A stage among four vectors or values that lie `stride` apart.
template <class V>
inline void stage_across(V* x, int64_t stride) {
  const V a = x[0], b = x[stride], c = x[2 * stride], d = x[3 * stride];
  const V half = 0.5f * ((a + b) + (c + d));
  x[0] = half - d;
  x[stride] = half - c;
  x[2 * stride] = half - b;
  x[3 * stride] = half - a;
}

// The stages of one group: 4^k values in their order, all of them vectors of its own.
template <int kGroup>
inline void rotate_group(float* values) {
  constexpr int kVectors = kGroup / kFloats;
  F32 x[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    x[i] = load<F32>(values + i * kFloats);
    x[i] = stage_in_lanes<1>(x[i]);
    if constexpr (kFloats == 16) x[i] = stage_in_lanes<4>(x[i]);
  }
  if constexpr (kFloats == 8) {  // of the second stage's two bits, one is a lane's and one a vector's
    for (int i = 0; i < kVectors; i += 2) {
      const F32 a = x[i], b = x[i + 1];
      const F32 half = 0.5f * ((a + exchange<4>(a)) + (b + exchange<4>(b)));
      x[i] = half - exchange<4>(b);
      x[i + 1] = half - exchange<4>(a);
    }
  }
  constexpr int kFirst = kFloats == 4 ? 1 : 16 / kFloats;
  for (int stride = kFirst; stride < kVectors; stride *= 4)
    for (int first = 0; first < kVectors; first += 4 * stride)
      for (int i = first; i < first + stride; ++i) stage_across(x + i, stride);
  for (int i = 0; i < kVectors; ++i) store(values + i * kFloats, x[i]);
}

inline void rotate_values(float* values, int64_t n, int64_t group) {
  for (int64_t stride = 1; stride < group; stride *= 4)
    for (int64_t first = 0; first < n; first += 4 * stride)
      for (int64_t i = first; i < first + stride; ++i) stage_across(values + i, stride);
}

inline void rotate_row(float* values, int64_t n, int64_t group) {
  if (group == 256) {
    for (int64_t i = 0; i < n; i += 256) rotate_group<256>(values + i);
  } else if (group == 64) {
    for (int64_t i = 0; i < n; i += 64) rotate_group<64>(values + i);
  } else {
    rotate_values(values, n, group);
  }
}

// The largest magnitude, as bits: numbers that are not finite are larger than others, NaN than infinity.
inline uint32_t largest_bits(const float* x, int64_t n) {
  U32 most = {};
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    U32 bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t lanes[kFloats], found = 0;
  std::memcpy(lanes, &most, sizeof(most));
  for (; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffffu;
    found = bits > found ? bits : found;
  }
  for (const uint32_t bits : lanes) found = bits > found ? bits : found;
  return found;
}

// Rounds `row`, which it rotates first, into the place of row r of the tiles; returns the row's scale.
inline float int8_row(float* row, int64_t n, int64_t group, uint8_t* values, int64_t r) {
  rotate_row(row, n, group);
  const uint32_t bits = largest_bits(row, n);
  float largest;
  std::memcpy(&largest, &bits, sizeof(bits));
  const bool zero = largest < 1e-30f;
  const float inverse = zero ? 0.0f : 127.0f / largest;
  const int64_t steps = (n + kInt8Depth - 1) / kInt8Depth;
  uint8_t* out = values + (r / kInt8Rows * steps * kInt8Rows + r % kInt8Rows) * kInt8Depth;
  for (int64_t k = 0; k < n; k += kInt8Depth, out += kInt8Rows * kInt8Depth) {
    const int64_t count = n - k < kInt8Depth ? n - k : kInt8Depth;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats) {
      const F32 shifted = load<F32>(row + k + i) * inverse + 12582912.0f;
      U32 word;
      std::memcpy(&word, &shifted, sizeof(word));
      const U8 byte = __builtin_convertvector(word + 128u, U8);
      std::memcpy(out + i, &byte, sizeof(byte));
    }
    for (; i < count; ++i) {
      const float shifted = row[k + i] * inverse + 12582912.0f;
      uint32_t word;
      std::memcpy(&word, &shifted, sizeof(word));
      out[i] = static_cast<uint8_t>(word + 128u);
    }
  }
  return zero ? 0.0f : largest / 127.0f;
}

}  // namespace QIF_ISA
}  // namespace qif
