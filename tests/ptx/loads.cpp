// Loads and stores of global and shared memory and of parameters.
#include "machine.h"

namespace ptx {
namespace {

Outcome load_param(Warp& w, const Instruction& i, uint32_t& lanes) {
  const std::vector<unsigned char>& params = w.block->cluster->launch.params;
  const Operand& to = i.operands[0];
  for_lanes(lanes, [&](int l) {
    const uint64_t offset = w.address(i.operands[1], l) - kParamWindow;
    if (offset + i.bytes * i.count > params.size()) fail(w, l, i, "read outside of the parameters");
    for (int n = 0; n < i.count; ++n) {
      uint64_t v = 0;
      std::memcpy(&v, &params[offset + i.bytes * n], i.bytes);
      w.lanes(to.kind == Operand::kVector ? to.parts[n].slot : to.slot)[l] = v;
    }
  });
  return Outcome::kNext;
}

uint64_t extend(uint64_t v, const Instruction& i) {
  const std::string& type = i.words.back();
  if (type == "s16") return static_cast<uint32_t>(static_cast<int16_t>(v));
  if (type == "s8") return static_cast<uint32_t>(static_cast<int8_t>(v));
  return v;
}

template <bool Shared>
Outcome load(Warp& w, const Instruction& i, uint32_t& lanes) {
  const Operand& to = i.operands[0];
  const uint32_t bytes = i.bytes * i.count;
  for_lanes(lanes, [&](int l) {
    const uint64_t address = w.address(i.operands[1], l);
    const unsigned char* from;
    bool undefined = false;
    if constexpr (Shared) {
      const SharedPlace p = shared_place(w, l, i, address, bytes, bytes);
      check(w, l, i, check_read(p.cells, bytes, observer(w, l)), "shared", p.address);
      from = p.bytes;
      for (uint32_t b = 0; b < bytes; ++b) undefined = undefined || p.cells[b].undefined;
    } else {
      Cell* cells = global_place(w, l, i, address, bytes, bytes, "read");
      check(w, l, i, check_read(cells, bytes, observer(w, l)), "global", address);
      from = reinterpret_cast<const unsigned char*>(address);
      w.block->cluster->counts.loaded += bytes;
    }
    for (int n = 0; n < i.count; ++n) {
      uint64_t v = 0;
      std::memcpy(&v, from + i.bytes * n, i.bytes);
      const int slot = to.kind == Operand::kVector ? to.parts[n].slot : to.slot;
      w.lanes(slot)[l] = extend(v, i);
      if (undefined) w.undefined[slot] |= 1u << l;
    }
  });
  return Outcome::kNext;
}

template <bool Shared>
Outcome store(Warp& w, const Instruction& i, uint32_t& lanes) {
  const Operand& what = i.operands[1];
  const uint32_t bytes = i.bytes * i.count;
  for_lanes(lanes, [&](int l) {
    const uint64_t address = w.address(i.operands[0], l);
    unsigned char* to;
    const bool undefined = w.any_undefined && w.operands_undefined >> l & 1;
    if constexpr (Shared) {
      const SharedPlace p = shared_place(w, l, i, address, bytes, bytes);
      check(w, l, i, check_write(p.cells, bytes, observer(w, l)), "shared", p.address);
      to = p.bytes;
      for (uint32_t b = 0; b < bytes; ++b) p.cells[b].undefined = undefined;
    } else {
      if (undefined) fail(w, l, i, "stores what came of shared memory that was never written");
      Cell* cells = global_place(w, l, i, address, bytes, bytes, "write");
      check(w, l, i, check_write(cells, bytes, observer(w, l)), "global", address);
      to = reinterpret_cast<unsigned char*>(address);
      w.block->cluster->counts.stored += bytes;
    }
    for (int n = 0; n < i.count; ++n) {
      const uint64_t v = w.value(what.kind == Operand::kVector ? what.parts[n] : what, l);
      std::memcpy(to + i.bytes * n, &v, i.bytes);
    }
  });
  return Outcome::kNext;
}

}  // namespace

Step memory_step(Instruction& i) {
  if (i.words[0] != "ld" && i.words[0] != "st") return nullptr;
  const std::string& type = i.words.back();
  i.bytes = std::stoi(type.substr(1)) / 8;
  for (int n : {2, 4})
    if (i.has(n == 2 ? "v2" : "v4")) i.count = n;
  i.written = i.words[0] == "ld";
  const std::string& space = i.words[1];
  if (i.words[0] == "ld")
    return space == "param" ? load_param : space == "global" ? load<false> : space == "shared" ? load<true> : nullptr;
  return space == "global" ? store<false> : space == "shared" ? store<true> : nullptr;
}

}  // namespace ptx
