// A group of products with mma.sync and cp.async: CUTLASS's multistage product of a tile, and an epilogue of ours that
// its EpilogueWithVisitorCallbacks drives. One block per tile, in the order of LinearTiles. For Ampere, and for GPUs
// that have no kernels of their own here.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/threadblock/epilogue_base_streamk.h>
#include <cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cutlass_kernels/linear_epilogue.cuh"
#include "cutlass_kernels/thread_map.cuh"
#include "kernels/linear_tiles.h"

namespace qif {
namespace gemm {

// Each thread holds eight neighbouring columns of a row at a time.
template <LinearEpilogue E, class T, class ThreadMap>
struct RowVisitor {
  static constexpr int kColumns = 8;
  using Vector = cutlass::AlignedArray<T, kColumns>;

  struct Arguments : EpilogueParams<T> {
    const T* residual = nullptr;
    T* out = nullptr;
  };
  using Params = Arguments;
  struct SharedStorage {};

  const Params* params = nullptr;

  CUTLASS_DEVICE RowVisitor(const Params& p, const SharedStorage&) : params(&p) {}

  template <class Coords>
  struct Callbacks : cutlass::epilogue::threadblock::EmptyCallbacks {
    const Params* params;
    Coords coords;  // (value, column access, row access, step)
    int rows, columns, first_segment, last_segment;

    CUTLASS_DEVICE Callbacks(const Params* p, const Coords& c, int rows, int columns, int first, int last)
        : params(p), coords(c), rows(rows), columns(columns), first_segment(first), last_segment(last) {}

    template <class A, int N>
    CUTLASS_DEVICE void visit(int step, int row_access, int column_access, int, const cutlass::Array<A, N>& values) {
      static_assert(N == kColumns);
      const auto at = coords(cute::_0{}, column_access, row_access, step);
      const int row = cute::get<0>(at), column = cute::get<1>(at);
      if (row >= rows || column >= columns) return;
      const int64_t index = int64_t{row} * columns + column;
      const Vector bias = *reinterpret_cast<const Vector*>(params->bias + column);
      Vector gate, residual, out;
      gate.clear();
      residual.clear();
      if constexpr (E == LinearEpilogue::kGateResidual) {
        const int segment = first_segment == last_segment ? first_segment : params->segment(row);
        gate = *reinterpret_cast<const Vector*>(params->gate + segment * params->gate_stride + column);
        residual = *reinterpret_cast<const Vector*>(params->residual + index);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i)
        out[i] = T(finish<E, T>(values[i], static_cast<float>(bias[i]), static_cast<float>(gate[i]),
                                static_cast<float>(residual[i])));
      *reinterpret_cast<Vector*>(params->out + index) = out;
    }
  };

  template <class Shape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, Shape shape) {
    const auto coords = cute::group_modes<3, 6>(ThreadMap::partition(cute::make_identity_tensor(shape), thread, tile));
    const int rows = cute::get<0>(shape), columns = cute::get<1>(shape);
    int first = 0, last = 0;
    if constexpr (E == LinearEpilogue::kGateResidual) {
      const int begin = tile.m() * cute::size<0>(typename ThreadMap::CtaShapeMNL{});
      const int end = begin + cute::size<0>(typename ThreadMap::CtaShapeMNL{});
      first = params->segment(begin);
      last = params->segment((end < rows ? end : rows) - 1);
    }
    return Callbacks<decltype(coords)>(params, coords, rows, columns, first, last);
  }
};

template <LinearEpilogue E, class T, int Groups>
struct LinearSm80 {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Tile = cutlass::gemm::GemmShape<128, 128, 32>;
  using Warp = cutlass::gemm::GemmShape<64, 64, 32>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
  using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<Tile, Warp, T, 8, 1>;
  static_assert(stores_every_element_once<ThreadMap>());
  using Visitor = RowVisitor<E, T, ThreadMap>;
  using Base = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      T, Row, cutlass::ComplexTransform::kNone, 8, T, Column, cutlass::ComplexTransform::kNone, 8, T, Row, 8, float,
      float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, Instruction, Visitor,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 4, cutlass::arch::OpMultiplyAdd, 1>;
  using Mma = typename Base::GemmBase::Mma;
  using Epilogue = typename Base::Epilogue;
  static constexpr int kThreads = Base::GemmBase::kThreadCount;

