// Runs CUDA kernels on the host: csrc/common/cuda.cuh includes this instead of the CUDA headers.
//
// Blocks run one after another, the threads of a block as fibers that switch where they wait for each other. Found and
// thrown as std::runtime_error, with block and thread: barriers and warp operations that not all threads reach, masks
// without the calling lane, reads from lanes outside the mask, shared memory out of bounds or read before it was
// written, two threads on the same shared bytes without a barrier between them, or any while an asynchronous copy to
// them is in flight, global memory outside the ranges registered for the launch, and misaligned accesses.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dtype.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Site {
  const char* file;
  int line;
};

[[noreturn]] void fail(const std::string& what);

// ---- threads and barriers (emulator.cpp)

struct ThreadIndices {
  dim3 thread, block, block_dim, grid_dim;
};
extern ThreadIndices now;  // of the running fiber

void block_barrier(Site site);
void warp_barrier(uint32_t mask, Site site);

// Lanes of `mask` meet; the last one calls run(payloads by lane, null outside of the mask). All carry the same `run`.
using WarpOperation = void (*)(void* const* payloads, uint32_t mask);
void meet(uint32_t mask, void* payload, WarpOperation run, const char* name, Site site);
int lane();

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, A... args) {
  run_grid(grid, block, shared_bytes, [&] { kernel(static_cast<P>(args)...); });
  return 0;
}

// ---- global memory

extern std::vector<std::pair<uintptr_t, size_t>> ranges;  // what a launch may touch: addresses and bytes
void check_global(const void* p, size_t bytes, const char* action);

template <class V>
inline V load_global(const V* p) {
  check_global(p, sizeof(V), "read");
  return *p;
}
template <class V>
inline void store_global(V* p, V v) {
  check_global(p, sizeof(V), "write");
  *p = v;
}

// ---- shared memory

struct SharedKey {
  const char* name;
};
struct SharedSpan {
  const char* name;
  unsigned char* base;  // of the block's arena
  size_t begin, end;    // bytes in the arena
};
SharedSpan find_shared(const SharedKey& key, size_t bytes);  // the same span for every thread of the block
SharedSpan find_dynamic_shared();
void check_shared(const SharedSpan& span, ptrdiff_t offset, size_t bytes, size_t alignment, bool write);

// A pointer into shared memory that checks what it is used for.
template <class T>
struct Shared {
  SharedSpan span;
  ptrdiff_t offset;  // bytes from the arena's start

  struct Element {
    Shared at;
    operator T() const {
      check_shared(at.span, at.offset, sizeof(T), alignof(T), false);
      T v;
      std::memcpy(&v, at.span.base + at.offset, sizeof(T));
      return v;
    }
    const Element& operator=(const T& v) const {
      check_shared(at.span, at.offset, sizeof(T), alignof(T), true);
      std::memcpy(at.span.base + at.offset, &v, sizeof(T));
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
    const Element& operator+=(const T& v) const { return *this = static_cast<T>(*this) + v; }
  };
  Element operator[](ptrdiff_t i) const { return {{span, offset + i * static_cast<ptrdiff_t>(sizeof(T))}}; }
  Element operator*() const { return (*this)[0]; }
  Shared operator+(ptrdiff_t i) const { return {span, offset + i * static_cast<ptrdiff_t>(sizeof(T))}; }
};

template <class T>
Shared<T> static_shared(const SharedKey& key, size_t count) {
  const SharedSpan span = find_shared(key, count * sizeof(T));
  return {span, static_cast<ptrdiff_t>(span.begin)};
}
template <class T>
Shared<T> dynamic_shared() {
  const SharedSpan span = find_dynamic_shared();
  return {span, static_cast<ptrdiff_t>(span.begin)};
}
template <class U, class T>
Shared<U> shared_cast(const Shared<T>& p) {
  return {p.span, p.offset};
}

// ---- asynchronous copies: data arrive when their thread waits for their group, not before

struct alignas(16) Bytes16 {
  unsigned char bytes[16];
};
void copy_async(const Shared<Bytes16>& to, const void* from, bool valid);
void commit_copies();
void wait_copies(int left);

// ---- warp operations

int shuffle_source(int own, int argument, int width, char kind);

template <class T>
struct Shuffle {
  T value, result;
  int lane, argument, width;
  char kind;  // 'i' index, 'x' xor, 'd' down, 'u' up

