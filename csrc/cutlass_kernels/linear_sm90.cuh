// A group of products on Hopper: CUTLASS's warp-specialised TMA kernels as they are, with the adaptors of
// grouped_sm90.cuh, and bias, GELU, gate and residual on their accumulators.
#pragma once
#include "cutlass_kernels/grouped_sm90.cuh"

namespace qif {
namespace gemm {

// ---- bias, GELU, gate and residual ----------------------------------------------------------------------------------

// The root of an epilogue tree; its child gives the residual, or the accumulators where there is none. A thread holds
// pairs of neighbouring columns of a few rows.
template <LinearEpilogue E, class T>
struct LinearVisitor : EpilogueRoot<EpilogueParams<T>> {
  using Base = EpilogueRoot<EpilogueParams<T>>;
  using Params = typename Base::Params;
  using Base::Base, Base::params;

  template <class Coords>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    static constexpr int kValues = size(take<0, 3>(typename Coords::layout_type{}));

    const Params* params;
    Coords coords;  // of this thread's values, relative to its first: (values, subtile m, subtile n)
    int row, column, columns;
    int first_segment, last_segment;  // of the rows of the tile
    float bias[kValues], gate[kValues];

    CUTLASS_DEVICE Callbacks(const Params* p, const Coords& c, int row, int column, int columns, int first, int last)
        : params(p), coords(c), row(row), column(column), columns(columns), first_segment(first), last_segment(last) {}

    // Vectors are read before the residual is waited for.
    CUTLASS_DEVICE void begin_loop(int epi_m, int epi_n) {
      Tensor at = coords(_, _, _, epi_m, epi_n);
      int segment[kValues];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kValues; i += 2) {
        const int r = get<0>(at(i)), c = get<1>(at(i));
        // Values come as two columns of two rows, eight rows apart; known when this is compiled.
        const bool same_columns = i % 4 == 2 && get<1>(at(i & ~2)) == c;
        const bool same_row = i >= 4 && get<0>(at(i < 4 ? 0 : i - 4)) == r;
        if (same_columns) {
          bias[i] = bias[i & ~2];
          bias[i + 1] = bias[(i & ~2) + 1];
        } else {
          read_pair(params->bias, column + c, bias[i], bias[i + 1]);
        }
        if constexpr (E == LinearEpilogue::kGateResidual) {
          if (first_segment == last_segment)
            segment[i] = first_segment;
          else if (same_row)
            segment[i] = segment[i < 4 ? 0 : i - 4];
          else
            segment[i] = params->segment(row + r < params->rows ? row + r : params->rows - 1);
          if (same_columns && segment[i & ~2] == segment[i]) {
            gate[i] = gate[i & ~2];
            gate[i + 1] = gate[(i & ~2) + 1];
          } else {
            read_pair(params->gate + segment[i] * params->gate_stride, column + c, gate[i], gate[i + 1]);
          }
        } else {
          gate[i] = gate[i + 1] = 0.0f;
        }
      }
    }

    // Two columns from `c`, which is even, as is the number of columns.
    CUTLASS_DEVICE void read_pair(const T* vector, int c, float& first, float& second) const {
      first = second = 0.0f;
      if (c < columns) {
        const auto pair = *reinterpret_cast<const cutlass::Array<T, 2>*>(vector + c);
        first = static_cast<float>(pair[0]);
        second = static_cast<float>(pair[1]);
      }
    }

