// The CUDA side of the Python module, compiled with CUDA or, for tests, with the emulator.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

namespace qif {

// Functions named <op>_<direction>_cuda: the arguments of the CPU function, scratch memory and the stream; and
// <op>_backward_scratch: bytes of scratch memory for a shape.
void define_cuda(pybind11::module_& m);
void define_cutlass(pybind11::module_& m);  // not with the emulator

// csrc/cuda_runtime.cu
int cuda_version();                 // the toolkit's: 13000 is 13.0
std::string cuda_error(int error);  // the runtime's words, and what to do about the usual causes

}  // namespace qif
