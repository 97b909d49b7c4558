// Lets a module that was linked on a new Linux load on glibc 2.17 and libstdc++ of GCC 8.
#include "old_glibc.h"

#include <new>

// Without its new version it sets errno, and computes the same.
OLDEST(exp)

#define QIF_OWN extern "C" __attribute__((visibility("hidden")))

// libstdc++'s headers read it before they count references; false is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// What GCC 11 added to libstdc++ and its headers call, by what GCC 8's has, under their mangled names:
// std::__throw_bad_array_new_length(), and of std::exception_ptr, which holds one pointer, _M_addref() and
// _M_release().
QIF_OWN void _ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }
extern "C" void _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(void** copy, void* const* of);
extern "C" void _ZNSt15__exception_ptr13exception_ptrD1Ev(void** gone);
QIF_OWN void _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv(void** of) {
  void* copy;  // never destroyed: one reference more
  _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(&copy, of);
}
QIF_OWN void _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv(void** of) {
  void* gone = *of;
  *of = nullptr;
  _ZNSt15__exception_ptr13exception_ptrD1Ev(&gone);
}