    template <class A, class C, int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(const cutlass::Array<A, N>& accumulators, int v, int, int,
                                                  const cutlass::Array<C, N>& child) {
      cutlass::Array<float, N> out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i)
        out[i] = finish<E, T>(accumulators[i], bias[v * N + i], gate[v * N + i], static_cast<float>(child[i]));
      return out;
    }
  };

  template <bool ReferenceSrc, class... A>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<A...>& args) {
    const int rows = get<0>(args.problem_shape_mnkl), columns = get<1>(args.problem_shape_mnkl);
    int first = 0, last = 0;
    if constexpr (E == LinearEpilogue::kGateResidual) {
      const int begin = get<0>(args.tile_coord_mnkl) * size<0>(args.tile_shape_mnk);
      const int end = begin + size<0>(args.tile_shape_mnk);
      if (begin < rows) {  // a tile beyond the rows exists where a cluster is not full, and stores nothing
        first = params->segment(begin);
        last = params->segment((end < rows ? end : rows) - 1);
      }
    }
    return Callbacks<decltype(args.tCcD)>(params, args.tCcD, rows - get<0>(args.residue_tCcD),
                                          columns - get<1>(args.residue_tCcD), columns, first, last);
  }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <LinearEpilogue E, class T, int Groups, class Tiling>
struct LinearTypes {
  static constexpr bool kResidual = E == LinearEpilogue::kGateResidual;
  using Tile = TileOf<Tiling, T>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Child = std::conditional_t<kResidual, fusion::Sm90SrcFetch<T>, fusion::Sm90AccFetch>;
  using Tree = fusion::Sm90EVT<LinearVisitor<E, T>, Child>;
  using BuiltEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, typename Tiling::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, std::conditional_t<kResidual, T, void>, Row, 8, T,
      Row, 8, typename Tiling::Epilogue, Tree>::CollectiveOp;
  using Epilogue = typename WithoutReuse<BuiltEpilogue>::type;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, Row, 8, T, Column, 8, float, Tile,
      typename Tiling::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Tiling::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, GroupedMainloop<Mainloop, Groups>,
                                                      GroupedEpilogue<Epilogue, Groups>, GroupedSchedulerTag<Groups>>;
};

// A class of its own, so that the kernel has a readable name.
template <LinearEpilogue E, class T, int Groups, class Tiling>
struct LinearSm90 : LinearTypes<E, T, Groups, Tiling>::Kernel {
  using Kernel = typename LinearTypes<E, T, Groups, Tiling>::Kernel;
  static constexpr bool kResidual = E == LinearEpilogue::kGateResidual;

  static int run(const LinearGroup& group, cudaStream_t stream) {
    typename Kernel::Arguments arguments;
    int order[kMaxLinears], large = 0, most = 0;
    const int count = order_linears(group, order, large);
    if (count == 0) return cudaSuccess;
    for (int i = 0; i < count; ++i) {
      const Linear& l = group.linear[order[i]];
      arguments.mainloop.group[i] = {
          static_cast<const T*>(l.x), {group.depth, _1{}, 0}, static_cast<const T*>(l.weight), {group.depth, _1{}, 0}};
      auto& epilogue = arguments.epilogue.group[i];
      epilogue.thread.op_1 = epilogue_params<T>(l);
      if constexpr (kResidual) epilogue.ptr_C = static_cast<const T*>(l.residual);
      epilogue.dC = epilogue.dD = {group.columns, _1{}, 0};
      epilogue.ptr_D = static_cast<T*>(l.out);
      arguments.mainloop.rows[i] = arguments.epilogue.rows[i] = static_cast<int>(l.rows);
      most = l.rows > most ? static_cast<int>(l.rows) : most;
    }
    arguments.mainloop.count = arguments.epilogue.count = count;
    arguments.scheduler.clusters = clusters_of<Tiling>(group);
    arguments.problem_shape = {most, static_cast<int>(group.columns), static_cast<int>(group.depth), count};
    return launch_sm90<LinearSm90, typename Tiling::Cluster>(arguments, count, stream);
  }
};

// Called from one file for each size of tiles, so that several compilers share the work: two kernels take one most of a
// minute.
template <LinearEpilogue E, int Groups, class Tiling>
int run_sm90(const LinearGroup& group, cudaStream_t stream) {
  return group.dtype == kFloat16 ? LinearSm90<E, cutlass::half_t, Groups, Tiling>::run(group, stream)
                                 : LinearSm90<E, cutlass::bfloat16_t, Groups, Tiling>::run(group, stream);
}

}  // namespace gemm
}  // namespace qif
