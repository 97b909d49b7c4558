// Three adaptors that make the batch index L of CUTLASS's warp-specialised TMA kernels choose among problems of their
// own pointers and numbers of rows:
//   GroupedMainloop   the TMA descriptors of x and W of problem L
//   GroupedEpilogue   those of its output and residual, and the parameters of LinearVisitor
//   GroupedScheduler  the tiles of all problems as one persistent list, in the order of LinearTiles
// The descriptors are kernel parameters: nothing is written to device memory before the launch. With what the roots of
// the epilogue trees have in common (EpilogueRoot), and the launch.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>

#include <cstring>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cutlass_kernels/linear_epilogue.cuh"
#include "kernels/linear_tiles.h"

namespace qif {
namespace gemm {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// ---- tiles of several problems --------------------------------------------------------------------------------------

template <int Groups>
struct GroupedSchedulerTag {};

template <int Groups, class TileShape, class ClusterShape>
class GroupedScheduler : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90 {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  static constexpr uint32_t kClusterM = size<0>(ClusterShape{}), kClusterN = size<1>(ClusterShape{});

 public:
  using WorkTileInfo = typename Base::WorkTileInfo;

  struct Arguments : Base::Arguments {
    LinearTiles clusters = {};
  };

  struct Params : Base::Params {
    LinearTiles clusters = {};
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape, TileShape, ClusterShape, const cutlass::KernelHardwareInfo&,
                                        const Arguments& arguments, void* = nullptr, uint32_t = 1, uint32_t = 1) {
    Params p;
    p.clusters = arguments.clusters;
    return p;
  }

  static bool can_implement(const Arguments&) { return true; }

  template <class ProblemShape>
  static dim3 get_grid_shape(const Params& p, ProblemShape, TileShape, ClusterShape,
                             const cutlass::KernelHardwareInfo& hardware, const Arguments&) {
    const uint64_t resident = hardware.sm_count / (kClusterM * kClusterN), all = p.clusters.count();
    return dim3(kClusterM, kClusterN * static_cast<unsigned>(all < resident ? all : resident), 1);
  }

  CUTLASS_HOST_DEVICE GroupedScheduler() {}
  CUTLASS_DEVICE explicit GroupedScheduler(const Params& p) : params(&p), cluster(blockIdx.y / kClusterN) {}

  template <class Shape>
  CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Shape) {
    return get_current_work();
  }

  CUTLASS_DEVICE WorkTileInfo get_current_work() const {
    const LinearTiles& clusters = params->clusters;
    if (cluster >= clusters.large_tiles + clusters.small_tiles) return WorkTileInfo::invalid_work_tile();
    const LinearTiles::Place place = clusters.find(cluster);
    const dim3 block = cute::block_id_in_cluster();
    return {static_cast<int32_t>(place.row * kClusterM + block.x),
            static_cast<int32_t>(place.column * kClusterN + block.y), static_cast<int32_t>(place.problem), true};
  }

  CUTLASS_DEVICE void advance_to_next_work(uint32_t count = 1) { cluster += uint64_t{gridDim.y / kClusterN} * count; }

  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo) {
    advance_to_next_work();
    return cute::make_tuple(get_current_work(), true);
  }

  template <class Pipeline, class State>
  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo tile, Pipeline&, State) {
    return fetch_next_work(tile);
  }

 private:
  const Params* params = nullptr;  // a kernel parameter, which outlives the scheduler
  uint64_t cluster = 0;
};

// ---- operands -------------------------------------------------------------------------------------------------------

template <class Base, int Groups>
struct GroupedMainloop : Base {
  struct Arguments {
    typename Base::Arguments group[Groups];
    int rows[Groups] = {};
    int count = 0;
  };

  struct Params {
    typename Base::Params group[Groups];
    uint32_t tma_transaction_bytes = Base::TmaTransactionBytes;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape& shape, const Arguments& arguments, void* workspace) {
    Params p;
    for (int g = 0; g < arguments.count; ++g)
      p.group[g] = Base::to_underlying_arguments(make_shape(arguments.rows[g], get<1>(shape), get<2>(shape), 1),
                                                 arguments.group[g], workspace);
    return p;
  }

