#include <vector>

#include "common/parallel.h"
#include "kernels/gelu_tanh_value.h"
#include "kernels/int8_row.h"
#include "kernels/int8_rows.h"

namespace qif {
namespace QIF_ISA {

template <class T>
static void rows_of(const Int8Rows& p) {
  parallel_ranges(p.rows, p.rows * p.width, [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.width);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * p.stride;
      each<float>(p.width, [&](auto lane, int64_t i) {
        using V = typename decltype(lane)::type;
        const V v = load<V>(x + i);
        store(row.data() + i, p.gelu ? V(gelu_tanh_value<V, float>(v)) : v);
      });
      p.scales[r] = int8_row(row.data(), p.width, p.group, p.values, r);
    }
  });
}

void int8_rows(const Int8Rows& p) {
  switch (p.dtype) {
    case kFloat16:
      return rows_of<Half>(p);
    case kBFloat16:
      return rows_of<BFloat16>(p);
    default:
      return rows_of<float>(p);
  }
}

}  // namespace QIF_ISA
}  // namespace qif
