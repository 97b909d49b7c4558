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
  std::string refused;
  const auto refuse_if = [&refused](bool wrong, const auto&... why) {
    if (wrong && refused.empty()) refused = words("cuTensorMapEncodeTiled: ", why...);
  };
  const bool eight = type == CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const bool sixteen = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                       type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  TensorMap m = {TensorMap::kMagic, rank, eight ? 1u : 2u, static_cast<uint32_t>(swizzle),
                 reinterpret_cast<uint64_t>(address)};
  refuse_if(!eight && !sixteen, "only elements of 8 and 16 bits are modelled");
  refuse_if(swizzle > CU_TENSOR_MAP_SWIZZLE_128B, "a swizzle that is not modelled");
  refuse_if(reinterpret_cast<uintptr_t>(out) % 64, "the map must be aligned to 64 bytes");
  refuse_if(m.address == 0 || m.address % 16, "the tensor must be aligned to 16 bytes");
  refuse_if(rank < 1 || rank > 5, "1 to 5 dimensions, got ", rank);
  refuse_if(interleave != CU_TENSOR_MAP_INTERLEAVE_NONE, "interleaving is not modelled");
  for (cuuint32_t d = 0; d < std::min(rank, 5u); ++d) {
    refuse_if(size[d] == 0 || size[d] > uint64_t{1} << 32, "dimension ", d, " of ", size[d]);
    refuse_if(box[d] == 0 || box[d] > 256, "dimension ", d, ": a box of ", box[d]);
    refuse_if(element_stride[d] != 1, "dimension ", d, ": steps are not modelled");
    m.size[d] = static_cast<uint32_t>(std::min<uint64_t>(size[d], UINT32_MAX));
    m.box[d] = box[d];
    m.stride[d] = d ? stride[d - 1] : m.element_bytes;
    refuse_if(d && (m.stride[d] % 16 || m.stride[d] >= uint64_t{1} << 40), "dimension ", d, ": a stride of ",
              m.stride[d], " bytes");
  }
  const uint32_t inner = m.box[0] * m.element_bytes;
  refuse_if(inner % 16, "a row of the box must be a multiple of 16 bytes, got ", inner);
  refuse_if(swizzle && inner > 16u << swizzle, "a row of the box is wider than its swizzle");
  if (!refused.empty()) {
    runtime.failure = refused;
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memcpy(out, &m, sizeof(m));
  return CUDA_SUCCESS;
}

cudaError_t last_error = cudaSuccess;  // until cudaGetLastError takes it

cudaError_t refuse(const std::string& why, cudaError_t error = cudaErrorInvalidValue) {
  runtime.failure = why;
  return last_error = error;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, dim3 cluster, size_t shared, void** arguments) {
  const std::string& name = kernel_names.at(function);
  try {
    const auto program =
        std::find_if(runtime.programs.begin(), runtime.programs.end(), [&](const auto& p) { return p->has(name); });
    if (program == runtime.programs.end()) return refuse("no PTX of " + name, cudaErrorNoKernelImageForDevice);
    const Kernel& kernel = (*program)->kernel(name);
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024) return refuse(words("a block of ", threads, " threads"));
    if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
      return refuse(words("a grid of ", grid.x, " x ", grid.y, " x ", grid.z));
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z || cluster.x * cluster.y * cluster.z > 8)
      return refuse("a grid that its clusters do not divide");
    const auto allowed = shared_allowed.find(name);
    const size_t most = allowed == shared_allowed.end() ? 48 * 1024 : allowed->second;
    if (kernel.static_shared + shared > most)
      return refuse(words(shared, " bytes of dynamic shared memory, ", most, " are allowed"));
    const auto size = [](dim3 d) { return Size{d.x, d.y, d.z}; };
    Launch l{size(grid), size(block), size(cluster), static_cast<uint32_t>(shared), {}};
    for (const auto& [offset, bytes] : kernel.params) {
      l.params.resize(offset + bytes);
      std::memcpy(&l.params[offset], *arguments++, bytes);
    }
    runtime.launched.insert(name);
    Counts& counts = runtime.counts[name];
    counts.threads = threads;
    run(kernel, l, runtime.global, runtime.seed, runtime.step_limit, counts);
  } catch (const std::exception& e) {
    return refuse(e.what(), cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

std::tuple<dim3, dim3, size_t, void*> configuration;  // grid, block, shared memory, stream

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
  std::tie(*grid, *block, *shared, *static_cast<void**>(stream)) = configuration;
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