  struct Problem {
    T *x, *weight;
    int rows;
    typename Visitor::Params epilogue;
  };

  struct Params {
    Problem problem[Groups];
    LinearTiles tiles;
    int columns, depth;
    typename Mma::IteratorA::Params x;
    typename Mma::IteratorB::Params weight;
  };

  union SharedStorage {
    typename Mma::SharedStorage mma;
    typename Epilogue::SharedStorage epilogue;
  };
  static_assert(sizeof(SharedStorage) <= 99 * 1024);  // what a block may have on sm_86 and sm_89

  static CUTLASS_DEVICE void compute(const Params& p, SharedStorage& shared) {
    const LinearTiles::Place place = p.tiles.find(blockIdx.x);
    const Problem& problem = p.problem[place.problem];
    const int thread = threadIdx.x, warp = cutlass::canonical_warp_idx_sync(), lane = threadIdx.x % 32;
    const int row = place.row * Tile::kM, column = place.column * Tile::kN;
    typename Mma::IteratorA x(p.x, problem.x, {problem.rows, p.depth}, thread, {row, 0});
    typename Mma::IteratorB weight(p.weight, problem.weight, {p.depth, p.columns}, thread, {0, column});
    typename Mma::FragmentC accumulators;
    accumulators.clear();
    Mma mma(shared.mma, thread, warp, lane);
    mma((p.depth + Tile::kK - 1) / Tile::kK, accumulators, x, weight, accumulators);
    Epilogue epilogue(problem.epilogue, shared.epilogue, thread, warp, lane);
    epilogue(accumulators, {static_cast<int>(place.row), static_cast<int>(place.column), 0},
             cute::make_shape(problem.rows, p.columns, 1), thread);
  }

  static int run(const LinearGroup& group, cudaStream_t stream);
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    linear_group_sm80(const __grid_constant__ typename Kernel::Params p) {
  extern __shared__ __align__(128) char bytes[];
  Kernel::compute(p, *reinterpret_cast<typename Kernel::SharedStorage*>(bytes));
}

template <LinearEpilogue E, class T, int Groups>
int LinearSm80<E, T, Groups>::run(const LinearGroup& group, cudaStream_t stream) {
  Params p = {};
  int order[kMaxLinears], large = 0;
  const int count = order_linears(group, order, large);
  if (count == 0) return cudaSuccess;
  for (int i = 0; i < count; ++i) {
    const Linear& l = group.linear[order[i]];
    p.problem[i].x = static_cast<T*>(const_cast<void*>(l.x));
    p.problem[i].weight = static_cast<T*>(const_cast<void*>(l.weight));
    p.problem[i].rows = static_cast<int>(l.rows);
    static_cast<EpilogueParams<T>&>(p.problem[i].epilogue) = epilogue_params<T>(l);
    p.problem[i].epilogue.residual = static_cast<const T*>(l.residual);
    p.problem[i].epilogue.out = static_cast<T*>(l.out);
  }
  p.tiles = linear_tiles(group, Tile::kM, Tile::kN);
  p.columns = static_cast<int>(group.columns);
  p.depth = static_cast<int>(group.depth);
  p.x = typename Mma::IteratorA::Params(Row(p.depth));
  p.weight = typename Mma::IteratorB::Params(Column(p.depth));
  const auto kernel = linear_group_sm80<LinearSm80>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(sizeof(SharedStorage))))
    return error;
  void* addresses[] = {&p};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), static_cast<unsigned>(p.tiles.count()), kThreads,
                          addresses, sizeof(SharedStorage), stream);
}

template <LinearEpilogue E, int Groups>
int run_sm80(const LinearGroup& group, cudaStream_t stream) {
  return group.dtype == kFloat16 ? LinearSm80<E, cutlass::half_t, Groups>::run(group, stream)
                                 : LinearSm80<E, cutlass::bfloat16_t, Groups>::run(group, stream);
}

}  // namespace gemm
}  // namespace qif
