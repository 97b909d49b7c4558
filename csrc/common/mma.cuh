// Tensor cores and asynchronous copies as every GPU from sm_80 on has them: mma.sync, ldmatrix and cp.async of the PTX
// ISA, or their emulation. All 32 lanes of a warp call the matrix functions together.
#pragma once
#include "common/cuda.cuh"

namespace qif {
namespace gpu {

// ---- asynchronous copies from global to shared memory --------------------------------------------------------------

// 16 bytes, zeros where not `valid` (nothing is read then). They are there after the thread's wait_copies, for other
// threads after a barrier behind it.
template <class T>
QIF_INLINE void copy_async(Shared<T> to, const T* from, bool valid) {
#if defined(QIF_EMULATED)
  emulator::copy_async(shared_cast<emulator::Bytes16>(to), from, valid);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(valid ? 16 : 0)
      : "memory");
#endif
}

// Ends the thread's group of copies, which may be empty.
QIF_INLINE void commit_copies() {
#if defined(QIF_EMULATED)
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of the thread but the last `Left`.
template <int Left>
QIF_INLINE void wait_copies() {
#if defined(QIF_EMULATED)
  emulator::wait_copies(Left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#endif
}

// ---- matrix fragments ----------------------------------------------------------------------------------------------
// With g = lane / 4 and t = lane % 4, a lane holds (PTX ISA, "Matrix Fragments for mma.m16n8k16"), two values a word:
//   A, 16 x 16: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 in words 0 and 1, 2t + 8, 2t + 9 in words 2 and 3
//   B, 16 x 8:  rows 2t, 2t + 1 in word 0, 2t + 8, 2t + 9 in word 1; column g
//   C, 16 x 8:  row g in values 0 and 1, g + 8 in values 2 and 3; columns 2t, 2t + 1

// Four 8 x 8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned) and
// gets of each matrix the values of row g, columns 2t and 2t + 1; `Transposed`: of column g, rows 2t and 2t + 1.
template <bool Transposed, class T>
QIF_INLINE void load_matrices(Shared<T> row, uint32_t (&words)[4]) {
#if defined(QIF_EMULATED)
  emulator::load_matrices(shared_cast<emulator::Bytes16>(row), Transposed, words);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
#endif
}

// c += a b, products of T summed in float32.
template <class T>
QIF_INLINE void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
#if defined(QIF_EMULATED)
  emulator::multiply_add(a, {b0, b1}, c, [](uint32_t word, float& low, float& high) { widen2(T{}, word, low, high); });
#else
  if constexpr (std::is_same<T, BFloat16>::value)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The same of 8-bit values, four a word, unsigned in A and signed in B, with a depth of 32 (m16n8k32), summed exactly:
//   A: rows as above; columns 4t to 4t + 3 in words 0 and 1, 4t + 16 to 4t + 19 in words 2 and 3
//   B: rows 4t to 4t + 3 in word 0, 4t + 16 to 4t + 19 in word 1; column g
// load_matrices, not transposed, gives A its words of two tiles of 16 bytes beside each other.
QIF_INLINE void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int32_t (&c)[4]) {
#if defined(QIF_EMULATED)
  emulator::multiply_add(a, {b0, b1}, c);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Byte i is the one of the eight of low and high that bits 4i to 4i + 2 of `selectors` name, or, with bit 4i + 3, eight
// times its highest bit.
QIF_INLINE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
#if defined(QIF_EMULATED)
  return emulator::permute_bytes(low, high, selectors);
#else
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
#endif
}

// 2^x, to two units in the last place; 2^-inf is 0.
QIF_INLINE float exp2_approximate(float x) {
#if defined(QIF_EMULATED)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace gpu
}  // namespace qif
