#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "kernels/linear_int8.h"

namespace qif {
namespace QIF_ISA {

// Large pages for memory that has not been touched yet: products read it all over.
static void want_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void int8_pack(const Int8Pack& p) {
  const int64_t steps = (p.depth + kInt8Depth - 1) / kInt8Depth, panel = steps * kInt8Depth * kInt8Columns;
  const int64_t panels = (p.columns + kInt8Columns - 1) / kInt8Columns;
  want_large_pages(p.packed, panels * panel);
  parallel_ranges(panels, p.columns * p.depth, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int8_t* out = p.packed + n * panel;
      const int64_t columns = std::min(kInt8Columns, p.columns - n * kInt8Columns), whole = p.depth / 4;
      if (columns < kInt8Columns || p.depth % kInt8Depth) std::memset(out, 0, panel);
      for (int64_t c = 0; c < columns; ++c) {
        const int8_t* row = p.weight + (n * kInt8Columns + c) * p.depth;
        int32_t sum = 0;
        for (int64_t d = 0; d < p.depth; ++d) sum += row[d];
        p.sums[n * kInt8Columns + c] = sum;
        for (int64_t q = 0; q < whole; ++q) std::memcpy(out + (q * kInt8Columns + c) * 4, row + 4 * q, 4);
        if (p.depth % 4) std::memcpy(out + (whole * kInt8Columns + c) * 4, row + 4 * whole, p.depth % 4);
      }
    }
  });
}

}  // namespace QIF_ISA
}  // namespace qif
