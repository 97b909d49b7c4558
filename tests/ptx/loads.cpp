// Loads and stores of global and shared memory and of parameters.
#include "machine.h"

namespace ptx {
namespace {

template <Space S>
void load(Warp& w, int l, const Instruction& i) {
  const uint32_t bytes = i.bytes * i.count;
  const Place p = touch(w, l, i, S, Access::kRead, w.address(i.operands[1], l), bytes, bytes, observer(w, l));
  bool undefined = false;
  for (uint32_t b = 0; S == Space::kShared && b < bytes; ++b) undefined = undefined || p.cells[b].undefined;
  for (int n = 0; n < i.count; ++n) {
    uint64_t v = 0;
    std::memcpy(&v, p.data + i.bytes * n, i.bytes);
    w.set(i.operands[0].part(n).slot, l, v, undefined);
  }
}

template <Space S>
void store(Warp& w, int l, const Instruction& i) {
  const uint32_t bytes = i.bytes * i.count;
  const bool undefined = w.any_undefined && w.operands_undefined >> l & 1;
  if (undefined && S == Space::kGlobal) fail(w, l, i, "stores what came of shared memory that was never written");
  const Place p = touch(w, l, i, S, Access::kWrite, w.address(i.operands[0], l), bytes, bytes, observer(w, l));
  for (uint32_t b = 0; b < bytes; ++b) p.cells[b].undefined = undefined;
  for (int n = 0; n < i.count; ++n) {
    const uint64_t v = w.value(i.operands[1].part(n), l);
    std::memcpy(p.data + i.bytes * n, &v, i.bytes);
  }
}

}  // namespace

Forms memory_forms() {
  return {{"ld.param.*", each_lane<load<Space::kParam>>, 1},
          {"ld.global.*", each_lane<load<Space::kGlobal>>, 1},
          {"ld.shared.*", each_lane<load<Space::kShared>>, 1},
          {"st.global.*", each_lane<store<Space::kGlobal>>},
          {"st.shared.*", each_lane<store<Space::kShared>>}};
}

}  // namespace ptx
