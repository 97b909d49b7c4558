#include "cutlass_kernels/linear_sm90.cuh"

namespace qif {

int linear_gelu_small_sm90(const LinearGroup& group, void* stream);

int linear_gelu_sm90(const LinearGroup& group, void* stream) {
  if (group.tile) return linear_gelu_small_sm90(group, stream);
  return gemm::run_sm90<LinearEpilogue::kGelu, 2, gemm::LargeTile>(group, static_cast<cudaStream_t>(stream));
}

}  // namespace qif