  template <class ProblemShape>
  static bool can_implement(const ProblemShape& shape, const Arguments& arguments) {
    return Base::can_implement(shape, arguments.group[0]);
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& p) {
    Base::prefetch_tma_descriptors(p.group[0]);  // those of the other problems come with their first tile
  }

  template <class ProblemShape>
  CUTLASS_DEVICE auto load_init(const ProblemShape& shape, const Params& p) const {
    return Base::load_init(shape, p.group[0]);  // coordinates, the same for every problem
  }

  template <class Pipeline, class State, class Inputs, class Coord, class... Rest>
  CUTLASS_DEVICE void load(const Params& p, Pipeline pipeline, State state, const Inputs& inputs, const Coord& coord,
                           Rest&&... rest) {
    Base::load(p.group[get<3>(coord)], pipeline, state, inputs, make_coord(get<0>(coord), get<1>(coord), _, 0),
               static_cast<Rest&&>(rest)...);
  }

  template <class Pipeline, class State, class Accumulators, class Tensors>
  CUTLASS_DEVICE void mma(Pipeline pipeline, State state, Accumulators& accumulators, int k_tiles, int thread,
                          Tensors& tensors, const Params& p) {
    Base::mma(pipeline, state, accumulators, k_tiles, thread, tensors, p.group[0]);
  }
};

// ---- outputs --------------------------------------------------------------------------------------------------------

template <class Base, int Groups>
class GroupedEpilogue : public Base {
 public:
  struct Arguments {
    typename Base::Arguments group[Groups];
    int rows[Groups] = {};
    int count = 0;
  };

  struct Params {
    typename Base::Params group[Groups];
    int rows[Groups] = {};
    uint32_t tma_transaction_bytes = Base::TmaTransactionBytes;
  };

  template <class ProblemShape>
  static auto shape_of(const ProblemShape& shape, int rows) {
    return make_shape(rows, get<1>(shape), get<2>(shape), 1);
  }

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape& shape, const Arguments& arguments, void* workspace) {
    Params p;
    for (int g = 0; g < arguments.count; ++g) {
      p.rows[g] = arguments.rows[g];
      p.group[g] = Base::to_underlying_arguments(shape_of(shape, arguments.rows[g]), arguments.group[g], workspace);
    }
    return p;
  }

  template <class ProblemShape>
  static bool can_implement(const ProblemShape& shape, const Arguments& arguments) {
    return Base::can_implement(shape, arguments.group[0]);
  }

  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }

  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& p) { Base::prefetch_tma_descriptors(p.group[0]); }

  CUTLASS_DEVICE GroupedEpilogue(const Params& p, typename Base::TensorStorage& t)
      : Base(p.group[0], t), params(p), tensors(t) {}

  template <class Pipeline, class State, class Shape, class Tile, class Coord, class... Rest>
  CUTLASS_DEVICE auto load(Pipeline pipeline, State state, const Shape& shape, Tile tile, const Coord& coord,
                           Rest&&... rest) {
    const int g = get<3>(coord);
    return Base(params.group[g], tensors)
        .load(pipeline, state, problem(shape, g), tile, make_coord(get<0>(coord), get<1>(coord), _, 0),
              static_cast<Rest&&>(rest)...);
  }

  template <class Load, class LoadState, class Store, class StoreState, class Shape, class Tile, class Coord,
            class... Rest>
  CUTLASS_DEVICE auto store(Load load, LoadState load_state, Store store, StoreState store_state, const Shape& shape,
                            Tile tile, const Coord& coord, Rest&&... rest) {
    const int g = get<3>(coord);
    return Base(params.group[g], tensors)
        .store(load, load_state, store, store_state, problem(shape, g), tile,
               make_coord(get<0>(coord), get<1>(coord), _, 0), static_cast<Rest&&>(rest)...);
  }

 private:
  const Params& params;
  typename Base::TensorStorage& tensors;

  template <class Shape>
  CUTLASS_DEVICE auto problem(const Shape& shape, int g) const {
    return make_shape(params.rows[g], get<1>(shape), get<2>(shape), 1);
  }
};

// CUTLASS lets a store take the shared memory of the residual and counts the stores in the epilogue object to know when
// to give it back. GroupedEpilogue has an object for each tile, so the two get memory of their own: for two parts of
// the residual, which come while one is worked on, so that the products have four stages as without a residual.
template <class Epilogue>
struct WithoutReuse;

