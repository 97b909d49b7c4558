// csrc/bindings_cutlass.cpp as a module of its own, on a runtime and kernels that only say what they were given.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "kernels/linear_group.h"
#include "kernels/linear_int8.h"

static int device_major = 9, error_of_kernels = 0;
static std::vector<std::string> launched;

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = device_major;
  return cudaSuccess;
}

namespace qif {

std::string cuda_error(int error) { return "error " + std::to_string(error); }

static int say(const char* kernel, const LinearGroup& g, void* stream) {
  std::string text = std::string(kernel) + " " + std::to_string(reinterpret_cast<uintptr_t>(stream)) + ":";
  for (int64_t v : {int64_t{g.count}, g.columns, g.depth, int64_t{g.tile}, int64_t{g.dtype}})
    text += " " + std::to_string(v);
  for (int i = 0; i < g.count; ++i) {
    const Linear& l = g.linear[i];
    text += ";";
    for (const void* p : {l.x, l.weight, l.bias, static_cast<const void*>(l.out), l.residual, l.gate,
                          static_cast<const void*>(l.offsets)})
      text += " " + std::to_string(reinterpret_cast<uintptr_t>(p));
    for (int64_t v : {l.rows, l.gate_stride, l.segments}) text += " " + std::to_string(v);
  }
  launched.push_back(text);
  return error_of_kernels;
}

#define KERNEL(NAME) \
  int NAME(const LinearGroup& g, void* stream) { return say(#NAME, g, stream); }
KERNEL(linear_qkv_sm80)
KERNEL(linear_gelu_sm80)
KERNEL(linear_gate_residual_sm80)
#if defined(QIF_CUTLASS_SM90)
KERNEL(linear_qkv_sm90)
KERNEL(linear_gelu_sm90)
KERNEL(linear_gate_residual_sm90)

int linear_int8_sm90(const std::vector<Int8Product>& products, void* stream) {
  std::string text = "linear_int8_sm90 " + std::to_string(reinterpret_cast<uintptr_t>(stream)) + ":";
  for (const Int8Product& p : products) {
    for (const void* a :
         {static_cast<const void*>(p.values), static_cast<const void*>(p.scales), static_cast<const void*>(p.weight),
          static_cast<const void*>(p.weight_scales), static_cast<const void*>(p.sums), p.bias,
          static_cast<const void*>(p.out), p.residual, p.gate, static_cast<const void*>(p.offsets)})
      text += " " + std::to_string(reinterpret_cast<uintptr_t>(a));
    for (int64_t v : {p.rows, p.columns, p.depth, p.gate_stride, p.segments, int64_t{p.dtype}, int64_t{p.four}})
      text += " " + std::to_string(v);
    text += ";";
  }
  launched.push_back(text);
  return error_of_kernels;
}
#endif

}  // namespace qif

PYBIND11_MODULE(bindings, m) {
  qif::define_cutlass(m);
  m.def("be", [](int major, int error) {
    device_major = major;
    error_of_kernels = error;
    launched.clear();
  });
  m.def("launched", [] { return launched; });
}
