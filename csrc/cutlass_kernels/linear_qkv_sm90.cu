#include "cutlass_kernels/linear_sm90.cuh"

namespace qif {

int linear_qkv_small_sm90(const LinearGroup& group, void* stream);

int linear_qkv_sm90(const LinearGroup& group, void* stream) {
  if (group.tile) return linear_qkv_small_sm90(group, stream);
  return gemm::run_sm90<LinearEpilogue::kNone, 6, gemm::LargeTile>(group, static_cast<cudaStream_t>(stream));
}

}  // namespace qif
