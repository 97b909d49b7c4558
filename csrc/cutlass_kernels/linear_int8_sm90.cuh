// linear_int8 on Hopper: a group of products of 8-bit rows with 8-bit weights by wgmma, with CUTLASS's warp-specialised
// TMA kernels and the adaptors of grouped_sm90.cuh. The sums are those of linear_int8_cuda.cu, exact, and what follows
// them is done by the same operations in the same order: the same bits.
#pragma once
#include "cutlass_kernels/grouped_sm90.cuh"
#include "kernels/linear_int8.h"

namespace qif {
namespace gemm {

// ---- scales, bias, gate and residual --------------------------------------------------------------------------------

template <class T>
struct Int8Params {
  const float *scales = nullptr, *weight_scales = nullptr;
  const int32_t* sums = nullptr;
  EpilogueParams<T> rest;  // whose bias may be null
};

// The root of an epilogue tree; its child gives the residual, or the accumulators where there is none. A thread holds
// pairs of neighbouring columns of a few rows.
template <bool Gated, class T>
struct Int8Visitor : EpilogueRoot<Int8Params<T>> {
  using Base = EpilogueRoot<Int8Params<T>>;
  using Params = typename Base::Params;
  using Base::Base, Base::params;

  template <class Coords>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    static constexpr int kValues = size(take<0, 3>(typename Coords::layout_type{}));

    const Params* params;
    Coords coords;  // of this thread's values, relative to its first: (values, subtile m, subtile n)
    int row, column, columns;
    float scale[kValues], of_row[kValues], bias[kValues], gate[kValues];
    int32_t offset[kValues];

    CUTLASS_DEVICE Callbacks(const Params* p, const Coords& c, int row, int column, int columns)
        : params(p), coords(c), row(row), column(column), columns(columns) {}

    // Vectors are read before the residual is waited for.
    CUTLASS_DEVICE void begin_loop(int epi_m, int epi_n) {
      Tensor at = coords(_, _, _, epi_m, epi_n);
      const EpilogueParams<T>& rest = params->rest;
      int segment[kValues];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kValues; i += 2) {
        const int r = get<0>(at(i)), c = get<1>(at(i));
        // Values come as two columns of two rows, eight rows apart; known when this is compiled.
        const bool same_columns = i % 4 == 2 && get<1>(at(i & ~2)) == c;
        const bool same_row = i >= 4 && get<0>(at(i < 4 ? 0 : i - 4)) == r;
        if (same_row) {
          of_row[i] = of_row[i < 4 ? 0 : i - 4];
          segment[i] = segment[i < 4 ? 0 : i - 4];
        } else {
          const int there = row + r < rest.rows ? row + r : rest.rows - 1;
          of_row[i] = params->scales[there];
          if constexpr (Gated) segment[i] = rest.segment(there);
        }
        of_row[i + 1] = of_row[i];
        CUTLASS_PRAGMA_UNROLL
        for (int j = i; j < i + 2; ++j) {
          scale[j] = same_columns ? scale[j & ~2] : 0.0f;
          offset[j] = same_columns ? offset[j & ~2] : 0;
          bias[j] = same_columns ? bias[j & ~2] : 0.0f;
          gate[j] = 0.0f;
        }
        if (column + c >= columns) continue;  // as many columns as a multiple of 8
        if (!same_columns) {
          read_pair(params->weight_scales + column + c, scale[i], scale[i + 1]);
          read_pair(params->sums + column + c, offset[i], offset[i + 1]);
          if (rest.bias) read_pair(rest.bias + column + c, bias[i], bias[i + 1]);
        }
        if constexpr (Gated) {
          if (same_columns && segment[i & ~2] == segment[i]) {
            gate[i] = gate[i & ~2];
            gate[i + 1] = gate[(i & ~2) + 1];
          } else {
            read_pair(rest.gate + segment[i] * rest.gate_stride + column + c, gate[i], gate[i + 1]);
          }
        }
      }
    }

    template <class V, class W>
    CUTLASS_DEVICE static void read_pair(const V* from, W& first, W& second) {
      const auto pair = *reinterpret_cast<const cutlass::AlignedArray<V, 2>*>(from);
      first = static_cast<W>(pair[0]);
      second = static_cast<W>(pair[1]);
    }

