// Declares the CUDA launcher of a kernel. It queues the work on `stream` and returns 0 or a cudaError_t; `scratch` is
// device memory of the size that the op's `*_scratch` function names.
#pragma once

#define QIF_DECLARE_CUDA(NAME, PARAMS) int NAME##_cuda(const PARAMS& params, void* scratch, void* stream);
