// conv2d as an implicit matrix product of CUTLASS's: rows are pixels, columns output channels, and the depth runs over
// the taps and the input channels. mma.sync and cp.async, so that one source serves every GPU from Ampere on. The VAE
// has 96, 192 or 384 channels, and no tile of 96 or 192 columns: CUTLASS's threads would not store all of one.
#include <cutlass/conv/kernel/default_conv2d_fprop_with_broadcast.h>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/linear_combination_bias_elementwise.h>

#include "common/dtype.h"
#include "cutlass_kernels/thread_map.cuh"
#include "kernels/conv2d.h"

namespace qif {
namespace conv {

using cutlass::gemm::GemmShape;

// alpha * product + beta * residual + bias; the residual is read only where beta is not 0.
template <class T>
using Epilogue = cutlass::epilogue::thread::LinearCombinationBiasElementwise<
    T, float, float, T, T, 8, cutlass::epilogue::thread::Identity<float>, cutlass::plus<float>, false>;

template <class T, class Tile, class Warp, int Stages>
struct Conv2dTile {
  using Layout = cutlass::layout::TensorNHWC;
  using Kernel = typename cutlass::conv::kernel::DefaultConv2dFpropWithBroadcast<
      T, Layout, T, Layout, T, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp,
      GemmShape<16, 8, 16>, Epilogue<T>, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, Stages,
      cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel;
  static constexpr int kThreads = 32 * Kernel::WarpCount::kCount;
  static constexpr int kShared = static_cast<int>(sizeof(typename Kernel::SharedStorage));
  static_assert(kShared <= 99 * 1024);  // what a block may have on sm_86 and sm_89
  static_assert(stores_every_element_once<typename Kernel::Epilogue::OutputTileIterator::ThreadMap>());
};

template <class T, int Columns>
struct Choice;
template <class T>
struct Choice<T, 64> : Conv2dTile<T, GemmShape<128, 64, 32>, GemmShape<64, 32, 32>, 4> {};
template <class T>
struct Choice<T, 128> : Conv2dTile<T, GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 4> {};

template <class T, int Columns>
__global__ void __launch_bounds__(Choice<T, Columns>::kThreads)
    conv2d_tile(const __grid_constant__ typename Choice<T, Columns>::Kernel::Params p) {
  extern __shared__ __align__(128) char bytes[];
  using Kernel = typename Choice<T, Columns>::Kernel;
  Kernel()(p, *reinterpret_cast<typename Kernel::SharedStorage*>(bytes));
}

template <class T, int Columns>
static int run(const Conv2d& p, cudaStream_t stream) {
  using Tile = Choice<T, Columns>;
  using Kernel = typename Tile::Kernel;
  const int n = p.batch, h = p.height, w = p.width, c = p.in_channels, k = p.out_channels;
  const int r = p.kernel_height, s = p.kernel_width, ph = p.pad_height, pw = p.pad_width;
  const int out_h = h + 2 * ph - r + 1, out_w = w + 2 * pw - s + 1;
  const cutlass::conv::Conv2dProblemSize size(n, h, w, c, k, r, s, out_h, out_w, ph, pw, 1, 1, 1, 1,
                                              cutlass::conv::Mode::kCrossCorrelation, 1, 1);
  const auto tensor = [](const void* data, int rows, int columns, int channels) {
    return cutlass::TensorRef<T, cutlass::layout::TensorNHWC>(
        static_cast<T*>(const_cast<void*>(data)), cutlass::layout::TensorNHWC::packed({1, rows, columns, channels}));
  };
  const auto out = tensor(p.out, out_h, out_w, k);
  const auto residual = p.residual ? tensor(p.residual, out_h, out_w, k) : out;
  const typename Kernel::Arguments arguments(size, tensor(p.x, h, w, c), tensor(p.weight, r, s, c), residual, out,
                                             {1.0f, p.residual ? 1.0f : 0.0f}, cutlass::conv::SplitKMode::kSerial,
                                             const_cast<void*>(p.bias));
  typename Kernel::Params params(arguments);
  const auto kernel = conv2d_tile<T, Columns>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared))
    return error;
  const dim3 grid = typename Kernel::ThreadblockSwizzle().get_grid_shape(params.grid_tiled_shape);
  void* addresses[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, Tile::kThreads, addresses, Tile::kShared,
                          stream);
}

template <class T>
static int run(const Conv2d& p, cudaStream_t stream) {
  return p.out_channels <= 96 ? run<T, 64>(p, stream) : run<T, 128>(p, stream);
}

}  // namespace conv

int conv2d_forward_cuda(const Conv2d& p, void*, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return p.dtype == kFloat16 ? conv::run<cutlass::half_t>(p, on) : conv::run<cutlass::bfloat16_t>(p, on);
}

}  // namespace qif
