// The Python module _C_emulated: the CUDA functions of _C on the emulator.
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "emulator.h"

namespace py = pybind11;

namespace qif {
std::string cuda_error(int error) { return "error " + std::to_string(error); }
}  // namespace qif

PYBIND11_MODULE(_C_emulated, m) {
  qif::define_cuda(m);
  m.def("set_ranges", [](std::vector<std::pair<uintptr_t, size_t>> ranges) { emulator::ranges = std::move(ranges); });
}
