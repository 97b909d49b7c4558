// What CUDA kernels are written against. nvcc compiles it for the GPU; with QIF_EMULATED, g++ compiles the same kernels
// for the host against tests/emulator, which runs the threads of a block as fibers and checks every access made
// through the functions below.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#define QIF_ISA gpu
#if defined(QIF_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif
#define QIF_DEVICE __host__ __device__ __forceinline__
#define QIF_ROW_INDEX uint32_t  // Python lets through fewer than 2^31 rows

#include "common/dtype.h"
#include "common/segments.h"

namespace qif {
namespace gpu {

#define QIF_INLINE __device__ __forceinline__

constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- memory --------------------------------------------------------------------------------------------------------
// Global memory is read and written through load_global and store_global, whose size is that of one instruction.
// Shared memory is declared with QIF_SHARED, or reached with dynamic_shared, and used through `Shared<T>`.

#if defined(QIF_EMULATED)
using emulator::dynamic_shared;
using emulator::load_global;
using emulator::Shared;
using emulator::shared_cast;
using emulator::store_global;
#define QIF_SHARED(T, name, count)                 \
  static emulator::SharedKey name##_key = {#name}; \
  const ::qif::gpu::Shared<T> name = emulator::static_shared<T>(name##_key, count)
#else
template <class V>
QIF_INLINE V load_global(const V* p) {
  return *p;
}
template <class V>
QIF_INLINE void store_global(V* p, V v) {
  *p = v;
}
template <class T>
using Shared = T*;
template <class U, class T>
QIF_INLINE U* shared_cast(T* p) {
  return reinterpret_cast<U*>(p);
}
#define QIF_SHARED(T, name, count) __shared__ T name[count]
template <class T>
QIF_INLINE T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}
#endif

// ---- conversion: two 16-bit values in a word, the lower one first ---------------------------------------------------

QIF_INLINE float from_bits(uint32_t bits) {
#if defined(QIF_EMULATED)
  return emulator::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

QIF_INLINE uint32_t to_bits(float v) {
#if defined(QIF_EMULATED)
  return emulator::bit_cast<uint32_t>(v);
#else
  return __float_as_uint(v);
#endif
}

QIF_INLINE void widen2(BFloat16, uint32_t word, float& low, float& high) {
  low = from_bits(word << 16);
  high = from_bits(word & 0xffff0000u);
}

#if defined(QIF_EMULATED)
using emulator::narrow2;
using emulator::widen2;
#else
QIF_INLINE void widen2(Half, uint32_t word, float& low, float& high) {
  asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}
QIF_INLINE uint32_t narrow2(BFloat16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
QIF_INLINE uint32_t narrow2(Half, float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

// ---- packs: N consecutive values, as they lie in memory
// --------------------------------------------------------------

template <int Count>
struct alignas(4 * Count) Words {
  uint32_t w[Count];
};
using Word4 = Words<4>;

// N is 8 (16-byte accesses; `p` aligned to 16 bytes), 4 or 2 (one access; aligned to its size, at most 16 bytes) or 1.
template <class T, int N>
struct Pack {
  static constexpr int kWords = N * sizeof(T) < 4 ? 1 : N * sizeof(T) / 4;
  uint32_t w[kWords];
};

template <int N, class T>
QIF_INLINE Pack<T, N> load_pack(const T* p) {
  using P = Pack<T, N>;
  constexpr int kAccess = P::kWords < 4 ? P::kWords : 4;
  P pack;
  if constexpr (N * sizeof(T) < 4) {
    pack.w[0] = load_global(reinterpret_cast<const uint16_t*>(p));
  } else {
#pragma unroll
    for (int i = 0; i < P::kWords / kAccess; ++i) {
      const Words<kAccess> words = load_global(reinterpret_cast<const Words<kAccess>*>(p) + i);
#pragma unroll
      for (int j = 0; j < kAccess; ++j) pack.w[kAccess * i + j] = words.w[j];
    }
  }
  return pack;
}

template <class T, int N>
QIF_INLINE void store_pack(T* p, const Pack<T, N>& pack) {
  using P = Pack<T, N>;
  constexpr int kAccess = P::kWords < 4 ? P::kWords : 4;
  if constexpr (N * sizeof(T) < 4) {
    store_global(reinterpret_cast<uint16_t*>(p), static_cast<uint16_t>(pack.w[0]));
  } else {
#pragma unroll
    for (int i = 0; i < P::kWords / kAccess; ++i) {
      Words<kAccess> words;
#pragma unroll
      for (int j = 0; j < kAccess; ++j) words.w[j] = pack.w[kAccess * i + j];
      store_global(reinterpret_cast<Words<kAccess>*>(p) + i, words);
    }
  }
}

template <class T, int N>
QIF_INLINE void widen(const Pack<T, N>& pack, float (&v)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = from_bits(pack.w[i]);
  } else if constexpr (N == 1) {
    float unused;
    widen2(T{}, pack.w[0], v[0], unused);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) widen2(T{}, pack.w[i / 2], v[i], v[i + 1]);
  }
}

// Rounds to T.
template <class T, int N>
QIF_INLINE Pack<T, N> narrow(const float (&v)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.w[i] = to_bits(v[i]);
  } else if constexpr (N == 1) {
    pack.w[0] = narrow2(T{}, v[0], 0.0f);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) pack.w[i / 2] = narrow2(T{}, v[i], v[i + 1]);
  }
  return pack;
}

template <int N, class T>
QIF_INLINE void load(const T* p, float (&v)[N]) {
  widen(load_pack<N>(p), v);
}
template <int N, class T>
QIF_INLINE void store(T* p, const float (&v)[N]) {
  store_pack(p, narrow<T>(v));
}

// ---- functions of values that are rounded to T ----------------------------------------------------------------------

// exp(x) and a / b: what 16 bits do not show, the GPU's approximations leave out, with half as many instructions. In
// units in the last place of float32 exp errs by 2 + 1.17 |x| and the quotient by 2 (CUDA's programming guide). |b|
// must be below 2^126, above which the quotient is 0.
template <class T>
QIF_INLINE float exponential(float x) {
#if !defined(QIF_EMULATED)
  if constexpr (sizeof(T) == 2) return __expf(x);
#endif
  return expf(x);
}
template <class T>
QIF_INLINE float quotient(float a, float b) {
#if !defined(QIF_EMULATED)
  if constexpr (sizeof(T) == 2) return __fdividef(a, b);
#endif
  return a / b;
}
constexpr float kLargestExponent = 87.0f;  // exp of it is still such a `b`: 6e37 < 2^126

// ---- one rounding for each operation, as in the CPU's kernels: no product and sum become one -----------------------

QIF_INLINE float times(float a, float b) {
#if defined(QIF_EMULATED)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}
QIF_INLINE float plus(float a, float b) {
#if defined(QIF_EMULATED)
  return a + b;
#else
  return __fadd_rn(a, b);
#endif
}

// ---- sums: the same order in every run
// -------------------------------------------------------------------------------

// Over `Lanes` neighbouring lanes (a power of two); every lane gets the sum.
template <int Lanes = 32>
QIF_INLINE float warp_sum(float v) {
#pragma unroll
  for (int d = Lanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

constexpr int kMaxWarps = 16;

// M sums over the block at once, for every thread. `partial` holds M * kMaxWarps values; two calls one after the other
// need different ones, then one barrier per call is enough: who writes again has passed the other call's barrier.
template <int M>
QIF_INLINE void block_sum(float (&v)[M], Shared<float> partial) {
  const int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    v[m] = warp_sum(v[m]);
    if (threadIdx.x % 32 == 0) partial[m * kMaxWarps + warp] = v[m];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    v[m] = 0.0f;
    for (int w = 0; w < warps; ++w) v[m] += partial[m * kMaxWarps + w];
  }
}

// ---- launch
// ----------------------------------------------------------------------------------------------------------

constexpr int kSuccess = 0;

// 0, or the cudaError_t of the launch.
#if defined(QIF_EMULATED)
using emulator::launch;
#else
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, A... args) {
  // Converted to the parameters' own types: the runtime copies that many bytes from each address.
  return [&](P... p) {
    void* addresses[] = {&p...};
    if (shared_bytes > 48 * 1024) {
      const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
      if (e != cudaSuccess) return static_cast<int>(e);
    }
    return static_cast<int>(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses,
                                             shared_bytes, static_cast<cudaStream_t>(stream)));
  }(args...);
}
#endif

inline bool aligned16(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gpu
}  // namespace qif

// Run BODY with T as the storage type of dtype code `code`; Python lets no float64 through.
#define QIF_DISPATCH_CUDA(code, T, ...) \
  switch (code) {                       \
    case ::qif::kFloat16: {             \
      using T = ::qif::Half;            \
      __VA_ARGS__;                      \
    } break;                            \
    case ::qif::kBFloat16: {            \
      using T = ::qif::BFloat16;        \
      __VA_ARGS__;                      \
    } break;                            \
    default: {                          \
      using T = float;                  \
      __VA_ARGS__;                      \
    }                                   \
  }
