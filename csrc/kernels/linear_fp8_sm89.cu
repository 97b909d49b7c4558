// linear_int8 with rows and weights in float8, by mma.sync: every GPU from sm_89 on, which this file is compiled for.
#include "kernels/linear_int8_tile.cuh"

namespace qif {

int linear_fp8_cuda(const std::vector<Int8Product>& products, void*, void* stream) {
  if (products.empty()) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(products[0].dtype, T, return gpu::products_of<T, gpu::E4m3>(products, stream))
}

}  // namespace qif
