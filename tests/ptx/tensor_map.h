// What stands in a CUtensorMap here, whose own contents are the driver's secret: 128 bytes, aligned to 64.
#pragma once
#include <algorithm>
#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x70747874;
  uint32_t magic, rank, element_bytes, swizzle;  // 0: none, 1: 32 bytes, 2: 64, 3: 128
  uint64_t address;
  uint32_t size[5], box[5];  // elements
  uint64_t stride[5];        // bytes
};
static_assert(sizeof(TensorMap) <= 128);

// The address of a byte of a box in shared memory; swizzles exchange groups of 16 bytes.
inline uint32_t swizzled(uint32_t address, uint32_t swizzle) {
  return address ^ (address >> 7 & ((1u << swizzle) - 1)) << 4;
}

inline uint32_t box_bytes(const TensorMap& m) {
  uint32_t n = m.element_bytes;
  for (uint32_t d = 0; d < m.rank; ++d) n *= m.box[d];
  return n;
}

// f(offset in the box, address in global memory or 0 outside of the tensor, bytes) for every row of a box.
template <class F>
void for_rows(const TensorMap& m, const int32_t (&at)[5], F f) {
  const uint32_t row = m.box[0] * m.element_bytes, rows = box_bytes(m) / row;
  for (uint32_t r = 0; r < rows; ++r) {
    uint64_t address = m.address;
    bool inside = true;
    uint32_t rest = r;
    for (uint32_t d = 1; d < m.rank; ++d) {
      const int64_t i = at[d] + static_cast<int64_t>(rest % m.box[d]);
      rest /= m.box[d];
      inside = inside && i >= 0 && i < m.size[d];
      address += static_cast<uint64_t>(i) * m.stride[d];
    }
    // outside on the left, inside, outside on the right
    const int64_t first = at[0], last = first + m.box[0], size = m.size[0];
    const int64_t from = std::min(std::max<int64_t>(-first, 0), last - first);
    const int64_t to = inside ? std::max(from, std::min(last, size) - first) : from;
    const uint32_t b = m.element_bytes;
    if (from > 0) f(r * row, uint64_t{0}, static_cast<uint32_t>(from * b));
    if (to > from)
      f(r * row + static_cast<uint32_t>(from * b), address + (first + from) * b,
        static_cast<uint32_t>((to - from) * b));
    if (to < last - first)
      f(r * row + static_cast<uint32_t>(to * b), uint64_t{0}, static_cast<uint32_t>((last - first - to) * b));
  }
}

}  // namespace ptx
