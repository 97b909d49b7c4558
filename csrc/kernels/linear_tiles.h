// The order in which a launch of linear_group.h walks the tiles of its problems.
//
// Problems with few rows are spread evenly among those with many: a tile of few rows reads as many weights as one of
// 128 rows, and one after another such tiles would be bound by memory while the tensor cores wait. Within a problem,
// bands of eight rows of tiles are walked column by column, so that neighbours in time share inputs and weights in L2.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "kernels/linear_group.h"

#if defined(__CUDACC__)
#define QIF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QIF_HOST_DEVICE inline
#endif

namespace qif {

struct LinearTiles {
  static constexpr uint32_t kBand = 8;

  uint32_t rows[kMaxLinears];  // of tiles, per problem; the problems with many rows first
  uint32_t columns, large;     // columns of tiles; how many problems have many rows
  uint64_t large_tiles, small_tiles;
  uint64_t inverse;  // of their sum: a division by it, which takes a hundred instructions, is a product; 0: it is none

  struct Place {
    uint32_t problem, row, column;
  };

  QIF_HOST_DEVICE uint64_t count() const { return large_tiles + small_tiles; }

  // n / count() for n up to count() * small_tiles.
  QIF_HOST_DEVICE uint64_t of_all(uint64_t n) const {
    if (!inverse) return n / count();
#ifdef __CUDA_ARCH__
    return __umul64hi(n, inverse);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(n) * inverse >> 64);
#endif
  }

  QIF_HOST_DEVICE Place find(uint64_t tile) const {
    // Of all tiles `small_tiles` are small, evenly spread: this is one where their count steps up.
    const uint64_t before = of_all(tile * small_tiles), after = of_all((tile + 1) * small_tiles);
    uint32_t problem = after > before ? large : 0;
    uint64_t rest = after > before ? before : tile - before;
    while (rest >= uint64_t{rows[problem]} * columns) rest -= uint64_t{rows[problem++]} * columns;
    const uint32_t i = static_cast<uint32_t>(rest), first = i / (kBand * columns) * kBand;
    const uint32_t height = rows[problem] - first < kBand ? rows[problem] - first : kBand;
    const uint32_t in_band = i - first * columns;
    return {problem, first + in_band % height, in_band / height};
  }
};

// The problems that have rows, those with the most rows first; returns their number. `order` gets their places in the
// group.
inline int order_linears(const LinearGroup& group, int (&order)[kMaxLinears], int& large) {
  int64_t most = 0;
  for (int i = 0; i < group.count; ++i) most = group.linear[i].rows > most ? group.linear[i].rows : most;
  int count = 0;
  for (const bool many : {true, false}) {
    for (int i = 0; i < group.count; ++i)
      if (group.linear[i].rows != 0 && (group.linear[i].rows == most) == many) order[count++] = i;
    if (many) large = count;
  }
  return count;
}

// Tiles of `tile_rows` x `tile_columns`, or clusters of tiles.
inline LinearTiles linear_tiles(const LinearGroup& group, int64_t tile_rows, int64_t tile_columns) {
  LinearTiles tiles = {};
  int order[kMaxLinears], large = 0;
  const int count = order_linears(group, order, large);
  tiles.large = static_cast<uint32_t>(large);
  tiles.columns = static_cast<uint32_t>((group.columns + tile_columns - 1) / tile_columns);
  for (int i = 0; i < count; ++i) {
    tiles.rows[i] = static_cast<uint32_t>((group.linear[order[i]].rows + tile_rows - 1) / tile_rows);
    (i < large ? tiles.large_tiles : tiles.small_tiles) += uint64_t{tiles.rows[i]} * tiles.columns;
  }
  // The inverse is too large by less than count() / 2^64 of itself: exact for numbers below 2^64 / count().
  const uint64_t all = tiles.count();
  if (all > 1 && all < uint64_t{1} << 21) tiles.inverse = ~uint64_t{0} / all + 1;
  return tiles;
}

}  // namespace qif
