// What the kernels for the tile unit (AMX) of x86 CPUs share. A tile holds 16 rows of 64 bytes.
#pragma once
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace qif::amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Eight tiles of 16 x 64 bytes for the calling thread, while it lives.
struct Tiles {
  Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// The compiler does not see what the tile instructions read and write.
inline void tile_barrier() { asm volatile("" ::: "memory"); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// 16 x 16 numbers of four bytes, transposed.
inline void transpose(const __m512i* from, void* to) {
  __m512i r[16], t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(from[2 * i], from[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(from[2 * i], from[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 2; k++) {
      r[4 * i + 2 * k] = _mm512_unpacklo_epi64(t[4 * i + k], t[4 * i + 2 + k]);
      r[4 * i + 2 * k + 1] = _mm512_unpackhi_epi64(t[4 * i + k], t[4 * i + 2 + k]);
    }
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 4; k++) {
      t[8 * i + k] = _mm512_shuffle_i32x4(r[8 * i + k], r[8 * i + 4 + k], 0x88);
      t[8 * i + 4 + k] = _mm512_shuffle_i32x4(r[8 * i + k], r[8 * i + 4 + k], 0xdd);
    }
  char* const rows = static_cast<char*>(to);
  for (int k = 0; k < 8; k++) {
    _mm512_store_si512(rows + 64 * k, _mm512_shuffle_i32x4(t[k], t[8 + k], 0x88));
    _mm512_store_si512(rows + 64 * (8 + k), _mm512_shuffle_i32x4(t[k], t[8 + k], 0xdd));
  }
}

// Memory of the calling thread for one purpose, kept for its next call: fresh pages would cost more than the packing.
// Large pages, as it is read all over.
template <class Purpose>
char* scratch(int64_t bytes) {
  constexpr int64_t kLargePage = int64_t{1} << 21;
  thread_local std::unique_ptr<char, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local int64_t size = 0;
  if (bytes > size) {
    size = ceil_div(bytes, kLargePage) * kLargePage;
    memory.reset(static_cast<char*>(std::aligned_alloc(kLargePage, size)));
    if (!memory) size = 0, throw std::bad_alloc();
    madvise(memory.get(), size, MADV_HUGEPAGE);
  }
  return memory.get();
}

}  // namespace qif::amx
