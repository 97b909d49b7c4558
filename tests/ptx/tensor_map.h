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

struct Box {
  TensorMap map;
  int32_t at[5];

  uint32_t bytes() const {
    uint32_t n = map.element_bytes;
    for (uint32_t d = 0; d < map.rank; ++d) n *= map.box[d];
    return n;
  }

  // For every 16 bytes of the box, which lies at `shared`: f(their address there, the first and the number of those
  // that are in the tensor, the address of these). Rows of a box are multiples of 16 bytes.
  template <class F>
  void for_pieces(uint32_t shared, F f) const {
    const int64_t width = 16 / map.element_bytes;
    for (uint32_t offset = 0; offset < bytes(); offset += 16) {
      uint32_t rest = offset / map.element_bytes;
      uint64_t global = map.address;
      int64_t first = 0, last = width;
      for (uint32_t d = 0; d < map.rank; rest /= map.box[d++]) {
        const int64_t i = at[d] + static_cast<int64_t>(rest % map.box[d]), size = map.size[d];
        global += static_cast<uint64_t>(i) * map.stride[d];
        if (d == 0) {
          first = std::min(std::max<int64_t>(-i, 0), width);
          last = std::max(first, std::min(size - i, width));
        } else if (i < 0 || i >= size) {
          last = first;
        }
      }
      f(swizzled(shared + offset, map.swizzle), static_cast<uint32_t>(first * map.element_bytes),
        static_cast<uint32_t>((last - first) * map.element_bytes),
        global + static_cast<uint64_t>(first) * map.element_bytes);
    }
  }
};

}  // namespace ptx
