// Products on tensor cores: fragments to and from shared memory, mma.sync of a warp, wgmma of four warps.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "machine.h"

namespace ptx {
namespace {

float widen(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float v;
    std::memcpy(&v, &word, 4);
    return v;
  }
  _Float16 v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}

float as_float(uint64_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
uint64_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

// ---- 8 x 8 matrices -----------------------------------------------------------------------------------------------

// Lane l names row l % 8 of matrix l / 8, and holds two values of row l / 4, or, transposed, of column l / 4.
template <bool Load>
Outcome move_matrices(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, i, lanes, ~0u)) return Outcome::kBlocked;
  if (lanes != ~0u) fail(w, __builtin_ctz(lanes), i, "needs a whole warp");
  const Operand& address = i.operands[Load ? 1 : 0];
  const std::vector<Operand>& parts = i.operands[Load ? 0 : 1].parts;
  const int matrices = static_cast<int>(parts.size());
  unsigned char* rows[kLanes];
  bool undefined[kLanes] = {};  // rows
  for (int l = 0; l < 8 * matrices; ++l) {
    const SharedPlace p = shared_place(w, l, i, w.address(address, l), 16, 16);
    const Observer o = observer(w, l);
    rows[l] = p.bytes;
    bool unwritten = false;
    for (int b = 0; Load && b < 16; ++b) {
      unwritten = unwritten || p.cells[b].write == 0;
      undefined[l] = undefined[l] || unwritten || p.cells[b].undefined;
    }
    w.any_undefined = w.any_undefined || undefined[l];
    if (!unwritten)
      check(w, l, i, Load ? check_read(p.cells, 16, o) : check_write(p.cells, 16, o), "shared", p.address);
  }
  const bool transposed = i.has("trans");
  for (int l = 0; l < kLanes; ++l)
    for (int m = 0; m < matrices; ++m)
      for (int e = 0; e < 2; ++e) {
        const int row = transposed ? l % 4 * 2 + e : l / 4, column = transposed ? l / 4 : l % 4 * 2 + e;
        unsigned char* in_memory = rows[8 * m + row] + 2 * column;
        unsigned char* in_register = reinterpret_cast<unsigned char*>(w.lanes(parts[m].slot) + l) + 2 * e;
        std::memcpy(Load ? in_register : in_memory, Load ? in_memory : in_register, 2);
        if (Load && undefined[8 * m + row]) w.undefined[parts[m].slot] |= 1u << l;
      }
  if (Load)
    for (int l = 0; l < kLanes; ++l)
      for (const Operand& p : parts) w.lanes(p.slot)[l] &= 0xffffffff;
  return Outcome::kNext;
}

// ---- mma.sync -------------------------------------------------------------------------------------------------------

Outcome multiply(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, i, lanes, ~0u)) return Outcome::kBlocked;
  if (lanes != ~0u) fail(w, __builtin_ctz(lanes), i, "needs a whole warp");
  const bool bf16 = i.has("bf16");
  float left[16][16], right[8][16];
  bool left_undefined[16] = {}, right_undefined[8] = {};  // rows of the one, columns of the other
  if (w.any_undefined)
    for (int l = 0; l < kLanes; ++l) {
      const auto bad = [&](const Operand& o) { return w.undefined[o.slot] >> l & 1; };
      for (int n = 0; n < 4; ++n) left_undefined[l / 4 + n % 2 * 8] |= bad(i.operands[1].parts[n]);
      for (int n = 0; n < 2; ++n) right_undefined[l / 4] |= bad(i.operands[2].parts[n]);
    }
  const auto place = [&](const Operand& o, int l, float* pair) {
    const uint64_t word = w.value(o, l);
    pair[0] = widen(static_cast<uint16_t>(word), bf16);
    pair[1] = widen(static_cast<uint16_t>(word >> 16), bf16);
  };
  for (int l = 0; l < kLanes; ++l) {
    for (int n = 0; n < 4; ++n) place(i.operands[1].parts[n], l, &left[l / 4 + n % 2 * 8][l % 4 * 2 + n / 2 * 8]);
    for (int n = 0; n < 2; ++n) place(i.operands[2].parts[n], l, &right[l / 4][l % 4 * 2 + n * 8]);
  }
  for (int l = 0; l < kLanes; ++l) {
    float sums[4];
    for (int n = 0; n < 4; ++n) {
      const float *a = left[l / 4 + n / 2 * 8], *b = right[l % 4 * 2 + n % 2];
      sums[n] = std::inner_product(a, a + 16, b, as_float(w.value(i.operands[3].parts[n], l)));
    }
    for (int n = 0; n < 4; ++n) {
      w.lanes(i.operands[0].parts[n].slot)[l] = as_bits(sums[n]);
      if (!w.any_undefined) continue;
      const Operand& before = i.operands[3].parts[n];
      const bool bad = left_undefined[l / 4 + n / 2 * 8] || right_undefined[l % 4 * 2 + n % 2] ||
                       (before.kind == Operand::kRegister && w.undefined[before.slot] >> l & 1);
      uint32_t& lanes_undefined = w.undefined[i.operands[0].parts[n].slot];
      lanes_undefined = (lanes_undefined & ~(1u << l)) | static_cast<uint32_t>(bad) << l;
    }
  }
  return Outcome::kNext;
}

