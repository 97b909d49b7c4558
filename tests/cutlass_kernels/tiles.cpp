// Prints the order of tiles of linear_tiles.h: tiles <rows of a tile> <columns of a tile> <columns> <rows>...
#include <cstdio>
#include <cstdlib>

#include "kernels/linear_tiles.h"

int main(int argc, char** argv) {
  qif::LinearGroup group = {};
  group.columns = std::atoll(argv[3]);
  for (int i = 4; i < argc; ++i) group.linear[group.count++].rows = std::atoll(argv[i]);
  int order[qif::kMaxLinears], large = 0;
  const int count = qif::order_linears(group, order, large);
  const qif::LinearTiles tiles = qif::linear_tiles(group, std::atoll(argv[1]), std::atoll(argv[2]));
  std::printf("%d\n", count);
  for (uint64_t i = 0; i < tiles.count(); ++i) {
    const auto place = tiles.find(i);
    std::printf("%d %u %u\n", order[place.problem], place.row, place.column);
  }
}
