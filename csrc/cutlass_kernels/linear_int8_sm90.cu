#include "cutlass_kernels/linear_int8_sm90.cuh"

namespace qif {

int linear_int8_gated_sm90(const std::vector<Int8Product>& products, void* stream);

int linear_int8_sm90(const std::vector<Int8Product>& products, void* stream) {
  if (products.empty()) return cudaSuccess;
  const auto run = products[0].dtype == kFloat16 ? gemm::run_int8_sm90<false, cutlass::half_t, 6, gemm::LargeTile>
                                                 : gemm::run_int8_sm90<false, cutlass::bfloat16_t, 6, gemm::LargeTile>;
  if (const int error = run(products, static_cast<cudaStream_t>(stream))) return error;
  return linear_int8_gated_sm90(products, stream);
}

}  // namespace qif