// ---- wgmma --------------------------------------------------------------------------------------------------------

// All four warps of a group; `lanes` of this warp are blocked until then.
bool meet_group(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, i, lanes, ~0u)) return false;
  std::vector<Warp>& warps = w.block->warps;
  const int first = w.index / 4 * 4, pc = w.pc[0];
  for (int v = first; v < first + 4; ++v) {
    if (v >= static_cast<int>(warps.size())) fail(w, 0, i, "needs four warps");
    if (v != w.index && warps[v].at(pc, State::kMeeting) != ~0u) {
      w.block_lanes(lanes, State::kMeeting);
      return false;
    }
  }
  for (int v = first; v < first + 4; ++v) {
    warps[v].release(~0u);
    warps[v].advance(~0u);
  }
  return true;
}

WarpGroup& group_of(const Warp& w) {
  WarpGroup& g = w.block->groups[w.index / 4];
  if (g.agent == 0)
    g.agent =
        w.block->cluster->agent('w', *w.block, w.index / 4, "a wgmma of warp group " + std::to_string(w.index / 4));
  return g;
}

// A matrix in shared memory whose rows are of 64 values, in swizzles of 128 bytes; eight rows lie together.
struct Descriptor {
  uint32_t start, stride;

  Descriptor(const Warp& w, const Instruction& i, uint64_t bits)
      : start((bits & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1 || (bits >> 49 & 7)) fail(w, 0, i, "only matrices in swizzles of 128 bytes are modelled");
  }
  uint32_t address(int row, int k) const {  // of 8 values from k on
    return swizzled(start + row / 8 * stride + row % 8 * 128 + 2 * k, 3);
  }
};

int columns_of(const Instruction& i) { return std::stoi(i.words[4].substr(i.words[4].find('n') + 1)); }

// Reads by the asynchronous proxy, checked with what every thread of the group knows.
void check_operand(Warp& w, const Instruction& i, const Descriptor& d, int rows, Stamp record) {
  std::vector<Observer> seen;
  for (int v = w.index / 4 * 4; v < w.index / 4 * 4 + 4; ++v)
    for (int l = 0; l < kLanes; ++l) {
      Observer o = observer(w.block->warps[v], l, true);
      o.self = -1;
      o.record = record;
      if (std::none_of(seen.begin(), seen.end(),
                       [&](const Observer& s) { return s.known == o.known && s.fenced == o.fenced; }))
        seen.push_back(o);
    }
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < 16; k += 8) {
      const SharedPlace p = shared_place(w, 0, i, d.address(row, k), 16, 16);
      for (const Observer& o : seen) check(w, 0, i, check_read(p.cells, 16, o), "shared", p.address);
    }
}

Outcome multiply_async(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_group(w, i, lanes)) return Outcome::kBlocked;
  if (i.operands[1].kind == Operand::kVector) fail(w, 0, i, "a left operand in registers is not modelled");
  if (w.value(i.operands[6], 0) || w.value(i.operands[7], 0)) fail(w, 0, i, "transposed operands are not modelled");
  WarpGroup& g = group_of(w);
  for (int v = w.index / 4 * 4; v < w.index / 4 * 4 + 4; ++v) {
    Warp& other = w.block->warps[v];
    for (const Operand& d : i.operands[0].parts) {
      if (other.fence == 0 || other.used[d.slot] > other.fence)
        fail(other, 0, i, "no wgmma.fence stands between this and what used the accumulators before");
      other.in_use[d.slot] = g.committed + 1;
    }
    for (int o : {1, 2, 3})
      for (int l = 0; l < kLanes; ++l)
        if (other.value(i.operands[o], l) != w.value(i.operands[o], 0))
          fail(other, l, i, "the threads of a warp group differ in an operand");
  }
  const uint64_t left = w.value(i.operands[1], 0), right = w.value(i.operands[2], 0);
  const Stamp record = stamp(w.block->cluster->number, g.agent, g.committed + 1);
  check_operand(w, i, Descriptor(w, i, left), 64, record);
  check_operand(w, i, Descriptor(w, i, right), columns_of(i), record);
  g.open.push_back({&i, left, right, w.value(i.operands[3], 0) != 0});
  return Outcome::kJumped;
}

