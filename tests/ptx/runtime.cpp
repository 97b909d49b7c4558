#include "runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

namespace ptx {

Runtime runtime;

namespace {

std::map<const void*, std::string> kernel_names;
std::map<std::string, int> shared_allowed;

// cuTensorMapEncodeTiled, with the driver's rules for tiled tensors.
CUresult encode_tensor_map(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                           const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const auto refuse = [](const std::string& why) {
    runtime.failure = "cuTensorMapEncodeTiled: " + why;
    return CUDA_ERROR_INVALID_VALUE;
  };
  TensorMap m = {};
  m.magic = TensorMap::kMagic;
  m.rank = rank;
  m.address = reinterpret_cast<uint64_t>(address);
  const bool sixteen = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                       type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!sixteen) return refuse("only elements of 16 bits are modelled");
  m.element_bytes = 2;
  const uint32_t widths[] = {1u << 20, 32, 64, 128};
  const CUtensorMapSwizzle kinds[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
                                      CU_TENSOR_MAP_SWIZZLE_128B};
  while (m.swizzle < 4 && kinds[m.swizzle] != swizzle) ++m.swizzle;
  if (m.swizzle == 4) return refuse("a swizzle that is not modelled");
  if (reinterpret_cast<uintptr_t>(out) % 64) return refuse("the map must be aligned to 64 bytes");
  if (m.address == 0 || m.address % 16) return refuse("the tensor must be aligned to 16 bytes");
  if (rank < 1 || rank > 5) return refuse("1 to 5 dimensions, got " + std::to_string(rank));
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse("interleaving is not modelled");
  for (cuuint32_t d = 0; d < rank; ++d) {
    const std::string name = "dimension " + std::to_string(d);
    if (size[d] == 0 || size[d] > uint64_t{1} << 32) return refuse(name + " of " + std::to_string(size[d]));
    if (box[d] == 0 || box[d] > 256) return refuse(name + ": a box of " + std::to_string(box[d]));
    if (element_stride[d] != 1) return refuse(name + ": steps are not modelled");
    if (d && (stride[d - 1] % 16 || stride[d - 1] >= uint64_t{1} << 40))
      return refuse(name + ": a stride of " + std::to_string(stride[d - 1]) + " bytes");
    m.size[d] = static_cast<uint32_t>(std::min<uint64_t>(size[d], UINT32_MAX));
    m.box[d] = box[d];
    m.stride[d] = d ? stride[d - 1] : m.element_bytes;
  }
  const uint32_t inner = m.box[0] * m.element_bytes;
  if (inner % 16) return refuse("a row of the box must be a multiple of 16 bytes, got " + std::to_string(inner));
  if (inner > widths[m.swizzle]) return refuse("a row of the box is wider than its swizzle");
  std::memcpy(out, &m, sizeof(m));
  return CUDA_SUCCESS;
}

cudaError_t last_error = cudaSuccess;  // until cudaGetLastError takes it

cudaError_t refuse(const std::string& why, cudaError_t error = cudaErrorInvalidValue) {
  runtime.failure = why;
  return last_error = error;
}

const Kernel* find_kernel(const std::string& name) {
  for (const auto& p : runtime.programs)
    if (p->has(name)) return &p->kernel(name);
  return nullptr;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, dim3 cluster, size_t shared, void** arguments) {
  const std::string& name = kernel_names.at(function);
  try {
    const Kernel* kernel = find_kernel(name);
    if (!kernel) return refuse("no PTX of " + name, cudaErrorNoKernelImageForDevice);
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024) return refuse("a block of " + std::to_string(threads) + " threads");
    if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
      return refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                    std::to_string(grid.z));
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z || cluster.x * cluster.y * cluster.z > 8)
      return refuse("a grid that its clusters do not divide");
    const auto allowed = shared_allowed.find(name);
    const size_t most = allowed == shared_allowed.end() ? 48 * 1024 : allowed->second;
    if (kernel->static_shared + shared > most)
      return refuse(std::to_string(shared) + " bytes of dynamic shared memory, " + std::to_string(most) +
                    " are allowed");
    Launch l{{grid.x, grid.y, grid.z},
             {block.x, block.y, block.z},
             {cluster.x, cluster.y, cluster.z},
             static_cast<uint32_t>(shared),
             {}};
    runtime.launched.insert(name);
    size_t i = 0;
    for (const Kernel::Param& p : kernel->params) {
      l.params.resize(std::max(l.params.size(), p.offset + p.bytes));
      std::memcpy(&l.params[p.offset], arguments[i++], p.bytes);
    }
    Counts& counts = runtime.counts[name];
    counts.threads = threads;
    run(*kernel, l, runtime.global, runtime.seed, runtime.step_limit, counts);
  } catch (const std::exception& e) {
    return refuse(e.what(), cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  void* stream = nullptr;
} configuration;

}  // namespace
}  // namespace ptx

using ptx::configuration;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  ptx::kernel_names[function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return ptx::launch(function, grid, block, dim3(1, 1, 1), shared, arguments);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& d = c->attrs[i].val.clusterDim;
      cluster = dim3(d.x, d.y, d.z);
    }
  return ptx::launch(function, c->gridDim, c->blockDim, cluster, c->dynamicSmemBytes, arguments);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? ptx::runtime.processors
           : attribute == cudaDevAttrComputeCapabilityMajor ? ptx::runtime.major
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(ptx::last_error, cudaSuccess); }
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > static_cast<int>(ptx::kSharedLimit))
    return ptx::refuse(std::to_string(value) + " bytes of shared memory are more than a block can have");
  ptx::shared_allowed[ptx::kernel_names.at(function)] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(ptx::encode_tensor_map) : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
