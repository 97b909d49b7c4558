// Rows grouped into segments that share one modulation vector: samples of a packed batch, or target and reference
// tokens.
#pragma once
#include <cstdint>

#if !defined(QIF_DEVICE)
#define QIF_DEVICE
#endif
// What rows are divided in. Fewer bits on a GPU, which has no instruction to divide 64.
#if !defined(QIF_ROW_INDEX)
#define QIF_ROW_INDEX int64_t
#endif

namespace qif {
namespace QIF_ISA {

struct Segments {
  const int32_t* offsets;  // [count + 1] first row of each segment; null: `count` segments of equal length
  int64_t rows, count;

  QIF_DEVICE static int64_t divide(int64_t a, int64_t b) {
    return static_cast<QIF_ROW_INDEX>(a) / static_cast<QIF_ROW_INDEX>(b);
  }

  QIF_DEVICE int64_t begin(int64_t s) const { return offsets ? offsets[s] : s * divide(rows, count); }
  QIF_DEVICE int64_t end(int64_t s) const { return begin(s + 1); }

  // The segment that holds `row`; empty segments hold none.
  QIF_DEVICE int64_t find(int64_t row) const {
    if (!offsets) return divide(row, divide(rows, count));
    int64_t lo = 0, hi = count - 1;
    while (lo < hi) {
      int64_t mid = (lo + hi) / 2;
      if (offsets[mid + 1] > row)
        hi = mid;
      else
        lo = mid + 1;
    }
    return lo;
  }
};

}  // namespace QIF_ISA
}  // namespace qif
