// A check of how CUTLASS's epilogues divide a tile among threads.
#pragma once

namespace qif {

// CUTLASS divides integers to find how often each thread stores, and says nothing where that leaves a rest: some
// elements are then never written, others twice. `Map` is an OutputTileOptimalThreadMap.
template <class Map>
constexpr bool stores_every_element_once() {
  using Shape = typename Map::Shape;
  using Detail = typename Map::Detail;
  const int step = Shape::kColumn * Shape::kRow * Shape::kGroup * Shape::kCluster;
  return Detail::kAccessWidth * Detail::kAccessRows == Map::kWarpSize &&
         Map::kThreads * Map::kElementsPerAccess * Map::Iterations::kCount == step;
}

}  // namespace qif