    // Of the result's type: CUTLASS would keep what comes of integers in integers.
    template <class C, int N>
    CUTLASS_DEVICE cutlass::Array<T, N> visit(const cutlass::Array<int32_t, N>& sums, int v, int, int,
                                              const cutlass::Array<C, N>& child) {
      cutlass::Array<float, N> out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        const int at = v * N + i;
        // As everywhere (linear_int8_cuda.cu), nothing contracted: the rows' 128 is taken off the integers.
        const float sum = static_cast<float>(sums[i] - offset[at] * 128);
        out[i] = __fadd_rn(__fmul_rn(sum, __fmul_rn(scale[at], of_row[at])), bias[at]);
        if constexpr (Gated) {
          const float before = static_cast<float>(child[i]);
          out[i] = saturate<T>(__fadd_rn(before, __fmul_rn(gate[at], out[i])));
        }
      }
      return cutlass::NumericArrayConverter<T, float, N>{}(out);
    }
  };

  template <bool ReferenceSrc, class... A>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<A...>& args) {
    const int rows = get<0>(args.problem_shape_mnkl), columns = get<1>(args.problem_shape_mnkl);
    return Callbacks<decltype(args.tCcD)>(params, args.tCcD, rows - get<0>(args.residue_tCcD),
                                          columns - get<1>(args.residue_tCcD), columns);
  }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <bool Gated, class T, int Groups, class Tiling>
struct Int8Types {
  using Tile = TileOf<Tiling, int8_t>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Child = std::conditional_t<Gated, fusion::Sm90SrcFetch<T>, fusion::Sm90AccFetch>;
  using Tree = fusion::Sm90EVT<Int8Visitor<Gated, T>, Child>;
  using BuiltEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, typename Tiling::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, std::conditional_t<Gated, T, void>, Row, 8, T,
      Row, 8, typename Tiling::Epilogue, Tree>::CollectiveOp;
  using Epilogue = typename WithoutReuse<BuiltEpilogue>::type;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, uint8_t, Row, 16, int8_t, Column, 16, int32_t, Tile,
      typename Tiling::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Tiling::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, GroupedMainloop<Mainloop, Groups>,
                                                      GroupedEpilogue<Epilogue, Groups>, GroupedSchedulerTag<Groups>>;
};

// A class of its own, so that the kernel has a readable name.
template <bool Gated, class T, int Groups, class Tiling>
struct LinearInt8Sm90 : Int8Types<Gated, T, Groups, Tiling>::Kernel {
  using Kernel = typename Int8Types<Gated, T, Groups, Tiling>::Kernel;
  static constexpr bool kResidual = Gated;

  // Up to Groups products of one depth and number of columns.
  static int run(const Int8Product* const* products, int given, cudaStream_t stream) {
    typename Kernel::Arguments arguments;
    LinearGroup group = {};  // what the order of tiles is made of
    group.count = given;
    group.columns = products[0]->columns;
    group.depth = products[0]->depth;
    for (int i = 0; i < given; ++i) group.linear[i].rows = products[i]->rows;
    int order[kMaxLinears], large = 0, most = 0;
    const int count = order_linears(group, order, large);
    if (count == 0 || group.columns == 0) return cudaSuccess;
    for (int i = 0; i < count; ++i) {
      const Int8Product& p = *products[order[i]];
      arguments.mainloop.group[i] = {p.values, {p.depth, _1{}, 0}, p.weight, {p.depth, _1{}, 0}};
      auto& epilogue = arguments.epilogue.group[i];
      epilogue.thread.op_1 = {p.scales,
                              p.weight_scales,
                              p.sums,
                              {static_cast<const T*>(p.bias), static_cast<const T*>(p.gate), p.gate_stride, p.offsets,
                               static_cast<int>(p.rows), static_cast<int>(p.segments)}};
      if constexpr (Gated) epilogue.ptr_C = static_cast<const T*>(p.residual);
      epilogue.dC = epilogue.dD = {p.columns, _1{}, 0};
      epilogue.ptr_D = static_cast<T*>(p.out);
      arguments.mainloop.rows[i] = arguments.epilogue.rows[i] = static_cast<int>(p.rows);
      most = p.rows > most ? static_cast<int>(p.rows) : most;
    }
    arguments.mainloop.count = arguments.epilogue.count = count;
    arguments.scheduler.clusters = clusters_of<Tiling>(group);
    arguments.problem_shape = {most, static_cast<int>(group.columns), static_cast<int>(group.depth), count};
    return launch_sm90<LinearInt8Sm90, typename Tiling::Cluster>(arguments, count, stream);
  }
};

// All products with a residual, or without, in as few launches as there may be.
template <bool Gated, class T, int Groups, class Tiling>
int run_int8_sm90(const std::vector<Int8Product>& products, cudaStream_t stream) {
  std::vector<const Int8Product*> left;
  for (const Int8Product& p : products)
    if ((p.residual != nullptr) == Gated) left.push_back(&p);
  while (!left.empty()) {
    std::vector<const Int8Product*> now, later;
    for (const Int8Product* p : left) {
      const bool alike = p->columns == left[0]->columns && p->depth == left[0]->depth;
      (alike && now.size() < Groups ? now : later).push_back(p);
    }
    if (const int error =
            LinearInt8Sm90<Gated, T, Groups, Tiling>::run(now.data(), static_cast<int>(now.size()), stream))
      return error;
    left = later;
  }
  return cudaSuccess;
}

}  // namespace gemm
}  // namespace qif