// Sixteen values of each row, [16][rows].
std::vector<float> read_operand(Warp& w, const Instruction& i, const Descriptor& d, int rows, bool bf16) {
  std::vector<float> values(16 * static_cast<size_t>(rows));
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < 16; k += 8) {
      uint16_t bits[8];
      std::memcpy(bits, shared_place(w, 0, i, d.address(row, k), 16, 16).bytes, 16);
      for (int e = 0; e < 8; ++e) values[(k + e) * static_cast<size_t>(rows) + row] = widen(bits[e], bf16);
    }
  return values;
}

void perform(Warp& first, const Multiply& m) {
  const Instruction& i = *m.instruction;
  const bool bf16 = i.words.back() == "bf16";
  const int columns = columns_of(i);
  const std::vector<float> left = read_operand(first, i, Descriptor(first, i, m.left), 64, bf16);
  const std::vector<float> right = read_operand(first, i, Descriptor(first, i, m.right), columns, bf16);
  std::vector<float> sums(columns);
  for (int row = 0; row < 64; ++row) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int k = 0; k < 16; ++k) {
      const float a = left[k * 64 + row];
      const float* b = &right[k * static_cast<size_t>(columns)];
      for (int c = 0; c < columns; ++c) sums[c] += a * b[c];
    }
    Warp& w = first.block->warps[first.index / 4 * 4 + row / 16];
    for (int c = 0; c < columns; ++c) {
      const int lane = row % 8 * 4 + c % 8 / 2, part = c / 8 * 4 + row % 16 / 8 * 2 + c % 2;
      uint64_t& d = w.lanes(i.operands[0].parts[part].slot)[lane];
      d = as_bits((m.accumulate ? as_float(d) : 0.0f) + sums[c]);
    }
  }
}

Outcome fence(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_group(w, i, lanes)) return Outcome::kBlocked;
  for (int v = w.index / 4 * 4; v < w.index / 4 * 4 + 4; ++v) w.block->warps[v].fence = w.block->warps[v].steps;
  return Outcome::kJumped;
}

Outcome commit(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_group(w, i, lanes)) return Outcome::kBlocked;
  WarpGroup& g = group_of(w);
  g.closed.push_back(std::move(g.open));
  g.open.clear();
  ++g.committed;
  return Outcome::kJumped;
}

Outcome wait(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, i, lanes, ~0u)) return Outcome::kBlocked;
  WarpGroup& g = group_of(w);
  const uint32_t left = static_cast<uint32_t>(w.value(i.operands[0], 0));
  const uint32_t upto = g.committed > left ? g.committed - left : 0;
  for (; g.performed < upto; ++g.performed) {
    for (const Multiply& m : g.closed.front()) perform(w, m);
    g.closed.pop_front();
  }
  w.groups_waited = std::max(w.groups_waited, upto);
  Known before, after;  // most threads of a warp know the same, and should go on sharing it
  for_lanes(lanes, [&](int l) {
    Known& known = w.thread[l].known;
    if (!after || known != before) {
      before = after = known;
      add(after, g.agent, upto);
    }
    known = after;
  });
  return Outcome::kNext;
}

}  // namespace

Step matrix_step(Instruction& i) {
  const std::string& first = i.words[0];
  i.written = first == "ldmatrix" || first == "mma";
  const bool pairs = i.words.back() == "b16";
  if (first == "ldmatrix" && pairs) return move_matrices<true>;
  if (first == "stmatrix" && pairs && !i.has("trans")) return move_matrices<false>;
  const bool sixteen = i.words.size() > 3 && (i.has("bf16") || i.has("f16")) && i.has("f32");
  if (first == "mma" && i.has("m16n8k16") && sixteen) return multiply;
  if (first != "wgmma") return nullptr;
  if (i.words[1] == "mma_async" && i.words[4].rfind("m64n", 0) == 0 && sixteen) return multiply_async;
  if (i.words[1] == "fence") return fence;
  if (i.words[1] == "commit_group") return commit;
  if (i.words[1] == "wait_group") return wait;
  return nullptr;
}

}  // namespace ptx
