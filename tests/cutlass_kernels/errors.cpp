// Prints what the module says of a CUDA error code, and how often it has made the runtime forget its last error.
#include <cstdio>
#include <cstdlib>
#include <string>

static int forgotten = 0;

// In the place of cudaGetLastError (ld --wrap), which always fails without a driver.
extern "C" int __wrap_cudaGetLastError() {
  ++forgotten;
  return 0;
}

namespace qif {
std::string cuda_error(int error);
}

int main(int, char** argv) {
  std::puts(qif::cuda_error(std::atoi(argv[1])).c_str());
  std::printf("%d\n", forgotten);
}
