// Which units for linear_int8 this build and this CPU have, and the call of one. The build says which are compiled
// (cmake/int8.cmake).
#include "kernels/linear_int8.h"

#if defined(QIF_INT8_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qif {

#if defined(QIF_X86)
static unsigned cpuid(unsigned leaf, unsigned subleaf, int which) {
  unsigned r[4] = {leaf, 0, subleaf, 0};
  asm volatile("cpuid" : "+a"(r[0]), "=b"(r[1]), "+c"(r[2]), "=d"(r[3]));
  return r[which];
}
#endif

#if defined(QIF_INT8_AMX)
// Tiles, 8-bit products, and the operating system's leave, which is asked for at the first call.
static bool has_amx() {
  const unsigned edx = cpuid(7, 0, 3);
  if (!(edx >> 24 & 1) || !(edx >> 25 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool int8_unit_available(Int8Unit unit) {
#if defined(QIF_X86)
  const bool avx2 = cpu_isa_at_best() >= Isa::kAvx2, avx512 = cpu_isa_at_best() >= Isa::kAvx512;
  (void)avx2, (void)avx512;
#endif
  switch (unit) {
    case Int8Unit::kPlain:
      return true;
#if defined(QIF_INT8_AVX2)
    case Int8Unit::kAvx2:
      return avx2;
#endif
#if defined(QIF_INT8_AVX_VNNI)
    case Int8Unit::kAvxVnni:
      return avx2 && cpuid(0, 0, 0) >= 7 && cpuid(7, 0, 0) >= 1 && (cpuid(7, 1, 0) >> 4 & 1);
#endif
#if defined(QIF_INT8_AVX512_VNNI)
    case Int8Unit::kAvx512Vnni:
      return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(QIF_INT8_AMX)
    case Int8Unit::kAmx: {
      static const bool amx = avx512 && has_amx();
      return amx;
    }
#endif
    default:
      return false;
  }
}

void linear_int8(const Int8Product* products, int64_t count, Int8Unit unit) {
  switch (unit) {
#if defined(QIF_INT8_AVX2)
    case Int8Unit::kAvx2:
      return int8_avx2::linear_int8(products, count);
#endif
#if defined(QIF_INT8_AVX_VNNI)
    case Int8Unit::kAvxVnni:
      return int8_avx_vnni::linear_int8(products, count);
#endif
#if defined(QIF_INT8_AVX512_VNNI)
    case Int8Unit::kAvx512Vnni:
      return int8_avx512_vnni::linear_int8(products, count);
#endif
#if defined(QIF_INT8_AMX)
    case Int8Unit::kAmx:
      return int8_amx::linear_int8(products, count);
#endif
    default:
      return int8_plain::linear_int8(products, count);
  }
}

}  // namespace qif
