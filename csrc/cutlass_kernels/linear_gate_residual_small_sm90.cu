#include "cutlass_kernels/linear_sm90.cuh"

namespace qif {

int linear_gate_residual_small_sm90(const LinearGroup& group, void* stream) {
  return gemm::run_sm90<LinearEpilogue::kGateResidual, 2, gemm::SmallTile>(group, static_cast<cudaStream_t>(stream));
}

}  // namespace qif
