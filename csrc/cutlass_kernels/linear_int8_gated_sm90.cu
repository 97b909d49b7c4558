#include "cutlass_kernels/linear_int8_sm90.cuh"

namespace qif {

int linear_int8_gated_sm90(const std::vector<Int8Product>& products, void* stream) {
  const auto run = products[0].dtype == kFloat16 ? gemm::run_int8_sm90<true, cutlass::half_t, 2, gemm::LargeTile>
                                                 : gemm::run_int8_sm90<true, cutlass::bfloat16_t, 2, gemm::LargeTile>;
  return run(products, static_cast<cudaStream_t>(stream));
}

}  // namespace qif
