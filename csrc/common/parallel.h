// OpenMP loops. The pool is torch's own (one libgomp per process), so torch.set_num_threads governs these too.
#pragma once
#include <omp.h>

#include <cstdint>

namespace qif {
namespace QIF_ISA {

// Below this many elements, waking the pool costs more than the work.
constexpr int64_t kSerialElements = 1 << 15;

// f(begin, end) over contiguous ranges of [0, n). What a thread computes must not depend on where its range starts.
template <class F>
inline void parallel_ranges(int64_t n, int64_t elements, F&& f) {
  if (n <= 0) return;
  const int threads = elements < kSerialElements || omp_in_parallel() ? 1 : omp_get_max_threads();
  if (threads <= 1 || n == 1) {
    f(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), k = omp_get_num_threads();
    const int64_t begin = n * t / k, end = n * (t + 1) / k;
    if (begin < end) f(begin, end);
  }
}

}  // namespace QIF_ISA
}  // namespace qif
