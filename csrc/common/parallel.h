// OpenMP loops. The pool is torch's own (one libgomp per process), so torch.set_num_threads governs these too.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace qif {
namespace QIF_ISA {

// Below this many elements, waking the pool costs more than the work.
constexpr int64_t kSerialElements = 1 << 15;

// Parts for each thread at most: a thread whose processor others take leaves what it has not begun to the rest.
constexpr int64_t kParts = 8;

// f(begin, end) over contiguous ranges of [0, n). What is computed must not depend on where a range starts.
template <class F>
inline void parallel_ranges(int64_t n, int64_t elements, F&& f) {
  if (n <= 0) return;
  const int threads = elements < kSerialElements || omp_in_parallel() ? 1 : omp_get_max_threads();
  if (threads <= 1 || n == 1) {
    f(int64_t{0}, n);
    return;
  }
  const int64_t most = std::min<int64_t>(kParts * threads, 2 * elements / kSerialElements);
  const int64_t parts = std::min<int64_t>(n, std::max<int64_t>(threads, most));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t part = 0; part < parts; ++part) f(n * part / parts, n * (part + 1) / parts);
}

}  // namespace QIF_ISA
}  // namespace qif
