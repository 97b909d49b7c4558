// What stands in for the CUDA runtime and driver under the kernels' own host code.
#pragma once
#include "machine.h"

namespace ptx {

struct Runtime {
  std::vector<std::unique_ptr<Program>> programs;
  Global global;
  std::map<std::string, Counts> counts;  // by kernel
  std::set<std::string> launched;        // kernels
  unsigned seed = 1;
  uint64_t step_limit = 1 << 28;
  int major = 9, processors = 4;
  std::string failure;  // of the last launch or driver call, in words
};
extern Runtime runtime;

}  // namespace ptx
