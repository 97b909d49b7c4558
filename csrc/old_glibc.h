// Calls of a function of glibc by its oldest version, which every glibc has, wherever the module is linked.
//
// glibc 2.34 moved functions of libpthread, libdl and librt into libc, and 2.29 gave exp a new version; what is linked
// there asks for these. The linker turns each call of NAME into one of __wrap_NAME (--wrap), and OLDEST(NAME) defines
// that as a jump to the oldest version. cmake/old_linux.cmake reads the names in the lines that begin with OLDEST.
#pragma once

#if defined(__x86_64__)
#define QIF_BASE "2.2.5"
#define QIF_DLMOPEN "2.3.4"
#define QIF_JUMP(name) "jmp oldest_" name "@PLT\n"
#else
#define QIF_BASE "2.17"
#define QIF_DLMOPEN QIF_BASE
#define QIF_JUMP(name) "b oldest_" name "\n"
#endif
#define OLDEST_OF(name, version)                                                                                    \
  asm(".symver oldest_" #name "," #name "@GLIBC_" version "\n.text\n.globl __wrap_" #name "\n.hidden __wrap_" #name \
      "\n.type __wrap_" #name ", %function\n__wrap_" #name ":\n" QIF_JUMP(#name));
#define OLDEST(name) OLDEST_OF(name, QIF_BASE)
