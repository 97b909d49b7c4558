// Products on tensor cores: fragments to and from shared memory, mma.sync of a warp, wgmma of four warps.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "machine.h"

namespace ptx {
namespace {

float widen(uint16_t bits, bool bf16) {
  return bf16 ? unpack<float>(uint64_t{bits} << 16) : static_cast<float>(unpack<_Float16>(bits));
}

bool meet_whole(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, lanes)) return false;
  if (lanes != ~0u) fail(w, __builtin_ctz(lanes), i, "needs a whole warp");
  return true;
}

// ---- 8 x 8 matrices -----------------------------------------------------------------------------------------------

// Lane l names row l % 8 of matrix l / 8, and holds two values of row l / 4, or, transposed, of column l / 4.
template <bool Load>
Outcome move_matrices(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_whole(w, i, lanes)) return Outcome::kBlocked;
  const std::vector<Operand>& parts = i.operands[Load ? 0 : 1].parts;
  const int matrices = static_cast<int>(parts.size());
  const Access access = Load ? Access::kRead : Access::kWrite;
  unsigned char* rows[kLanes];
  bool undefined[kLanes] = {};  // rows
  for (int l = 0; l < 8 * matrices; ++l) {
    const Place p = locate(w, l, i, Space::kShared, access, w.address(i.operands[Load ? 1 : 0], l), 16, 16);
    rows[l] = p.data;
    bool unwritten = false;
    for (int b = 0; Load && b < 16; ++b) {
      unwritten = unwritten || p.cells[b].write == 0;
      undefined[l] = undefined[l] || unwritten || p.cells[b].undefined;
    }
    w.any_undefined = w.any_undefined || undefined[l];
    if (!unwritten) check(w, l, i, p, access, observer(w, l));
  }
  const bool transposed = i.has("trans");
  for (int l = 0; l < kLanes; ++l)
    for (int m = 0; m < matrices; ++m) {
      uint64_t word = w.value(parts[m], l);
      bool bad = false;
      for (int e = 0; e < 2; ++e) {
        const int row = transposed ? l % 4 * 2 + e : l / 4, column = transposed ? l / 4 : l % 4 * 2 + e;
        unsigned char* in_memory = rows[8 * m + row] + 2 * column;
        unsigned char* in_register = reinterpret_cast<unsigned char*>(&word) + 2 * e;
        std::memcpy(Load ? in_register : in_memory, Load ? in_memory : in_register, 2);
        bad = bad || undefined[8 * m + row];
      }
      if (Load) w.set(parts[m].slot, l, word & 0xffffffff, bad);
    }
  return Outcome::kNext;
}

// ---- mma.sync -------------------------------------------------------------------------------------------------------

Outcome multiply(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_whole(w, i, lanes)) return Outcome::kBlocked;
  const bool bf16 = i.has("bf16");
  float left[16][16], right[8][16];
  bool left_undefined[16] = {}, right_undefined[8] = {};  // rows of the one, columns of the other
  const auto read = [&](const Operand& o, int l, float* pair, bool& undefined) {
    const uint64_t word = w.value(o, l);
    for (int e : {0, 1}) pair[e] = widen(static_cast<uint16_t>(word >> 16 * e), bf16);
    undefined = undefined || w.undefined[o.slot] >> l & 1;
  };
  for (int l = 0; l < kLanes; ++l) {
    for (int n = 0; n < 4; ++n) {
      const int row = l / 4 + n % 2 * 8;
      read(i.operands[1].parts[n], l, &left[row][l % 4 * 2 + n / 2 * 8], left_undefined[row]);
    }
    for (int n = 0; n < 2; ++n)
      read(i.operands[2].parts[n], l, &right[l / 4][l % 4 * 2 + n * 8], right_undefined[l / 4]);
  }
  for (int l = 0; l < kLanes; ++l) {
    float sums[4];
    bool undefined[4];
    for (int n = 0; n < 4; ++n) {
      const int row = l / 4 + n / 2 * 8, column = l % 4 * 2 + n % 2;
      const Operand& before = i.operands[3].parts[n];
      sums[n] = std::inner_product(left[row], left[row] + 16, right[column], unpack<float>(w.value(before, l)));
      undefined[n] = left_undefined[row] || right_undefined[column] ||
                     (before.kind == Operand::kRegister && w.undefined[before.slot] >> l & 1);
    }
    for (int n = 0; n < 4; ++n) w.set(i.operands[0].parts[n].slot, l, pack(sums[n]), undefined[n]);
  }
  return Outcome::kNext;
}

uint32_t byte(uint8_t v) { return v; }
uint32_t signed_byte(uint8_t v) { return static_cast<uint32_t>(static_cast<int8_t>(v)); }
float e4m3(uint8_t v) {
  return (v & 127) == 127 ? NAN : 256 * widen(static_cast<uint16_t>((v & 128) << 8 | (v & 127) << 7), false);
}

