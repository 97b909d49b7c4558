// A Python module with the CUDA functions of _C, whose launches are interpreted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_cuda.h"
#include "runtime.h"

namespace py = pybind11;

namespace qif {
std::string cuda_error(int error) {
  const std::string words = ptx::runtime.failure.empty() ? "error " + std::to_string(error) : ptx::runtime.failure;
  ptx::runtime.failure.clear();
  return words;
}
}  // namespace qif

PYBIND11_MODULE(PTX_MODULE, m) {
  using ptx::runtime;
#if defined(QIF_CUTLASS_SM90)
  qif::define_cutlass(m);
#else
  qif::define_cuda(m);
#endif
  m.def("set_programs", [](std::vector<std::string> texts) {
    runtime.programs.clear();
    for (std::string& t : texts) runtime.programs.push_back(std::make_unique<ptx::Program>(std::move(t)));
  });
  // Memory that launches may touch: address, bytes, and whether they have been written.
  m.def("set_ranges", [](const std::vector<std::tuple<uintptr_t, size_t, bool>>& ranges) {
    runtime.global.clear();
    for (const auto& [address, bytes, written] : ranges) runtime.global.add(address, bytes, written);
  });
  m.def(
      "be",
      [](unsigned seed, int major, int processors, uint64_t step_limit) {
        runtime.seed = seed;
        runtime.major = major;
        runtime.processors = processors;
        runtime.step_limit = step_limit;
      },
      py::arg("seed") = 1, py::arg("major") = 9, py::arg("processors") = 4, py::arg("step_limit") = 1 << 28);
  m.def("launched", [] { return std::exchange(runtime.launched, {}); });
  // Of each kernel since the last call, by its name in PTX.
  m.def("counts", [] {
    std::map<std::string, py::dict> found;
    for (const auto& [name, c] : std::exchange(runtime.counts, {}))
      found[name] = py::dict(py::arg("instructions") = c.instructions, py::arg("loaded") = c.loaded,
                             py::arg("stored") = c.stored, py::arg("blocks") = c.blocks, py::arg("threads") = c.threads,
                             py::arg("waits") = c.waits, py::arg("by_name") = c.by_name);
    return found;
  });
}
