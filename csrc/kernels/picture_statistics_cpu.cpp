#include <vector>

#include "common/vec.h"
#include "kernels/picture_statistics.h"

namespace qif {
namespace QIF_ISA {

namespace {

// Neighbours often have the same value: two tables of counts, so that one increment need not wait for the last.
struct Counts {
  uint32_t of[2][3][256] = {};
  void add(const uint8_t* rgb, int64_t pixels) {
    int64_t x = 0;
    for (; x + 2 <= pixels; x += 2, rgb += 6)
      for (int i = 0; i < 2; ++i)
        for (int c = 0; c < 3; ++c) ++of[i][c][rgb[3 * i + c]];
    if (x < pixels)
      for (int c = 0; c < 3; ++c) ++of[0][c][rgb[c]];
  }
};

// Y and the saturation of a row. Plain loops: the compiler takes the interleaved bytes apart in registers.
void convert(const uint8_t* __restrict rgb, int64_t width, float* __restrict luma, float* __restrict saturation) {
  for (int64_t x = 0; x < width; ++x) {
    const uint8_t r = rgb[3 * x], g = rgb[3 * x + 1], b = rgb[3 * x + 2];
    const uint8_t high = r > g ? (r > b ? r : b) : (g > b ? g : b), low = r < g ? (r < b ? r : b) : (g < b ? g : b);
    luma[x] = 0.299f * r + 0.587f * g + 0.114f * b;
    saturation[x] = static_cast<float>(high - low) / static_cast<float>(high ? high : 1);
  }
}

}  // namespace

void picture_statistics(const PictureStatistics& p) {
  const int64_t w = p.width;
  Counts counts;
  std::vector<float> saturation(w), vertical(w);
  double sums[6] = {};
  for (int64_t y = 0; y < p.height; ++y) {
    const uint8_t* rgb = p.rgb + y * w * 3;
    float* now = p.luma + y * w;
    counts.add(rgb, w);
    convert(rgb, w, now, saturation.data());
    sums[0] += reduce<float>(w, [&](auto lane, int64_t x) { return load<typename decltype(lane)::type>(now + x); });
    sums[1] += reduce<float>(
        w, [&](auto lane, int64_t x) { return load<typename decltype(lane)::type>(saturation.data() + x); });
    sums[3] += reduce<float>(w - 1, [&](auto lane, int64_t x) {
      using V = typename decltype(lane)::type;
      const V d = load<V>(now + x + 1) - load<V>(now + x);
      return V(d * d);
    });
    if (y < 1) continue;
    const float* middle = now - w;
    sums[2] += reduce<float>(w, [&](auto lane, int64_t x) {
      using V = typename decltype(lane)::type;
      const V d = load<V>(now + x) - load<V>(middle + x);
      return V(d * d);
    });
    if (y < 2 || w < 3) continue;
    const float* up = middle - w;
    float* v = vertical.data();
    each<float>(w, [&](auto lane, int64_t x) {
      using V = typename decltype(lane)::type;
      const V m = load<V>(middle + x);
      store(v + x, V((load<V>(up + x) - m) + (load<V>(now + x) - m)));
    });
    sums[4] += reduce<float>(w - 2, [&](auto lane, int64_t x) {
      using V = typename decltype(lane)::type;
      const V m = load<V>(middle + x + 1);
      const V l = load<V>(v + x + 1) + ((load<V>(middle + x) - m) + (load<V>(middle + x + 2) - m));
      return V(l * l);
    });
    sums[5] += reduce<float>(w - 2, [&](auto lane, int64_t x) {
      using V = typename decltype(lane)::type;
      const V m = load<V>(v + x + 1);
      const V n = (load<V>(v + x) - m) + (load<V>(v + x + 2) - m);
      return V(n < V{} ? V(-n) : n);
    });
  }
  for (int i = 0; i < 6; ++i) p.sums[i] = sums[i];
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < 256; ++i) p.histogram[256 * c + i] = int64_t(counts.of[0][c][i]) + counts.of[1][c][i];
}

}  // namespace QIF_ISA
}  // namespace qif