// Bytes, of which Left and Right make numbers of the type of the sums; integers wrap.
template <auto Left, auto Right>
Outcome multiply_bytes(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_whole(w, i, lanes)) return Outcome::kBlocked;
  using Sum = decltype(Left(0));
  uint8_t left[16][32], right[8][32];
  bool left_undefined[16] = {}, right_undefined[8] = {};
  const auto read = [&](const Operand& o, int l, void* four, bool& undefined) {
    const uint64_t word = w.value(o, l);
    std::memcpy(four, &word, 4);
    undefined = undefined || w.undefined[o.slot] >> l & 1;
  };
  for (int l = 0; l < kLanes; ++l) {
    for (int n = 0; n < 4; ++n) {
      const int row = l / 4 + n % 2 * 8;
      read(i.operands[1].parts[n], l, &left[row][l % 4 * 4 + n / 2 * 16], left_undefined[row]);
    }
    for (int n = 0; n < 2; ++n)
      read(i.operands[2].parts[n], l, &right[l / 4][l % 4 * 4 + n * 16], right_undefined[l / 4]);
  }
  for (int l = 0; l < kLanes; ++l)
    for (int n = 0; n < 4; ++n) {
      const int row = l / 4 + n / 2 * 8, column = l % 4 * 2 + n % 2;
      const Operand& before = i.operands[3].parts[n];
      Sum sum = unpack<Sum>(w.value(before, l));
      for (int k = 0; k < 32; ++k) sum += Left(left[row][k]) * Right(right[column][k]);
      w.set(i.operands[0].parts[n].slot, l, pack(sum),
            left_undefined[row] || right_undefined[column] ||
                (before.kind == Operand::kRegister && w.undefined[before.slot] >> l & 1));
    }
  return Outcome::kNext;
}

// ---- wgmma --------------------------------------------------------------------------------------------------------

template <class F>
void for_group(const Warp& w, F f) {
  for (int v = w.index / 4 * 4; v < w.index / 4 * 4 + 4; ++v) f(w.block->warps[v]);
}

// All four warps of a group; `lanes` of this warp are blocked until then.
bool meet_group(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, lanes)) return false;
  if (w.index / 4 * 4 + 4 > static_cast<int>(w.block->warps.size())) fail(w, 0, i, "needs four warps");
  bool there = true;
  for_group(w, [&](Warp& v) { there = there && (&v == &w || v.at(w.pc[0], State::kMeeting) == ~0u); });
  if (!there) {
    w.stop(lanes, State::kMeeting);
    return false;
  }
  for_group(w, [](Warp& v) {
    v.release(~0u);
    v.advance(~0u);
  });
  return true;
}

WarpGroup& group_of(const Warp& w) { return w.block->groups[w.index / 4]; }

int agent_of_group(const Warp& w) {
  return w.block->cluster->agent('w', *w.block, w.index / 4, "a wgmma of warp group ");
}

// A matrix in shared memory whose rows are of 128 bytes, in swizzles of as many; eight rows lie together.
struct Matrix {
  uint32_t start, stride;
  int rows;

  Matrix(const Warp& w, const Instruction& i, uint64_t descriptor, int rows)
      : start((descriptor & 0x3fff) << 4), stride((descriptor >> 32 & 0x3fff) << 4), rows(rows) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7))
      fail(w, 0, i, "only matrices in swizzles of 128 bytes are modelled");
  }
  template <class F>
  void for_places(const Warp& w, const Instruction& i, F f) const {  // f(row, byte, place of 16 bytes from there on)
    for (int row = 0; row < rows; ++row)
      for (int byte : {0, 16}) {
        const uint32_t address = swizzled(start + row / 8 * stride + row % 8 * 128 + byte, 3);
        f(row, byte, locate(w, 0, i, Space::kShared, Access::kRead, address, 16, 16));
      }
  }
};

int columns_of(const Instruction& i) { return std::stoi(i.words[4].substr(i.words[4].find('n') + 1)); }

Outcome multiply_async(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_group(w, i, lanes)) return Outcome::kBlocked;
  if (i.operands[1].kind == Operand::kVector) fail(w, 0, i, "a left operand in registers is not modelled");
  if (i.operands.size() > 7 && (w.value(i.operands[6], 0) || w.value(i.operands[7], 0)))
    fail(w, 0, i, "transposed operands are not modelled");
  WarpGroup& g = group_of(w);
  const Multiply m = {g.committed + 1, &i, w.value(i.operands[1], 0), w.value(i.operands[2], 0),
                      w.value(i.operands[3], 0) != 0};
  std::vector<Observer> seen;  // reads by the asynchronous proxy, with what every thread of the group knows
  for_group(w, [&](Warp& v) {
    for (const Operand& d : i.operands[0].parts) {
      if (v.fence == 0 || v.used[d.slot] > v.fence)
        fail(v, 0, i, "no wgmma.fence stands between this and what used the accumulators before");
      v.in_use[d.slot] = m.group;
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int o : {1, 2, 3})
        if (v.value(i.operands[o], l) != w.value(i.operands[o], 0))
          fail(v, l, i, "the threads of a warp group differ in an operand");
      Observer o = observer(v, l, true);
      o.self = -1;
      o.record = stamp(o.cluster, agent_of_group(w), m.group);
      const auto same = [&](const Observer& s) { return s.known == o.known && s.fenced == o.fenced; };
      if (std::none_of(seen.begin(), seen.end(), same)) seen.push_back(o);
    }
  });
  for (const Matrix& matrix : {Matrix(w, i, m.left, 64), Matrix(w, i, m.right, columns_of(i))})
    matrix.for_places(w, i, [&](int, int, const Place& p) {
      for (const Observer& o : seen) check(w, 0, i, p, Access::kRead, o);
    });
  g.products.push_back(m);
  return Outcome::kJumped;
}

