// Products of float8 on tensor cores, beside those of mma.cuh: mma.sync of every GPU from sm_89 on, or its emulation.
#pragma once
#include "common/mma.cuh"

namespace qif {
namespace gpu {

// c += a b of e4m3, with the fragments of 8-bit integers (mma.cuh), summed in float32. sm_89 and sm_120 have this
// instruction; for sm_90, sm_100 and sm_103 the compiler makes float16 of the numbers and multiplies those.
QIF_INLINE void multiply_add_e4m3(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
#if defined(QIF_EMULATED)
  emulator::multiply_add_e4m3(a, {b0, b1}, c);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

}  // namespace gpu
}  // namespace qif