template <int StagesC, int StagesD, int Fragment, bool Reuse, bool Delay, class... Rest>
struct WithoutReuse<cutlass::epilogue::collective::CollectiveEpilogue<
    cutlass::epilogue::Sm90TmaWarpSpecialized<StagesC, StagesD, Fragment, Reuse, Delay>, Rest...>> {
  static constexpr int kStages = StagesC < 2 ? StagesC : 2;
  using type = cutlass::epilogue::collective::CollectiveEpilogue<
      cutlass::epilogue::Sm90TmaWarpSpecialized<kStages, StagesD, Fragment, false, Delay>, Rest...>;
};

// The root of an epilogue tree, which keeps its parameters P and needs neither memory nor loads of its own.
template <class P>
struct EpilogueRoot {
  struct SharedStorage {};
  using Arguments = P;
  using Params = P;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE EpilogueRoot() {}
  CUTLASS_HOST_DEVICE EpilogueRoot(const Params& p, const SharedStorage&) : params(&p) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... A>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::detail::ProducerLoadArgs<A...>&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  const Params* params = nullptr;
};

// ---- tiles and the launch -------------------------------------------------------------------------------------------

struct LargeTile {  // two warp groups share a tile; two tiles of one column share its weights
  static constexpr int kRows = 128, kColumns = 256;
  using Cluster = Shape<_2, _1, _1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

struct SmallTile {  // two warp groups take turns with a tile each; two tiles of one row share its inputs
  static constexpr int kRows = 128, kColumns = 128;
  using Cluster = Shape<_1, _2, _1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// A tile with 128 bytes of the depth at a time, the widest swizzle of shared memory.
template <class Tiling, class T>
using TileOf = Shape<Int<Tiling::kRows>, Int<Tiling::kColumns>, Int<128 / sizeof(T)>>;

template <class Tiling>
LinearTiles clusters_of(const LinearGroup& group) {
  return linear_tiles(group, Tiling::kRows * size<0>(typename Tiling::Cluster{}),
                      Tiling::kColumns * size<1>(typename Tiling::Cluster{}));
}

// Where the driver refuses a descriptor, CUTLASS says so on the terminal, leaves zeros and goes on.
template <class Copy>
bool is_made(const Copy& copy) {
  static constexpr TmaDescriptor kNone = {};
  return std::memcmp(copy.get_tma_descriptor(), &kNone, sizeof(kNone)) != 0;
}

// What CUTLASS's adapter does, which would take the runtime's error and say only that there was one. `Operator` is the
// kernel's class.
template <class Operator, class Cluster>
int launch_sm90(typename Operator::Arguments& arguments, int count, cudaStream_t stream) {
  static_assert(Operator::SharedStorageSize <= 227 * 1024);
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kBatched;
  arguments.hw_info.device_id = device;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&arguments.hw_info.sm_count, cudaDevAttrMultiProcessorCount, device))
    return error;
  typename Operator::Params params = Operator::to_underlying_arguments(arguments, nullptr);
  for (int i = 0; i < count; ++i) {
    const auto& mainloop = params.mainloop.group[i];
    const auto& epilogue = params.epilogue.group[i];
    bool made = is_made(mainloop.tma_load_a) && is_made(mainloop.tma_load_b) && is_made(epilogue.tma_store_d);
    if constexpr (Operator::kResidual) made = made && is_made(epilogue.tma_load_c);
    if (!made) return cudaErrorInvalidValue;
  }
  const void* kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Operator>);
  constexpr int shared = Operator::SharedStorageSize;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {size<0>(Cluster{}), size<1>(Cluster{}), 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Operator::get_grid_shape(params);
  config.blockDim = Operator::get_block_shape();
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* addresses[] = {&params};
  return cudaLaunchKernelExC(&config, kernel, addresses);
}

}  // namespace gemm
}  // namespace qif

namespace cutlass::gemm::kernel::detail {

template <int Groups, class TileShape, class ClusterShape, uint32_t Stages>
struct TileSchedulerSelector<qif::gemm::GroupedSchedulerTag<Groups>, cutlass::arch::Sm90, TileShape, ClusterShape,
                             Stages> {
  using Scheduler = qif::gemm::GroupedScheduler<Groups, TileShape, ClusterShape>;
};

}  // namespace cutlass::gemm::kernel::detail