// The values of 32 bytes of each row, as T, [values][rows].
template <class Stored, class T, class F>
std::vector<T> read_operand(const Warp& w, const Instruction& i, const Matrix& matrix, F number) {
  constexpr int kBytes = sizeof(Stored);
  std::vector<T> values(32 / kBytes * static_cast<size_t>(matrix.rows));
  matrix.for_places(w, i, [&](int row, int byte, const Place& p) {
    Stored stored[16 / kBytes];
    std::memcpy(stored, p.data, 16);
    for (int e = 0; e < 16 / kBytes; ++e) values[(byte / kBytes + e) * matrix.rows + row] = number(stored[e]);
  });
  return values;
}

template <class T>
void accumulate(const Warp& first, const Multiply& m, const std::vector<T>& left, const std::vector<T>& right) {
  const Instruction& i = *m.instruction;
  const int columns = columns_of(i), depth = static_cast<int>(left.size() / 64);
  std::vector<T> sums(columns);
  for (int row = 0; row < 64; ++row) {
    std::fill(sums.begin(), sums.end(), T{});
    for (int k = 0; k < depth; ++k) {
      const T a = left[k * 64 + row];
      const T* b = &right[k * static_cast<size_t>(columns)];
      for (int c = 0; c < columns; ++c) sums[c] += a * b[c];
    }
    Warp& w = first.block->warps[first.index / 4 * 4 + row / 16];
    for (int c = 0; c < columns; ++c) {
      const int lane = row % 8 * 4 + c % 8 / 2, part = c / 8 * 4 + row % 16 / 8 * 2 + c % 2;
      uint64_t& d = w.lanes(i.operands[0].parts[part].slot)[lane];
      d = pack((m.accumulate ? unpack<T>(d) : T{}) + sums[c]);
    }
  }
}

void perform(const Warp& first, const Multiply& m) {
  const Instruction& i = *m.instruction;
  const Matrix left(first, i, m.left, 64), right(first, i, m.right, columns_of(i));
  if (i.has("s32")) {  // unsigned bytes with signed ones; sums wrap
    accumulate(first, m, read_operand<uint8_t, uint32_t>(first, i, left, [](uint8_t v) { return uint32_t{v}; }),
               read_operand<int8_t, uint32_t>(first, i, right, [](int8_t v) { return static_cast<uint32_t>(v); }));
    return;
  }
  const auto wide = [bf16 = i.has("bf16")](uint16_t v) { return widen(v, bf16); };
  accumulate(first, m, read_operand<uint16_t, float>(first, i, left, wide),
             read_operand<uint16_t, float>(first, i, right, wide));
}

Outcome fence(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_group(w, i, lanes)) return Outcome::kBlocked;
  for_group(w, [](Warp& v) { v.fence = v.steps; });
  return Outcome::kJumped;
}

Outcome commit(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_group(w, i, lanes)) return Outcome::kBlocked;
  ++group_of(w).committed;
  return Outcome::kJumped;
}

Outcome wait(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, lanes)) return Outcome::kBlocked;
  WarpGroup& g = group_of(w);
  const uint32_t left = static_cast<uint32_t>(w.value(i.operands[0], 0));
  const uint32_t upto = g.committed > left ? g.committed - left : 0;
  finish(g.products, upto, [&](const Multiply& m) { perform(w, m); });
  w.groups_waited = std::max(w.groups_waited, upto);
  Known before, after;  // most threads of a warp know the same, and should go on sharing it
  for_lanes(lanes, [&](int l) {
    Known& known = w.thread[l].order.known;
    if (!after || known != before) {
      before = after = known;
      add(after, agent_of_group(w), upto);
    }
    known = after;
  });
  return Outcome::kNext;
}

}  // namespace

Forms matrix_forms() {
  return {{"ldmatrix.sync.aligned.*.shared.b16", move_matrices<true>, 1},
          {"stmatrix.sync.aligned.(x[124].m8n8|m8n8.x[124]).shared.b16", move_matrices<false>},
          {"mma.sync.aligned.m16n8k16.row.col.f32.(bf16.bf16|f16.f16).f32", multiply, 1},
          {"mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", multiply_bytes<byte, signed_byte>, 1},
          {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", multiply_bytes<e4m3, e4m3>, 1},
          {"wgmma.mma_async.sync.aligned.m64n\\d+k16.f32.(bf16.bf16|f16.f16)", multiply_async},
          {"wgmma.mma_async.sync.aligned.m64n\\d+k32.s32.u8.s8", multiply_async},
          {"wgmma.fence.*", fence},
          {"wgmma.commit_group.*", commit},
          {"wgmma.wait_group.*", wait}};
}

}  // namespace ptx
