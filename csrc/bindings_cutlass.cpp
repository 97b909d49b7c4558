// The ops whose CUDA kernels come from CUTLASS's templates: for Hopper where this build has its kernels, else those
// that every GPU from Ampere on runs.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings_cuda.h"
#include "kernels/linear_group.h"
#include "params.h"

namespace py = pybind11;

namespace qif {

using LinearKernel = int (*)(const LinearGroup&, void*);

static int run(const LinearGroup& group, void* stream, LinearKernel sm80, LinearKernel sm90) {
  int device, major;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  const LinearKernel kernel = major == 9 && sm90 ? sm90 : sm80;
  return kernel ? kernel(group, stream) : cudaErrorNoKernelImageForDevice;
}

static void define(py::module_& m, const std::string& op, LinearKernel sm80, LinearKernel sm90) {
  m.def((op + "_forward_cuda").c_str(), [op, sm80, sm90](const std::vector<LinearArguments>& linears, int64_t columns,
                                                         int64_t depth, int tile, int dtype, Address, Address stream) {
    const LinearGroup group = linear_group(linears, columns, depth, tile, dtype);
    int error;
    {
      py::gil_scoped_release release;
      error = run(group, pointer(stream), sm80, sm90);
    }
    if (error) throw std::runtime_error(op + ": " + cuda_error(error));
  });
}

#if defined(QIF_CUTLASS_SM80)
#define QIF_SM80(NAME) NAME##_sm80
#else
#define QIF_SM80(NAME) nullptr
#endif
#if defined(QIF_CUTLASS_SM90)
#define QIF_SM90(NAME) NAME##_sm90
#else
#define QIF_SM90(NAME) nullptr
#endif

void define_cutlass(py::module_& m) {
  define(m, "linear_qkv", QIF_SM80(linear_qkv), QIF_SM90(linear_qkv));
  define(m, "linear_gelu", QIF_SM80(linear_gelu), QIF_SM90(linear_gelu));
  define(m, "linear_gate_residual", QIF_SM80(linear_gate_residual), QIF_SM90(linear_gate_residual));
#if defined(QIF_CUTLASS_SM90)
  m.def("linear_int8_sm90_cuda", [](const std::vector<Int8Arguments>& products, int dtype, Address, Address stream) {
    const std::vector<Int8Product> found = int8_products(products, dtype, {});
    int error;
    {
      py::gil_scoped_release release;
      error = linear_int8_sm90(found, pointer(stream));
    }
    if (error) throw std::runtime_error("linear_int8: " + cuda_error(error));
  });
#endif
}

}  // namespace qif
