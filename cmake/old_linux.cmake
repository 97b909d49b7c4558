# The module loads on older Linux than it is linked on: csrc/old_glibc.h says how. tests/wheels reads the result.
include(CheckCXXSourceCompiles)
check_cxx_source_compiles("#include <cstdlib>
#if !defined(__GLIBC__) || !defined(__GLIBCXX__) || !(defined(__x86_64__) || defined(__aarch64__))
#error
#endif
int main() {}" QIF_GLIBC)
if(QIF_GLIBC)
  set(OLD_GLIBC csrc/old_glibc.cpp)
  if(QIF_CUDA_FOUND)
    list(APPEND OLD_GLIBC csrc/old_glibc_cuda.cpp)
    # Where they were before, named by their files: what is linked as -lrt is an archive since.
    target_link_options(_C PRIVATE LINKER:--push-state,--no-as-needed -l:libdl.so.2 -l:libpthread.so.0 -l:librt.so.1
                        LINKER:--pop-state)
  endif()
  add_library(old_glibc OBJECT ${OLD_GLIBC})
  foreach(file ${OLD_GLIBC})
    file(STRINGS ${file} OLDEST REGEX "^OLDEST")
    list(TRANSFORM OLDEST REPLACE "^OLDEST[_OF]*.([a-z_]+).*" "LINKER:--wrap=\\1")
    target_link_options(_C PRIVATE ${OLDEST})
  endforeach()
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${OLD_GLIBC})
  target_link_libraries(_C PRIVATE old_glibc)
endif()
