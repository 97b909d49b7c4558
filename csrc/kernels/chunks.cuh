// Two-stage sums over the rows of each segment, as in common/chunks.h: chunks of a fixed number of rows that start at
// segment starts, each summed by one block into `partials`, then the chunks in a fixed order. No atomics, and the same
// rows give the same bits alone or in a batch.
#pragma once
#include "common/cuda.cuh"

namespace qif {
namespace gpu {

struct ChunkPlace {
  int64_t segment, begin, end;  // segment -1: there is no such chunk
};

// Blocks that surely cover all chunks; the offsets are in device memory, so the exact number is known there only.
inline int64_t most_chunks(int64_t rows, int64_t segments, bool equal, int chunk_rows) {
  return equal ? segments * ceil_div(rows / (segments ? segments : 1), chunk_rows) : rows / chunk_rows + segments;
}

QIF_INLINE int64_t chunks_of(const Segments& s, int64_t segment, int chunk_rows) {
  return Segments::divide(s.end(segment) - s.begin(segment) + chunk_rows - 1, chunk_rows);
}

QIF_INLINE ChunkPlace find_chunk(const Segments& s, int64_t chunk, int chunk_rows) {
  for (int64_t segment = 0; segment < s.count; ++segment) {
    const int64_t n = chunks_of(s, segment, chunk_rows);
    if (chunk < n) {
      const int64_t begin = s.begin(segment) + chunk * chunk_rows, end = begin + chunk_rows;
      return {segment, begin, end < s.end(segment) ? end : s.end(segment)};
    }
    chunk -= n;
  }
  return {-1, 0, 0};
}

// partials[chunk][output][column] -> outputs[output][segment][column]; an output may be null, for not wanted
template <int Outputs>
struct ChunkSums {
  const float* partials;
  void* outputs[Outputs];
  Segments segments;
  int64_t width;
  int chunk_rows;
};

constexpr int kSumColumns = 32, kSumGroups = 8;

// A block sums 32 columns of one segment: group g takes the chunks g, g + 8, ..., then the groups are added in order.
template <class T, int Outputs>
__global__ void __launch_bounds__(kSumColumns* kSumGroups) sum_chunks(ChunkSums<Outputs> p) {
  QIF_SHARED(double, sums, kSumColumns* kSumGroups);
  const int column_in_block = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns;
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + column_in_block, segment = blockIdx.y;
  const int output = blockIdx.z;
  int64_t first = 0;
  for (int64_t s = 0; s < segment; ++s) first += chunks_of(p.segments, s, p.chunk_rows);
  const int64_t count = chunks_of(p.segments, segment, p.chunk_rows);
  double sum = 0;
  if (column < p.width)
    for (int64_t c = group; c < count; c += kSumGroups)
      sum += load_global(p.partials + ((first + c) * Outputs + output) * p.width + column);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0 && column < p.width) {
    sum = 0;
    for (int g = 0; g < kSumGroups; ++g) sum += sums[g * kSumColumns + column_in_block];
    const float v[1] = {static_cast<float>(sum)};
#pragma unroll
    for (int o = 0; o < Outputs; ++o)  // an index known at compile time: the parameters stay out of local memory
      if (o == output && p.outputs[o]) store(static_cast<T*>(p.outputs[o]) + segment * p.width + column, v);
  }
}

template <class T, int Outputs>
int launch_sum_chunks(const ChunkSums<Outputs>& p, void* stream) {
  if (!p.segments.count || !p.width) return kSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.width, kSumColumns)), static_cast<unsigned>(p.segments.count),
                  Outputs);
  return launch(sum_chunks<T, Outputs>, grid, dim3(kSumColumns * kSumGroups), 0, stream, p);
}

}  // namespace gpu
}  // namespace qif
