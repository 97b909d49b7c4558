// One kernel source, compiled once per instruction set; the best one that this CPU runs is chosen at the first call.
#pragma once

#include "common/dtype.h"

namespace qif {

enum class Isa { kBaseline, kAvx2, kAvx512 };
Isa cpu_isa();          // bindings.cpp
Isa cpu_isa_at_best();  // whatever is chosen for tests

}  // namespace qif

#if defined(QIF_X86)
#define QIF_DECLARE_CPU(NAME, PARAMS)       \
  namespace baseline {                      \
  void NAME(const PARAMS&);                 \
  }                                         \
  namespace avx2 {                          \
  void NAME(const PARAMS&);                 \
  }                                         \
  namespace avx512 {                        \
  void NAME(const PARAMS&);                 \
  }                                         \
  inline void NAME##_cpu(const PARAMS& p) { \
    switch (cpu_isa()) {                    \
      case Isa::kAvx512:                    \
        return avx512::NAME(p);             \
      case Isa::kAvx2:                      \
        return avx2::NAME(p);               \
      default:                              \
        return baseline::NAME(p);           \
    }                                       \
  }
#else
#define QIF_DECLARE_CPU(NAME, PARAMS) \
  namespace baseline {                \
  void NAME(const PARAMS&);           \
  }                                   \
  inline void NAME##_cpu(const PARAMS& p) { baseline::NAME(p); }
#endif

// Run BODY with T as the storage type of dtype code `code`.
#define QIF_DISPATCH(code, T, ...) \
  switch (code) {                  \
    case kFloat32: {               \
      using T = float;             \
      __VA_ARGS__;                 \
    } break;                       \
    case kFloat16: {               \
      using T = Half;              \
      __VA_ARGS__;                 \
    } break;                       \
    case kBFloat16: {              \
      using T = BFloat16;          \
      __VA_ARGS__;                 \
    } break;                       \
    default: {                     \
      using T = double;            \
      __VA_ARGS__;                 \
    }                              \
  }
