#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "kernels/int4_quantise.h"
#include "kernels/int4_tile.h"

namespace qif {
namespace QIF_ISA {

// What each of the times makes of the levels.
struct Times {
  float values[kInt4MostTimes + 1][16], borders[kInt4MostTimes + 1][15];
  Times() {
    for (int t = 0; t <= kInt4MostTimes; ++t) {
      for (int k = 0; k < 16; ++k) values[t][k] = static_cast<float>(int4_value(k, t));
      for (int k = 0; k < 15; ++k) borders[t][k] = (values[t][k] + values[t][k + 1]) / 2;
    }
  }
};

// Codes of 16 numbers with one choice of times; returns the squared error.
static float encode(const float* x, const float* values, const float* borders, int32_t* codes) {
  for (int i = 0; i < 16; ++i) codes[i] = 0;
  for (int k = 0; k < 15; ++k)
    for (int i = 0; i < 16; ++i) codes[i] += x[i] > borders[k];
  float squares[16], error = 0.0f;
  for (int i = 0; i < 16; ++i) {
    const float off = x[i] - values[codes[i]];
    squares[i] = off * off;
  }
  for (int i = 0; i < 16; ++i) error += squares[i];
  return error;
}

void int4_quantise(const Int4Quantise& p) {
  static const Times all;
  const int64_t tiles = (p.depth + 63) / 64, panels = (p.columns + 15) / 16;
  constexpr float kMost = 127.0f * kInt4MostTimes / 128;
  parallel_ranges(panels, p.columns * p.depth * 16, [&](int64_t begin, int64_t end) {
    std::vector<float> top(tiles * 4);
    for (int64_t n = begin; n < end; ++n) {
      uint8_t* panel = p.packed + n * tiles * kInt4Tile;
      std::memset(panel, 0, tiles * kInt4Tile);  // times 0: zeros
      for (int64_t c = n * 16; c < std::min(n * 16 + 16, p.columns); ++c) {
        const float* row = p.weight + c * p.depth;
        const int64_t groups = p.depth / kInt4Group, at = c % 16;
        float most = 0.0f, zero = 0.0f;  // what is not finite makes the scale so
        for (int64_t g = 0; g < groups; ++g) {
          float largest = 0.0f;
          for (int i = 0; i < kInt4Group; ++i) {
            largest = std::max(largest, std::fabs(row[g * kInt4Group + i]));
            zero += row[g * kInt4Group + i] * 0.0f;
          }
          top[g] = largest;
          most = std::max(most, largest);
        }
        const float scale = most / kMost + zero, inverse = most > 0.0f ? kMost / most : 0.0f;
        p.scales[c] = scale;
        int64_t sum = 0;
        for (int64_t g = 0; g < groups; ++g) {
          float x[16], least = INFINITY;
          for (int i = 0; i < 16; ++i) x[i] = row[g * kInt4Group + i] * inverse;
          int32_t codes[16], chosen[16] = {};
          int times = 0;
          const auto attempt = [&](int t) {
            if (t < kInt4LeastTimes || t > kInt4MostTimes || t == 64) return;
            const float error = encode(x, all.values[t], all.borders[t], codes);
            if (error < least) {
              least = error, times = t;
              std::memcpy(chosen, codes, sizeof(codes));
            }
          };
          // Where the largest level is not far from the group's largest number, in steps of an eighth; then between.
          const float ideal = std::max(top[g] * inverse * 128.0f / 127.0f, static_cast<float>(kInt4LeastTimes));
          const int step = std::max(1, static_cast<int>(ideal / 12));
          for (int t = static_cast<int>(0.55f * ideal); t <= static_cast<int>(1.15f * ideal) + 1; t += step) attempt(t);
          if (times == 0) attempt(kInt4LeastTimes);
          for (int by = (step + 1) / 2; by > 0; by /= 2)
            for (const int t : {times - by, times + by}) attempt(t);
          uint8_t* tile = panel + g / 4 * kInt4Tile;
          tile[kInt4Codes + g % 4 * 16 + at] = static_cast<uint8_t>(times);
          for (int i = 0; i < 16; ++i) {
            const int64_t q = g % 4 * 4 + i / 4, place = at * 4 + i % 4;
            tile[32 * q + place % 32] |= static_cast<uint8_t>(chosen[i] << (place / 32 * 4));
            sum += int4_value(chosen[i], times);
          }
        }
        p.sums[c] = static_cast<int32_t>(sum);
      }
    }
  });
}

void int4_unpack_all(const Int4Unpack& p) {
  parallel_ranges(p.tiles, p.tiles * 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) int4_unpack(p.packed + i * kInt4Tile, p.out + i * 1024);
  });
}

}  // namespace QIF_ISA
}  // namespace qif
