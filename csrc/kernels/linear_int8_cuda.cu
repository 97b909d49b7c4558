// linear_int8 on the GPU, by mma.sync of 8-bit integers: every GPU from sm_80 on.
#include "kernels/linear_int8_tile.cuh"

namespace qif {
namespace gpu {

template <class T>
static int products_of_both(const std::vector<Int8Product>& products, void* stream) {
  if (const int error = products_of<T, Int8>(products, stream)) return error;
  return products_of<T, Int4>(products, stream);
}

}  // namespace gpu

int linear_int8_cuda(const std::vector<Int8Product>& products, void*, void* stream) {
  if (products.empty()) return gpu::kSuccess;
  QIF_DISPATCH_CUDA(products[0].dtype, T, return gpu::products_of_both<T>(products, stream))
}

}  // namespace qif