  static void run(void* const* payloads, uint32_t mask) {
    for (int l = 0; l < 32; ++l) {
      if (!payloads[l]) continue;
      auto& own = *static_cast<Shuffle*>(payloads[l]);
      const int source = shuffle_source(l, own.argument, own.width, own.kind);
      if (!(mask >> source & 1) || !payloads[source])
        fail("lane " + std::to_string(l) + " shuffles from lane " + std::to_string(source) + ", outside of the mask");
      own.result = static_cast<Shuffle*>(payloads[source])->value;
    }
  }
};

template <class T>
T shuffle(uint32_t mask, T value, int argument, int width, char kind, Site site) {
  Shuffle<T> own{value, value, lane(), argument, width, kind};
  meet(mask, &own, &Shuffle<T>::run, "shuffle", site);
  return own.result;
}

uint32_t vote(uint32_t mask, bool predicate, Site site);  // bit l: the predicate of lane l

// ---- bits and rounding

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

float widen_half(uint16_t bits);
uint16_t narrow_half(float value);
uint16_t narrow_bfloat16(float value);

// ---- matrices, by the fragment layouts of the PTX ISA (common/mma.cuh)

void load_matrices(const Shared<Bytes16>& row, bool transposed, uint32_t (&words)[4]);
using Widen2 = void (*)(uint32_t word, float& low, float& high);
void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4], Widen2 widen);
void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], int32_t (&c)[4]);  // bytes, unsigned with signed
void multiply_add_e4m3(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]);
uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors);

inline void widen2(qif::Half, uint32_t word, float& low, float& high) {
  low = widen_half(static_cast<uint16_t>(word));
  high = widen_half(static_cast<uint16_t>(word >> 16));
}
inline uint32_t narrow2(qif::Half, float low, float high) {
  return narrow_half(low) | static_cast<uint32_t>(narrow_half(high)) << 16;
}
inline uint32_t narrow2(qif::BFloat16, float low, float high) {
  return narrow_bfloat16(low) | static_cast<uint32_t>(narrow_bfloat16(high)) << 16;
}

}  // namespace emulator

#define threadIdx (::emulator::now.thread)
#define blockIdx (::emulator::now.block)
#define blockDim (::emulator::now.block_dim)
#define gridDim (::emulator::now.grid_dim)

// Where a built-in was called: defaults are filled in at the call.
#define QIF_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(QIF_SITE) { emulator::block_barrier({file, line}); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, QIF_SITE) { emulator::warp_barrier(mask, {file, line}); }
template <class T>
T __shfl_sync(uint32_t mask, T v, int source, int width = 32, QIF_SITE) {
  return emulator::shuffle(mask, v, source, width, 'i', {file, line});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32, QIF_SITE) {
  return emulator::shuffle(mask, v, lanes, width, 'x', {file, line});
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, int delta, int width = 32, QIF_SITE) {
  return emulator::shuffle(mask, v, delta, width, 'd', {file, line});
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, int delta, int width = 32, QIF_SITE) {
  return emulator::shuffle(mask, v, delta, width, 'u', {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, QIF_SITE) {
  return emulator::vote(mask, predicate, {file, line});
}
inline bool __any_sync(uint32_t mask, bool predicate, QIF_SITE) {
  return emulator::vote(mask, predicate, {file, line}) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate, QIF_SITE) {
  return emulator::vote(mask, predicate, {file, line}) == mask;
}
#undef QIF_SITE
