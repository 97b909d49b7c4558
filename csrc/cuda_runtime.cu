// What the module says about the CUDA runtime: its version, and errors in words.
#include <cuda_runtime.h>

#include <string>

namespace qif {

int cuda_version() { return CUDART_VERSION; }

std::string cuda_error(int code) {
  cudaGetLastError();  // the runtime keeps it, and the next launch that asks would fail with it
  const auto error = static_cast<cudaError_t>(code);
  std::string text = std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    text +=
        "; the kernels were built for other GPUs: `qwen-image-fast doctor` lists both, build with "
        "QIF_CUDA_ARCHITECTURES for this one";
  else if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion)
    text += "; the driver must be at least as new as the CUDA toolkit that the kernels were built with";
  return text;
}

}  // namespace qif
