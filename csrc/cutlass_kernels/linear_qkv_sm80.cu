#include "cutlass_kernels/linear_sm80.cuh"

namespace qif {

int linear_qkv_sm80(const LinearGroup& group, void* stream) {
  return gemm::run_sm80<LinearEpilogue::kNone, 6>(group, static_cast<cudaStream_t>(stream));
}

}  // namespace qif
