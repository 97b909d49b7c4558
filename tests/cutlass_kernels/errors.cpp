// Prints what the module says of a CUDA error code.
#include <cstdio>
#include <cstdlib>
#include <string>

namespace qif {
std::string cuda_error(int error);
}

int main(int, char** argv) { std::puts(qif::cuda_error(std::atoi(argv[1])).c_str()); }
