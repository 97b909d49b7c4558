#include "cutlass_kernels/linear_sm90.cuh"

namespace qif {

int linear_gate_residual_small_sm90(const LinearGroup& group, void* stream);

int linear_gate_residual_sm90(const LinearGroup& group, void* stream) {
  if (group.tile) return linear_gate_residual_small_sm90(group, stream);
  return gemm::run_sm90<LinearEpilogue::kGateResidual, 2, gemm::LargeTile>(group, static_cast<cudaStream_t>(stream));
}

}  // namespace qif
