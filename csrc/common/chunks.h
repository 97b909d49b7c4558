// Deterministic two-stage sums over the rows of each segment: fixed chunks first, then the chunks in order.
#pragma once
#include <vector>

#include "common/parallel.h"
#include "common/segments.h"
#include "common/vec.h"

namespace qif {
namespace QIF_ISA {

struct Chunk {
  int64_t segment, begin, end;
};

inline std::vector<Chunk> make_chunks(const Segments& segments, int64_t chunk_rows) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < segments.count; ++s)
    for (int64_t b = segments.begin(s); b < segments.end(s); b += chunk_rows) {
      const int64_t e = segments.end(s);
      chunks.push_back({s, b, b + chunk_rows < e ? b + chunk_rows : e});
    }
  return chunks;
}

// out[segment, :] = sum of partials[chunk, :] over the segment's chunks, added in double; zero for an empty segment.
template <class T, class A>
inline void sum_chunks(const std::vector<Chunk>& chunks, const A* partials, int64_t partial_stride, T* out,
                       int64_t segments, int64_t width) {
  int64_t c = 0;
  std::vector<double> sum(width);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t i = 0; i < width; ++i) sum[i] = 0;
    for (; c < static_cast<int64_t>(chunks.size()) && chunks[c].segment == s; ++c)
      for (int64_t i = 0; i < width; ++i) sum[i] += partials[c * partial_stride + i];
    for (int64_t i = 0; i < width; ++i) narrow(out + s * width + i, static_cast<A>(sum[i]));
  }
}

}  // namespace QIF_ISA
}  // namespace qif
